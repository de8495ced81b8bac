"""One optimizer step as a pure function, compiled once (TR 4.2).

State is a plain dict of arrays: `params` (f32 master weights), `opt` (AdamW
moments), `router` (biases), `guard` (what decides whether a step counts).
Gradients of the micro-batches add up in f32; how many of them are used is data,
so the batch ramp does not compile anew. The routers' biases move once a step,
on the load of all micro-batches and all devices. A non-finite or, if asked, a
spiking loss leaves the whole state untouched; after a non-finite one nothing is
touched any more, so that a host that reads metrics late loses nothing. After
five spikes in a row the loss has moved for good: its statistics begin anew.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax import config, optim, sharding
from dsv3_jax.nn import model
from dsv3_jax.ops import routing

State = dict
Hyper = dict[str, float]

_SPIKE_MEMORY = 0.98  # per step, of the loss' running mean and variance
_SPIKE_WARMUP = 50  # steps before a spike can be called one
_SPIKE_PATIENCE = 5  # skipped in a row; then the loss has moved for good


def init_state(cfg: config.Config, key: jax.Array) -> State:
  """Fresh parameters, zero moments and biases (traceable)."""
  params = model.init_params(model.build(cfg), key)
  zero = jnp.zeros((), jnp.float32)
  return {
    'params': params,
    'opt': optim.adamw(cfg.optim).init(params),
    'router': model.init_router(cfg.model),
    'guard': {
      'mean': zero,
      'variance': zero,
      'count': jnp.zeros((), jnp.int32),
      'skips': jnp.zeros((), jnp.int32),
      'halted': jnp.zeros((), jnp.bool_),
    },
  }


def state_shardings(cfg: config.Config, mesh: jax.sharding.Mesh) -> State:
  """Where each array of the state lives; all are replicated over the batch."""
  state = jax.eval_shape(lambda: init_state(cfg, jax.random.key(0)))
  specs = model.param_specs(model.build(cfg))
  place = functools.partial(jax.sharding.NamedSharding, mesh)
  whole = place(jax.sharding.PartitionSpec())
  shardings = jax.tree.map(lambda _: whole, state)
  return shardings | {'params': jax.tree.map(place, specs)}


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Of [micro-batch, B, T] arrays: rows are cut over the batch axes."""
  spec = sharding.to_spec((None, 'batch', 'sequence'), sharding.RULES, 3)
  return jax.sharding.NamedSharding(mesh, spec)


def make_train_step(
  cfg: config.Config,
) -> Callable[[State, model.Batch, jax.Array, Hyper], tuple[State, dict]]:
  """Returns `step(state, batch_nBT, num_micro, hyper) -> (state, metrics)`.

  `batch_nBT` holds up to n micro-batches of which `num_micro` count; the rest
  is padding. `hyper` holds this step's 'lr', 'mtp_weight' and 'bias_rate'.
  """
  net = model.build(cfg, training=True)
  optimizer = optim.adamw(cfg.optim)

  def step(state, batch_nBT, num_micro, hyper):
    grads, parts = _accumulate(cfg, net, state, batch_nBT, num_micro, hyper)
    with jax.named_scope('optimizer'):
      grads, norm = _clip(grads, cfg.optim.clip_norm)
      finite = jnp.isfinite(parts['total']) & jnp.isfinite(norm)
      guard = state['guard']
      spike = _is_spike(guard, parts['loss'], cfg.train.spike_sigmas)
      moved = spike & (guard['skips'] >= _SPIKE_PATIENCE)
      fresh = guard | {'count': jnp.where(moved, 0, guard['count'])}
      skip = spike & ~moved
      halted = guard['halted'] | ~finite
      new = jax.lax.cond(
        ~skip & ~halted,
        lambda: _advance(
          optimizer, state | {'guard': fresh}, grads, parts, hyper
        ),
        lambda: state,
      )
      skips = jnp.where(skip, guard['skips'] + 1, 0)
      new = new | {'guard': new['guard'] | {'skips': skips, 'halted': halted}}
    load_LE = jnp.concatenate([parts.pop('load'), parts.pop('mtp_load')])
    told = parts | {'skipped': skip.astype(jnp.int32), 'halted': halted}
    told |= {'grad_norm': norm}
    return new, told | {'max_violation': routing.max_violation(load_LE)}

  return step


