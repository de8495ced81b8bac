"""Rebalancing redundant experts changes no bit and compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.inference import mesh as inference_mesh
from dsv3_jax.inference import model_runner, redundant_experts
from dsv3_jax.server import engine_thread, metrics
from tests import settings
from tests.inference import meshes

MESHES = (
  pytest.param({}, marks=pytest.mark.nightly),
  {'node': 2, 'expert': 2},
  pytest.param({'data': 2, 'expert': 2, 'model': 2}, marks=pytest.mark.nightly),
)


def mesh_of(axes):
  return inference_mesh.make_mesh(**axes) if axes else None


def skewed():
  """Router biases that send most tokens to the first experts."""
  _, router_biases = meshes.weights()
  bias_LE = np.zeros_like(router_biases['moe'])
  bias_LE[:, :3] = [0.6, 0.5, 0.4]
  return router_biases | {'moe': router_biases['moe'] + bias_LE}


def runner_with(axes, cfg=meshes.CONFIG, **options):
  redundancy = redundant_experts.RedundancyConfig(**options)
  params, _ = meshes.weights(cfg)
  mesh = mesh_of(axes)
  return model_runner.ModelRunner(
    cfg, params, skewed(), mesh=mesh, redundancy=redundancy
  )


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('axes', MESHES, ids=str)
def test_no_bit_depends_on_where_experts_are(axes):
  """Nor, on one device, on whether there are redundant experts."""
  passes = meshes.Passes(mesh_of(axes), has_redundant=True)
  runner = runner_with(axes, redundant=8)
  if axes:
    plain = runner_with(axes, redundant=0)
    want_BTV, load_PLE = passes(plain.variables, plain.router_biases)
  else:
    params, _ = meshes.weights()
    alone = meshes.Passes(None)
    want_BTV, load_PLE = alone({'params': params}, runner.router_biases)
  placements = set()
  for load in (load_PLE, load_PLE[:, :, ::-1], 8 * load_PLE):
    got_BTV, got_RLE = passes(runner.variables, runner.router_biases)
    np.testing.assert_array_equal(got_BTV, want_BTV)
    np.testing.assert_array_equal(got_RLE, load_PLE)
    slots = jax.tree.leaves(runner.variables['redundant_slots'])
    placements.add(b''.join(np.asarray(x).tobytes() for x in slots))
    runner.rebalancer.record_step(load)
    runner.rebalancer.rebalance()
  assert len(placements) == 3
  assert passes.run._cache_size() == (2 if axes else 1)  # 0 and 8 spare slots


@pytest.mark.nightly
def test_the_load_is_spread_better_than_before():
  axes = {'expert': 4}
  passes = meshes.Passes(mesh_of(axes), has_redundant=True)
  runner = runner_with(axes, redundant=8)
  assert runner.rebalancer.balancedness is None
  values = []
  for _ in range(2):
    _, load_PLE = passes(runner.variables, runner.router_biases)
    runner.rebalancer.record_step(load_PLE)
    runner.rebalancer.rebalance()
    values.append(runner.rebalancer.balancedness)
  (before, hoped), (after, _) = values
  assert before + 0.1 < hoped
  assert after == hoped  # the same load, placed for
  assert runner.rebalancer.rebalances == 2


@pytest.mark.nightly
@pytest.mark.usefixtures('optimized')
def test_requests_get_the_same_tokens_while_experts_move():
  params, router_biases = meshes.weights()
  runner = model_runner.ModelRunner(
    *(
      meshes.CONFIG,
      params,
      router_biases,
      1,
      mesh_of({'node': 2, 'expert': 2}),
    ),
    redundancy=redundant_experts.RedundancyConfig(redundant=4, every=5),
  )
  assert meshes.traffic(runner)[1] == meshes.expected()
  known, often = meshes.compiled(runner), runner.rebalancer.rebalances
  assert often > 5
  model_engine, tokens = meshes.traffic(runner)
  assert tokens == meshes.expected()
  assert runner.rebalancer.rebalances > often
  assert meshes.compiled(runner) == known
  model = engine_thread.EngineThread(model_engine, 1)
  values = metrics.Telemetry(model, 'tiny').text().decode()
  model.close()
  lines = dict(line.split() for line in values.splitlines() if line[0] != '#')
  value = lambda name: float(lines[f'dsv3_{name}{{model_name="tiny"}}'])
  assert value('rebalanced_total') == runner.rebalancer.rebalances
  assert 0.25 < value('expert_balancedness') <= 1
  assert 'num_gpu_blocks="28"' in values


def check_slots(slots, values, experts):
  """Of a stack of layers, or of one layer."""
  layers = lambda x: np.asarray(x).reshape(-1, *x.shape[-2:])
  slots_LEr = layers(values['moe']['slots'])
  count_LE = np.asarray(values['moe']['count']).reshape(len(slots_LEr), -1)
  for at, count in np.ndenumerate(count_LE):
    assert count >= 1
    for slot in slots_LEr[at][:count]:
      for key in ('w_gate', 'w_up', 'w_down'):
        shape = lambda x: (len(slots_LEr), -1, *x.shape[-2:])
        got, want = (x['moe'][key] for x in (slots, experts))
        got, want = (np.asarray(x).reshape(shape(x)) for x in (got, want))
        np.testing.assert_array_equal(got[at[0], slot], want[at])
  assert np.all(np.sum(count_LE, axis=1) == slots_LEr.shape[2] + 7)


@pytest.mark.parametrize('scanned', [True, False])
def test_each_slot_has_the_weights_of_its_expert(scanned):
  cfg = settings.small(
    **meshes.CHANGES | {'model__num_layers': 3}, model__scan_layers=scanned
  )
  params, _ = meshes.weights(cfg)
  mesh = inference_mesh.make_mesh(node=2, expert=2, model=2)
  place = inference_mesh.InferenceMesh(cfg, mesh)
  on_mesh = place.place(params, place.params)
  redundancy = redundant_experts.RedundancyConfig(redundant=4)
  runner = redundant_experts.ExpertRebalancer(cfg, place, redundancy, on_mesh)
  rng = np.random.default_rng(0)
  for _ in range(3):
    stack = runner.variables['params']['moe_layers']
    values = runner.variables['redundant_slots']['moe_layers']
    for name in stack:
      check_slots(stack[name], values[name], params['moe_layers'][name])
    load_PLE = rng.integers(0, 99, runner.load_PLE.shape)
    runner.record_step(jnp.float32(load_PLE))
    runner.rebalance()
  np.testing.assert_array_equal(  # the model's own are as they were
    on_mesh['embed']['w'], params['embed']['w']
  )


@pytest.mark.parametrize(
  ('changes', 'options', 'message'),
  [
    ({}, {'redundant': 3}, r'redundant_experts=3 .* = 4 slots: 0 or 4'),
    ({}, {'redundant': -4}, r'redundant_experts=-4 must be >= 0'),
    ({}, {'redundant': 0, 'every': -1}, r'rebalance_every=-1 must be >= 0'),
    (
      {'model__num_dense_layers': 2},
      {'redundant': 4},
      r'needs MoE layers, but model.num_dense_layers=2',
    ),
  ],
)
def test_what_cannot_be_spread_is_refused(changes, options, message):
  cfg = settings.small(**meshes.CHANGES | changes)
  place = inference_mesh.InferenceMesh(cfg, inference_mesh.make_mesh(expert=4))
  with pytest.raises(errors.InputError, match=message):
    redundant_experts.check(
      cfg.model, place, redundant_experts.RedundancyConfig(**options)
    )
