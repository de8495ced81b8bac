"""Inference on a mesh is that of one device, whatever is sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, errors
from dsv3_jax.distributed import sharding
from dsv3_jax.inference import block_pool, engine, generate, model_runner
from dsv3_jax.inference import mesh as inference_mesh
from tests.inference import meshes

F32 = 2e-6  # sums in another order, relative to the largest logit
ALL = {'data': 2, 'expert': 2, 'model': 2}
LAYOUTS = (
  *(
    pytest.param({axis: size}, marks=pytest.mark.nightly)
    for axis, size in (('data', 2), ('expert', 2), ('expert', 4), ('model', 2))
  ),
  {'node': 2},
  ALL,
)


@pytest.fixture(scope='module')
def one_device():
  params, router_biases = meshes.weights()
  return meshes.Passes(None)({'params': params}, router_biases)


@pytest.mark.parametrize('axes', LAYOUTS, ids=str)
def test_logits_are_those_of_one_device(one_device, axes):
  want_BTV, want_1LE = one_device
  passes = meshes.Passes(inference_mesh.make_mesh(**axes))
  params, router_biases = meshes.weights()
  params = passes.place.place(params, passes.place.params)
  got_BTV, load_PLE = passes({'params': params}, router_biases)
  limit = F32 * np.max(np.abs(want_BTV))
  np.testing.assert_allclose(got_BTV, want_BTV, rtol=0, atol=limit)
  load_LE = np.sum(np.asarray(load_PLE), axis=0)
  np.testing.assert_array_equal(load_LE, want_1LE[0])
  tokens = meshes.ROWS * (meshes.LENGTH + 1)
  assert np.sum(load_LE) == tokens * meshes.CONFIG.model.moe.top_k


# `test_expert_rebalancer.py` has the same traffic, while experts move.
@pytest.mark.nightly
@pytest.mark.parametrize(
  ('axes', 'num_speculative_tokens'),
  [(ALL, 1), ({'node': 2, 'expert': 2}, 0)],
  ids=str,
)
def test_requests_get_the_tokens_of_one_device(axes, num_speculative_tokens):
  """Also preempted, cached, speculative and sampled ones; no block is left."""
  mesh = inference_mesh.make_mesh(**axes)
  runner = model_runner.ModelRunner(
    meshes.CONFIG, *meshes.weights(), num_speculative_tokens, mesh
  )
  model_engine, tokens = meshes.traffic(runner)
  assert tokens == meshes.expected()
  assert (
    model_engine.stats().num_blocks == 7 * 4
    and model_engine.max_running == 2 * 4
  )
  known = meshes.compiled(runner)
  _, tokens = meshes.traffic(runner)
  assert tokens == meshes.expected() and meshes.compiled(runner) == known


@pytest.mark.slow
@pytest.mark.nightly
def test_what_shares_a_step_changes_nothing_on_a_mesh():
  """All together, and one after the other on either rank."""
  mesh = inference_mesh.make_mesh(data=2)
  runner = model_runner.ModelRunner(meshes.CONFIG, *meshes.weights(), mesh=mesh)
  model_engine, batched = meshes.traffic(runner, batch_invariant=True)
  for case, want in list(zip(meshes.REQUESTS, batched, strict=True))[::3]:
    request = model_engine.submit(*case)
    while not model_engine.is_idle:
      model_engine.step()
    assert request.tokens == want
  assert batched == meshes.expected()
  assert meshes.compiled(runner)[:3] == [0, 1, 1]


def test_a_rank_may_have_no_prompt():
  prompts = [meshes.prompt(i, 3 + i) for i in range(3)]
  cfg, weights = meshes.CONFIG, meshes.weights()
  want = generate.generate(
    model_runner.ModelRunner(cfg, *weights), prompts, 6
  ).tokens
  net = model_runner.ModelRunner(
    cfg, *weights, mesh=inference_mesh.make_mesh(data=4)
  )
  assert generate.generate(net, prompts, 6).tokens == want


def test_blocks_are_copied_on_their_rank():
  runner = model_runner.ModelRunner(
    meshes.CONFIG,
    *meshes.weights(),
    mesh=inference_mesh.make_mesh(data=2, expert=2),
  )
  caches = runner.empty_caches(3, engine.BLOCK_SIZE)
  assert caches.moe.c_LpsC.shape[1] == 4 * 3
  number = lambda x: x + jnp.arange(12.0)[:, None, None]
  copies = [
    block_pool.BlockCopy(9, 11),
    block_pool.BlockCopy(1, 2),
    block_pool.BlockCopy(11, 10),
  ]
  caches = runner.copy_blocks(copies, jax.tree.map(number, caches))
  want = np.array([0, 1, 1, 3, 4, 5, 6, 7, 8, 9, 9, 9])
  for leaf in jax.tree.leaves(caches):
    got = np.asarray(leaf)
    assert np.all(got == want[:, None, None])


def test_weights_and_latents_are_sharded():
  mesh = inference_mesh.make_mesh(**ALL)
  runner = model_runner.ModelRunner(meshes.CONFIG, *meshes.weights(), mesh=mesh)
  shape = lambda x: x.addressable_shards[0].data.shape
  moe = runner.params['moe_layers']['layers']['moe']
  assert shape(moe['w_up']) == (1, 4, 16, 4)  # half of E and of F
  attention = runner.params['moe_layers']['layers']['attention']
  assert shape(attention['w_o'])[1] == 1  # of two heads
  assert attention['w_dkv'].is_fully_replicated
  caches = runner.empty_caches(3, engine.BLOCK_SIZE)
  assert shape(caches.moe.c_LpsC)[1] == 3


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ({'data': 9}, 'need 9 devices, 8 are here'),
    ({'expert': 3}, 'parallel.expert = 3 must divide model.moe.num_experts=8'),
    ({'node': 8}, 'parallel.node=8 must divide model.moe.num_groups=4'),
    ({'model': 4}, r'parallel.model=4 must divide model.mla.num_heads=2'),
  ],
)
def test_what_does_not_divide_is_refused(axes, message):
  with pytest.raises(errors.InputError, match=message):
    inference_mesh.InferenceMesh(
      meshes.CONFIG, inference_mesh.make_mesh(**axes)
    )


def test_a_pipeline_is_refused():
  rest = {'schedule': '1f1b', 'fsdp': (), 'deterministic': False}
  sizes = dict.fromkeys(sharding.AXES, 1) | {'pipe': 2}
  mesh = sharding.make_mesh(config.ParallelConfig(**sizes, **rest))
  with pytest.raises(errors.InputError, match=r'parallel.pipe=2 must be 1'):
    model_runner.ModelRunner(meshes.CONFIG, *meshes.weights(), mesh=mesh)
