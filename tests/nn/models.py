"""Random parameters and batches for tiny models, and compiled functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.nn import model
from dsv3_jax.ops import mtp_loss

MTP_WEIGHT = 0.7  # lambda; large, so that MTP counts in every gradient


def random_params(cfg, seed=0):
  """Parameters and router biases in float64, norm weights random too.

  At ones and zeros a test would not notice their absence.
  """
  rng = np.random.default_rng(seed)
  net = model.build(cfg)
  shapes = model.param_shapes(net)

  def draw(path, leaf):
    centre = 1.0 if 'norm' in path[-1].key else 0.0
    return centre + rng.normal(0.0, 0.25, leaf.shape)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  biases = model.init_router_biases(cfg.model)
  router_biases = jax.tree.map(lambda b: rng.normal(0.0, 0.2, b.shape), biases)
  return params, router_biases


def make_batch(cfg, samples, seed=1):
  """A batch of rows, each given by the lengths of its samples.

  Returns:
    The batch, and tokens, positions and segments of whole rows [B, T + 1].
    What is left of a row of T + 1 tokens is padding.
  """
  rng, length = np.random.default_rng(seed), cfg.data.seq_len
  shape = (len(samples), length + 1)
  tokens_BZ = rng.integers(1, cfg.model.vocab_size, shape)
  segments_BZ = np.zeros(shape, np.int64)
  positions_BZ = np.tile(np.arange(length + 1), (len(samples), 1))
  for b, lengths in enumerate(samples):
    start = 0
    for number, size in enumerate(lengths, start=1):
      segments_BZ[b, start : start + size] = number
      if cfg.data.isolate_samples:
        positions_BZ[b, start : start + size] = np.arange(size)
      start += size
    assert start <= length + 1
  counts = segments_BZ[:, 1:] > 0
  if cfg.data.isolate_samples:
    counts &= segments_BZ[:, 1:] == segments_BZ[:, :-1]
  ints = lambda x: jnp.asarray(x, jnp.int32)
  batch = model.Batch(
    tokens_BT=ints(tokens_BZ[:, :-1]),
    targets_BT=ints(tokens_BZ[:, 1:]),
    positions_BT=ints(positions_BZ[:, :-1]),
    segments_BT=ints(segments_BZ[:, :-1]),
    weights_BT=jnp.float32(counts),
  )
  return batch, (tokens_BZ, positions_BZ, segments_BZ)


def scales_of(cfg, weights, segments):
  """Scales of a step whose micro-batches are all given."""
  args = (cfg.model.mtp, weights, segments, cfg.data.isolate_samples)
  return mtp_loss.loss_scales(*args) | {'mtp_weight': jnp.float32(MTP_WEIGHT)}


@functools.cache
def forward_and_loss(cfg):
  """jit: (params, router, batch, scales) -> logits, MTP's, total, parts."""
  net = model.build(cfg)

  def run(params, router_biases, batch, scales):
    variables = {'params': params}
    logits = net.apply(variables, batch, router_biases)
    return *logits, *net.apply(
      variables, batch, router_biases, scales, method='loss'
    )

  return jax.jit(run)


@functools.cache
def loss_and_grads(cfg):
  """jit: (params, router, batch, scales) -> (total, parts), gradients."""
  return jax.jit(plain_loss_and_grads(cfg))


def plain_loss_and_grads(cfg):
  """The same, in the precision of training, not yet compiled."""
  net = model.build(cfg, training=True)

  def run(params, router_biases, batch, scales):
    quantized = model.quantize(net.policy, params)

    def loss(params):
      args = (batch, router_biases, scales)
      return net.apply({'params': params} | quantized, *args, method='loss')

    return jax.value_and_grad(loss, has_aux=True)(params)

  return run


@functools.cache
def logits(cfg):
  """jit: (params, router, batch) -> main logits, list of MTP logits."""
  net = model.build(cfg)
  run = lambda params, router_biases, batch: net.apply(
    {'params': params}, batch, router_biases
  )
  return jax.jit(run)


def f32(tree):
  return jax.tree.map(jnp.float32, tree)
