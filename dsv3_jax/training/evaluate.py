"""Evaluators: name -> fn(Evaluation) -> numbers, with units in the key."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.data import corpus as corpora
from dsv3_jax.data import loader
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import processes, sharding
from dsv3_jax.nn import model
from dsv3_jax.parallel import zero
from dsv3_jax.training import baselines, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """What an evaluator reads: weights, and the data of the experiment."""

  cfg: config.Config
  params: dict
  router_biases: model.RouterBiases
  corpus: corpora.Corpus
  tokenizer: tokenizers.Tokenizer
  windows: dict  # of `open_windows`
  mesh: jax.sharding.Mesh | None = None  # where the weights are
  beat: Callable[[], None] = lambda: None  # called often, for the watchdog


def heldout(e: Evaluation) -> dict[str, float]:
  """Loss and bits per byte of held-out documents.

  Each document is read in windows of `data.seq_len` tokens that advance by
  `eval.stride`; a token is scored once, by the window that sees most before it.
  """
  windows = e.windows
  nats, tokens = score(
    e.cfg, e.params, e.router_biases, windows, e.beat, e.mesh
  )
  return {
    'loss_nats_per_token': nats / tokens,
    'bits_per_byte': metrics.bits_per_byte(nats, windows['num_bytes']),
    'scored_tokens': tokens,
    'scored_bytes': windows['num_bytes'],
  }


def compare(e: Evaluation) -> dict[str, float]:
  """Bits per byte of unigram, bigram (Witten-Bell), zlib and xz, same bytes."""
  windows = e.windows
  counts = baselines.NgramCounts(e.tokenizer.vocab_size)
  encode = functools.partial(e.tokenizer.encode, add_bos=True)
  for i in range(len(e.corpus.train)):
    counts.add(encode(corpora.document_text(e.corpus.train[i])))
    e.beat()
  bits = counts.bits(map(encode, windows['texts']))
  bits |= baselines.compressed_bits(windows['texts'])
  return {
    f'{name}_bits_per_byte': value / windows['num_bytes']
    for name, value in bits.items()
  }


EVALUATORS = {'heldout': heldout, 'baselines': compare}


def open_windows(
  cfg: config.Config, corpus: corpora.Corpus, tokenizer: tokenizers.Tokenizer
) -> dict:
  """The held-out text of an experiment, in windows for `heldout`.

  Raises:
    InputError: there is none.
  """
  max_bytes, stride = cfg.eval.max_bytes, cfg.eval.stride
  return loader.eval_windows(
    corpus.valid, tokenizer, cfg.data, max_bytes, stride
  )


def score(
  cfg: config.Config,
  params: dict,
  router_biases: model.RouterBiases,
  windows: dict,
  beat: Callable[[], None] = lambda: None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[float, int]:
  """Sum of the scored tokens' losses [nats], and their number.

  Args:
    mesh: where parameters are, placed as in training; None is one device.
  """
  count, size = len(windows['tokens_BT']), cfg.eval.batch_size
  fields = {name: windows[name] for name in model.Batch._fields}
  losses = _token_losses(cfg, mesh)
  nats, tokens = 0.0, 0
  for start in range(0, count, size):
    rows = {k: _fill(v[start : start + size], size) for k, v in fields.items()}
    batch = model.Batch(**rows)
    losses_BT = np.asarray(losses(params, router_biases, batch), np.float64)
    nats += float(np.sum(losses_BT * batch.weights_BT))
    tokens += int(np.sum(batch.weights_BT))
    beat()
  return nats, tokens


@functools.lru_cache(maxsize=4)
def _token_losses(cfg: config.Config, mesh: jax.sharding.Mesh | None):
  """The compiled evaluation step of an experiment."""
  net = model.build(cfg)

  def losses(params, router_biases, batch):
    return net.apply(
      {'params': params}, batch, router_biases, method='token_losses'
    )

  if mesh is None:
    return jax.jit(losses)
  # Gathered layer by layer: the weights of all layers would not fit.
  rules = dataclasses.replace(sharding.RULES, fsdp=sharding.TOKEN_AXES)
  placed = zero.model_placements(net, mesh.shape, rules)
  rows = sharding.to_spec(('batch', None), sharding.RULES, 2)
  spread = sharding.shard_map_step(
    lambda masters, *rest: losses(zero.gather(masters, placed), *rest),
    mesh,
    rules,
    in_specs=(zero.masters(placed), sharding.Spec(), rows),
    out_specs=rows,
  )
  # Replicated: each process reads it.
  replicated = jax.sharding.NamedSharding(mesh, sharding.Spec())
  return processes.compile_then_barrier(
    jax.jit(spread, out_shardings=replicated)
  )


def _fill(rows: np.ndarray, size: int) -> np.ndarray:
  """Pads the last batch with rows of zeros, which nothing scores."""
  missing = [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
  return np.pad(rows, missing)
