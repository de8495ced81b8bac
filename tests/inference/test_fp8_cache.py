"""The engine with latents in FP8: what it keeps, and what does not change."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from dsv3_jax.inference import block_pool, engine, model_runner
from dsv3_jax.inference import mesh as inference_mesh
from dsv3_jax.inference import request as requests
from pallas_kernels import quantized
from tests import settings
from tests.nn import models

ROOM = 200
CONFIG = settings.small(
  precision='f32',
  model__max_seq_len=ROOM,
  model__rope__original_seq_len=ROOM,
  model__num_layers=2,
  model__mla__kv_lora_rank=160,  # two scales a token
)


def prompt(seed, size):
  rng = np.random.default_rng(seed)
  return rng.integers(0, CONFIG.model.vocab_size, size).tolist()


# Two begin alike, over a whole block.
PROMPTS = [prompt(0, 120), prompt(1, 50), prompt(0, 120)[:70] + prompt(2, 5)]


@pytest.fixture(scope='module')
def weights():
  """Of a model whose tokens depend much on what its attention reads."""
  params, router_biases = models.random_params(CONFIG)
  factors = {'w_uq': 4.0, 'w_uk': 6.0, 'w_uv': 6.0, 'w_o': 6.0, 'w': 4.0}
  louder = lambda path, w: w * factors.get(path[-1].key, 1.0)
  params = jax.tree_util.tree_map_with_path(louder, params)
  return models.f32(params), models.f32(router_biases)


@pytest.fixture(
  scope='module',
  params=[0, pytest.param(1, marks=pytest.mark.nightly)],
  ids=['plain', 'speculative'],
)
def runner(request, weights):
  return model_runner.ModelRunner(
    CONFIG, *weights, request.param, fp8_cache=True
  )


def traffic(runner, prompts, num_blocks=5, min_rows=4):
  """Tokens of each request, and the engine when all are done."""
  # One size of a prefill and of block tables: fewer programs to compile.
  options = {'max_rows': 4, 'min_rows': min_rows, 'chunk': 64, 'min_blocks': 4}
  model_engine = engine.Engine(runner, num_blocks=num_blocks, **options)
  draw = requests.SamplingParams(temperature=1.0, seed=5)
  submitted = [model_engine.submit(one, 40, draw) for one in prompts]
  while not model_engine.is_idle:
    model_engine.step()
  assert model_engine.stats().blocks_in_use == 0
  return [request.tokens for request in submitted], model_engine


@pytest.fixture(scope='module')
def alone(weights):
  """Without speculative tokens."""
  plain = model_runner.ModelRunner(CONFIG, *weights, fp8_cache=True)
  return one_by_one(plain)


def one_by_one(runner):
  return [traffic(runner, [one], min_rows=1)[0][0] for one in PROMPTS]


def test_batches_chunks_and_speculation_change_no_token(runner, alone):
  """Nor does it that there are too few blocks, and one is preempted."""
  tokens, model_engine = traffic(runner, PROMPTS)
  assert tokens == alone and model_engine.stats().preempted > 0
  caches = model_engine._caches
  assert isinstance(caches.moe.c_LpsC, quantized.Quantized)
  assert caches.moe.c_LpsC.scales.shape[-1] == 2
  assert (caches.mtp is not None) == (runner.num_speculative_tokens > 0)
  assert all(np.any(np.float32(x)) for x in jax.tree.leaves(caches))


@pytest.mark.nightly
@pytest.mark.parametrize('num_blocks', [4, 12])
def test_any_number_of_blocks_gives_the_same_tokens(runner, alone, num_blocks):
  tokens, model_engine = traffic(runner, PROMPTS, num_blocks)
  assert tokens == alone
  assert (model_engine.stats().preempted > 0) == (num_blocks == 4)


@pytest.mark.nightly
def test_other_roundings_give_other_tokens(weights, alone):
  exact = model_runner.ModelRunner(CONFIG, *weights)
  assert all(a != b for a, b in zip(one_by_one(exact), alone, strict=True))


@pytest.mark.nightly
def test_a_mesh_keeps_the_same(weights, alone):
  mesh = inference_mesh.make_mesh(data=2, expert=2)
  runner = model_runner.ModelRunner(CONFIG, *weights, mesh=mesh, fp8_cache=True)
  tokens, model_engine = traffic(runner, PROMPTS)
  assert tokens == alone
  latents = model_engine._caches.moe.c_LpsC
  assert isinstance(latents, quantized.Quantized)
  for leaf in jax.tree.leaves(latents):
    assert leaf.shape[1] == 4 * 5  # blocks of four ranks
    assert leaf.addressable_shards[0].data.shape[1] == 5
  caches = runner.copy_blocks(
    [block_pool.BlockCopy(1, 2)], model_engine._caches
  )
  assert isinstance(caches.moe.c_LpsC, quantized.Quantized)


@pytest.mark.parametrize(
  ('precision', 'fp8', 'kind'),
  [
    *(('bf16', True, kind) for kind in ('prefill', 'decode', 'copy')),
    pytest.param('bf16', True, 'extend', marks=pytest.mark.nightly),
    *(
      pytest.param(*case, kind, marks=pytest.mark.nightly)
      for case in [('f32', True), ('bf16', False)]
      for kind in ['prefill', 'extend', 'decode', 'copy']
    ),
  ],
)
def test_a_step_widens_no_whole_cache(weights, kind, precision, fp8):
  cfg = dataclasses.replace(CONFIG, precision=precision)
  runner = model_runner.ModelRunner(cfg, *weights, fp8_cache=fp8)
  model_engine = engine.Engine(runner, num_blocks=50, max_rows=2)
  width = 1 if kind == 'decode' else 64
  (rows, draws), caches = model_engine._empty(2, width, 2), model_engine._caches
  args = (runner.variables, runner.router_biases, rows, caches, draws, None)
  if kind == 'copy':
    args = (np.array([0], np.int32), np.array([1], np.int32), caches)
  lowered = getattr(runner, f'_{kind}').lower(*args)
  text = lowered.compile().as_text()
  shapes = re.findall(r'\b(?:f16|f32)\[([\d,]+)\]', text)
  sizes = [math.prod(map(int, dims.split(','))) for dims in shapes]
  assert max(sizes, default=0) < math.prod(caches.moe.c_LpsC.shape)
