"""One small model on many meshes: passes through its cache, and traffic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.inference import engine, model_runner
from dsv3_jax.inference import mesh as inference_mesh
from dsv3_jax.inference import request as requests
from dsv3_jax.nn import model
from tests import settings
from tests.nn import models

CHANGES = {
  'precision': 'f32',
  'model__max_seq_len': 400,
  'model__rope__original_seq_len': 400,
  'model__num_layers': 2,
  'model__moe__d_ff': 8,
}
CONFIG = settings.small(**CHANGES)
ROWS, LENGTH = 8, 12


@functools.cache
def weights(cfg=CONFIG):
  """Parameters and router biases; what is seen decides."""
  params, router_biases = map(models.f32, models.random_params(cfg))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    scale = {'w_uk': 4.0, 'w_o': 20.0}.get(path[-1].key, 1.0)
    node = params
    for key in path[:-1]:
      node = node[key.key]
    node[path[-1].key] = leaf * scale
  return params, router_biases


class Passes:
  """Logits of all tokens of rows in one pass, and of one token more."""

  def __init__(self, mesh, has_redundant=False, cfg=CONFIG):
    self.cfg, self.place = cfg, inference_mesh.InferenceMesh(cfg, mesh)
    specs, rows = {'params': self.place.params}, inference_mesh.ROWS
    if has_redundant:
      specs['redundant_slots'] = inference_mesh.REPLICATED
    taken = (
      specs,
      inference_mesh.REPLICATED,
      rows,
      rows,
      inference_mesh.BLOCKS,
    )
    self.run = self.place.jit(self._run, taken, (rows, rows))

  def _run(self, variables, router_biases, tokens_BT, table_Bb, caches):
    naive = model.build(self.cfg)
    absorbed = model.build(self.cfg, absorbed=True)
    logits, load_LE = [], 0
    for net, start, end in ((naive, 0, LENGTH), (absorbed, LENGTH, None)):
      part_BT = tokens_BT[:, start:end]
      at_Bt = jnp.zeros_like(part_BT) + jnp.arange(part_BT.shape[1])
      args = (part_BT, start + at_Bt, at_Bt, table_Bb, router_biases, caches)
      outputs = net.apply(variables, *args, method='forward_cached')
      logits.append(outputs[0])
      caches, load_LE = outputs[2], load_LE + outputs[3]
    return jnp.concatenate(logits, axis=1), load_LE[None]

  def __call__(self, variables, router_biases):
    """Logits, and how many tokens each expert got, by rank."""
    rng, ranks = np.random.default_rng(1), self.place.num_ranks
    vocab = self.cfg.model.vocab_size
    tokens_BT = rng.integers(0, vocab, (ROWS, LENGTH + 1)).astype(np.int32)
    table_Bb = np.tile(np.arange(ROWS // ranks)[:, None], (ranks, 1))
    args = (self.cfg.model, ROWS, engine.BLOCK_SIZE, jnp.float32)
    options = {'drafting': False, 'fp8': False}
    make = functools.partial(model_runner.empty_caches, *args, **options)
    caches = self.place.zeros(make, inference_mesh.BLOCKS)
    tokens = (tokens_BT, table_Bb.astype(np.int32))
    logits_BTV, load_PLE = self.run(variables, router_biases, *tokens, caches)
    return np.asarray(logits_BTV), load_PLE


def prompt(seed, size):
  rng = np.random.default_rng(seed)
  return rng.integers(0, CONFIG.model.vocab_size, size).tolist()


def _draw(seed):
  return requests.SamplingParams(temperature=1.0, top_p=0.9, seed=seed)


# A prompt; how many tokens; how they are drawn.
REQUESTS = [
  (prompt(1, 5), 20, requests.GREEDY),
  (prompt(2, 130), 9, _draw(3)),
  (prompt(3, 1), 30, _draw(4)),
  (prompt(4, 64), 5, requests.GREEDY),
  (prompt(2, 130)[:100] + [1, 2], 4, requests.GREEDY),
  (prompt(5, 62), 70, _draw(5)),
  (prompt(6, 30), 40, requests.GREEDY),
  (prompt(4, 64), 5, requests.GREEDY),
]


def traffic(runner, **options):
  """Requests that come at different times: the engine, and their tokens."""
  options = {'num_blocks': 7, 'max_rows': 2, 'min_rows': 2} | options
  # One size of a prefill and of block tables: fewer programs to compile.
  model_engine = engine.Engine(runner, **options, chunk=64, min_blocks=4)
  submitted = []
  for case in REQUESTS:
    submitted.append(model_engine.submit(*case))
    model_engine.step()
  for _ in range(1000):
    if model_engine.is_idle:
      break
    model_engine.step()
  assert all(request.done for request in submitted)
  assert model_engine.stats().blocks_in_use == 0
  return model_engine, [request.tokens for request in submitted]


@functools.cache
def expected():
  """Of one device, as many rows and blocks as two ranks have."""
  runner = model_runner.ModelRunner(CONFIG, *weights())
  return traffic(runner, num_blocks=14, max_rows=4, min_rows=4)[1]


def compiled(runner):
  """How many programs each kind of step has become."""
  functions = (runner._prefill, runner._extend, runner._decode, runner._copy)
  return [function._cache_size() for function in functions]