def _accumulate(cfg, net, state, batch_nBT, num_micro, hyper):
  """Sums gradients and loss parts of the micro-batches in use."""
  used = jnp.arange(batch_nBT.weights_BT.shape[0]) < num_micro
  weights = batch_nBT.weights_BT * used[:, None, None]
  segments = batch_nBT.segments_BT * used[:, None, None]
  scales = model.loss_scales(
    cfg.model.mtp, weights, segments, cfg.data.isolate_samples
  )
  scales['mtp_weight'] = hyper['mtp_weight']

  # Once a step: the micro-batches share the FP8 forms of the weights.
  quantized = model.quantize(net.policy, state['params'])

  def loss(params, batch):
    variables = {'params': params} | quantized
    total, parts = net.apply(
      variables, batch, state['router'], scales, method='loss'
    )
    return total, parts | {'total': total}

  grad = jax.grad(loss, has_aux=True)
  micro = lambda i: jax.tree.map(lambda x: x[i], batch_nBT)
  if batch_nBT.weights_BT.shape[0] == 1:
    return grad(state['params'], micro(0))
  shapes = jax.eval_shape(grad, state['params'], micro(0))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  add = lambda i, sums: jax.tree.map(
    jnp.add, sums, grad(state['params'], micro(i))
  )
  return jax.lax.fori_loop(0, num_micro, add, zeros)


def _clip(grads, limit):
  """Scales the gradient to a global norm of at most `limit` (TR 4.2)."""
  norm = optax.tree.norm(grads)
  scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda g: g * scale, grads), norm


def _is_spike(guard, loss, sigmas):
  """True if the loss lies far above its running mean."""
  if not sigmas:
    return jnp.zeros((), jnp.bool_)
  limit = guard['mean'] + sigmas * jnp.sqrt(guard['variance'])
  return (guard['count'] >= _SPIKE_WARMUP) & (loss > limit)


def _advance(optimizer, state, grads, parts, hyper):
  """AdamW, router biases, and the loss' running statistics."""
  params, opt = optimizer.update(
    grads, state['opt'], state['params'], hyper['lr']
  )
  loads = {'moe': parts['load'], 'mtp': parts['mtp_load']}
  loads = {name: loads[name] for name in state['router']}
  move = lambda b, load: routing.update_bias(b, load, hyper['bias_rate'])
  guard = state['guard']
  # The first steps count in full, so that the mean does not start at 0.
  memory = jnp.minimum(_SPIKE_MEMORY, guard['count'] / (guard['count'] + 1.0))
  delta = parts['loss'] - guard['mean']
  return {
    'params': params,
    'opt': opt,
    'router': jax.tree.map(move, state['router'], loads),
    'guard': {
      'mean': guard['mean'] + (1.0 - memory) * delta,
      'variance': memory * (guard['variance'] + (1.0 - memory) * delta**2),
      'count': guard['count'] + 1,
      'skips': guard['skips'],
      'halted': guard['halted'],
    },
  }


def same_bits(a: Any, b: Any) -> jax.Array:
  """True if two trees of arrays agree in every bit, NaNs included."""

  def equal(x, y):
    if jnp.issubdtype(x.dtype, jnp.floating):
      word = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
      x, y = (jax.lax.bitcast_convert_type(z, word) for z in (x, y))
    return jnp.all(x == y)

  leaves = jax.tree.leaves(jax.tree.map(equal, a, b))
  return functools.reduce(jnp.logical_and, leaves)
