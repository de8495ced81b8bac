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

from dsv3_jax import config
from dsv3_jax.distributed import collectives, processes, sharding
from dsv3_jax.nn import model
from dsv3_jax.ops import mtp_loss, routing
from dsv3_jax.parallel import deterministic, state_layout, zero
from dsv3_jax.parallel.pipeline import executor
from dsv3_jax.training import optimizer as optim

Spec = sharding.Spec
State = dict
Hyper = dict[str, float]

# Whole rows: a token's integers are few, and each looks at its neighbours.
_BATCH = sharding.to_spec((None, 'batch', None), sharding.RULES, 3)
# All-to-alls travel while products run: `benchmarks/results/overlap_h100.md`.
_COMPILER_OPTIONS = {'gpu': {'xla_gpu_enable_latency_hiding_scheduler': True}}
_SPIKE_MEMORY = 0.98  # per step, of the loss' running mean and variance
_SPIKE_WARMUP = 50  # steps before a spike can be called one
_SPIKE_PATIENCE = 5  # skipped in a row; then the loss has moved for good


def init_state(cfg: config.Config, key: jax.Array) -> State:
  """Fresh parameters, zero moments and biases (traceable)."""
  return _started(cfg, model.init_params(model.build(cfg), key))


def state_shapes(cfg: config.Config) -> State:
  """What `init_state` would give, as `jax.ShapeDtypeStruct`s."""
  started = functools.partial(_started, cfg)
  return jax.eval_shape(started, model.param_shapes(model.build(cfg)))


def _started(cfg, params):
  """The state of a run that begins with these parameters."""
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


class Trainer:
  """A step of an experiment on a mesh, and where everything is.

  step: `(state, batch_nBT, amount, hyper) -> (state, metrics)`, to be compiled.
  `batch_nBT` holds up to n micro-batches, of which `amount`, made by
  `Plan.amount`, says how many count; the rest is padding. `hyper` holds this
  step's 'lr', 'mtp_weight' and 'bias_rate'.
  """

  def __init__(self, cfg: config.Config, mesh: jax.sharding.Mesh):
    self.cfg, self.mesh = cfg, mesh
    # Where there are no stages, ranks take more of the batch.
    self.model_mesh = sharding.without_pipe(mesh)
    self.plan = state_layout.make(cfg, mesh.shape)
    self.step = sharding.shard_map_step(
      functools.partial(_step, cfg, self.plan),
      mesh,
      self.plan.rules,
      in_specs=(self.specs(), _BATCH, self.plan.amount_specs(), Spec()),
      out_specs=(self.specs(), Spec()),
    )

  def jit(self, **how) -> Callable:
    """`step` as it is to be compiled; `how` as of `jax.jit`."""
    platform = self.mesh.devices.flat[0].platform
    options = dict(_COMPILER_OPTIONS.get(platform, {}))
    if self.cfg.parallel.deterministic:
      options |= deterministic.COMPILER_OPTIONS
    step = jax.jit(self.step, compiler_options=options, **how)
    return processes.compile_then_barrier(step)

  def specs(self) -> State:
    """How each array of the state is cut: masters and moments exist once."""
    specs = jax.tree.map(lambda _: Spec(), state_shapes(self.cfg))
    masters = zero.masters(self.plan.placed)
    opt = specs['opt']._replace(mean=masters, square=masters)
    router = self.plan.router_specs()
    return specs | {'params': masters, 'opt': opt, 'router': router}

  def shardings(self) -> State:
    """Where each array of the state lives."""
    return sharding.named_shardings(self.specs(), self.mesh)

  def model_shardings(self) -> State:
    """Where each array of a state in the model's form lives, cut as much."""
    if self.plan.pipe is None:
      return self.shardings()
    specs = jax.tree.map(lambda _: Spec(), state_shapes(self.cfg))
    net = model.build(self.cfg)
    placed = zero.model_placements(net, self.model_mesh.shape)
    masters = zero.masters(placed)
    opt = specs['opt']._replace(mean=masters, square=masters)
    specs |= {'params': masters, 'opt': opt}
    return sharding.named_shardings(specs, self.model_mesh)

  def batch_sharding(self) -> jax.sharding.NamedSharding:
    """Of [micro-batch, B, T] arrays: rows are cut over the batch axes."""
    return sharding.named_shardings(_BATCH, self.mesh)

  def init(self, key: jax.Array) -> State:
    """A fresh state."""
    init = lambda key: self._from_model(init_state(self.cfg, key))
    return _jit(init, self.shardings())(key)

  def from_model(self, state: State) -> State:
    """A state in the model's form as this trainer needs it."""
    if self.plan.pipe is None:
      return state
    return self._from_model_jit(state)

  def to_model(self, state: State) -> State:
    """The state in the model's form: for checkpoints, evaluation, export."""
    if self.plan.pipe is None:
      return state
    return self._to_model_jit(state)

  def params_from_model(self, params: Any) -> Any:
    """The parameters alone, or their average, as this trainer needs them."""
    if self.plan.pipe is None or not params:
      return params
    return self._params_from_model_jit(params)

  def params_to_model(self, params: Any) -> Any:
    """The parameters alone, or their average, in the model's form."""
    if self.plan.pipe is None or not params:
      return params
    return self._params_to_model_jit(params)

  # Compiled once: a save and an evaluation come again and again.
  @functools.cached_property
  def _from_model_jit(self) -> Callable:
    return _jit(self._from_model, self.shardings())

  @functools.cached_property
  def _to_model_jit(self) -> Callable:
    convert = functools.partial(_convert, self.plan.to_model)
    return _jit(convert, self.model_shardings())

  @functools.cached_property
  def _params_from_model_jit(self) -> Callable:
    convert = lambda params: self.plan.from_model(params, {})[0]
    return _jit(convert, self.shardings()['params'])

  @functools.cached_property
  def _params_to_model_jit(self) -> Callable:
    convert = lambda params: self.plan.to_model(params, {})[0]
    return _jit(convert, self.model_shardings()['params'])

  def _from_model(self, state: State) -> State:
    return _convert(self.plan.from_model, state)


def _jit(function: Callable, shardings: Any) -> Callable:
  return processes.compile_then_barrier(
    jax.jit(function, out_shardings=shardings)
  )


def _convert(change: Callable, state: State) -> State:
  """Changes the form of parameters, moments and biases."""
  opt = state['opt']
  params, router = change(state['params'], state['router'])
  mean, _ = change(opt.mean, state['router'])
  square, _ = change(opt.square, state['router'])
  opt = opt._replace(mean=mean, square=square)
  return state | {'params': params, 'router': router, 'opt': opt}


def make_train_step(
  cfg: config.Config,
) -> Callable[[State, model.Batch, jax.Array, Hyper], tuple[State, dict]]:
  """`Trainer.step` on one device without a mesh; `amount` is an int32."""
  sizes = dict.fromkeys(sharding.AXES, 1)
  return functools.partial(_step, cfg, state_layout.make(cfg, sizes))


def _step(cfg, plan, state, batch_nBT, amount, hyper):
  """Gradients, clipping, AdamW and biases, on each device."""
  with jax.named_scope('gather_weights'):
    params = zero.gather(state['params'], plan.placed)
  scales = _scales(cfg, plan, batch_nBT, amount, hyper)
  args = (params, state['router'], batch_nBT, scales, amount)
  grads, norm, parts = _gradients(cfg, plan, *args)
  with jax.named_scope('optimizer'):
    norm, parts, finite = _agreed(norm, parts)
    grads = _clip(grads, norm, cfg.optim.clip_norm)
    guard = state['guard']
    spike = _is_spike(guard, parts['loss'], cfg.train.spike_sigmas)
    moved = spike & (guard['skips'] >= _SPIKE_PATIENCE)
    fresh = guard | {'count': jnp.where(moved, 0, guard['count'])}
    skip = spike & ~moved
    halted = guard['halted'] | ~finite
    optimizer = optim.adamw(cfg.optim)
    new = jax.lax.cond(
      ~skip & ~halted,
      lambda: _advance(
        optimizer, state | {'guard': fresh}, grads, parts, hyper
      ),
      lambda: state,
    )
    skips = jnp.where(skip, guard['skips'] + 1, 0)
    new = new | {'guard': new['guard'] | {'skips': skips, 'halted': halted}}
  told = {k: v for k, v in parts.items() if 'load' not in k}
  told |= {'skipped': skip.astype(jnp.int32), 'halted': halted}
  told |= {'grad_norm': norm, 'max_violation': _violation(plan, parts)}
  return new, told


def _gradients(cfg, plan, *args):
  """Gradients of masters, their norm, and loss parts, of all devices."""
  if cfg.parallel.deterministic:
    grads, parts = _accumulate_in_order(cfg, *args)
    norm = deterministic.norm(grads)
    return zero.shard(grads, plan.placed), norm, parts
  if plan.pipe is None:
    grads, parts = _accumulate(cfg, *args)
  else:
    grads, parts = executor.gradients(plan.pipe, *args)
  with jax.named_scope('reduce_gradients'):
    grads = zero.reduce(grads, plan.placed)
    parts = collectives.psum(parts, sharding.TOKEN_AXES)
    return grads, zero.norm(grads, plan.placed), parts


def _agreed(norm, parts):
  """Norm, loss parts, and whether both are finite: one answer everywhere.

  Devices may add up in different orders, and what is there more than once must
  not drift apart by a bit.
  """
  sums = {k: x for k, x in parts.items() if 'load' not in k}
  told = {'norm': norm} | sums
  bad = functools.reduce(
    jnp.logical_or, [~jnp.isfinite(x) for x in told.values()]
  )
  bad = collectives.pmax(bad.astype(jnp.int32), sharding.AXES) > 0
  told = {k: collectives.pmax(x, sharding.AXES) for k, x in told.items()}
  return told.pop('norm'), parts | told, ~bad


def _violation(plan, parts):
  """MaxVio, mean over all layers."""
  load = parts['load']
  if plan.pipe is not None:  # each rank has its layers: one array of all
    load = jax.lax.all_gather(load, 'pipe', axis=0, tiled=True)
    load = plan.pipe.layout.from_slots('moe', load)
  load_LE = jnp.concatenate([load, parts['mtp_load']])
  return routing.max_violation(load_LE)


def _scales(cfg, plan, batch_nBT, amount, hyper):
  """What the sums of each loss are multiplied by."""
  used = plan.in_use(amount, batch_nBT.weights_BT.shape[0])
  weights = batch_nBT.weights_BT * used[:, None, None]
  segments = batch_nBT.segments_BT * used[:, None, None]
  scales = mtp_loss.loss_scales(
    cfg.model.mtp, weights, segments, cfg.data.isolate_samples
  )
  return scales | {'mtp_weight': hyper['mtp_weight']}


def _grad(cfg, params, router, scales):
  """Gradients and loss parts of a micro-batch, `(params, batch) -> ...`."""
  net = model.build(cfg, training=True)
  # Once a step: the micro-batches share the FP8 forms of the weights.
  quantized = model.quantize(net.policy, params)

  def loss(params, batch):
    variables = {'params': params} | quantized
    total, parts = net.apply(variables, batch, router, scales, method='loss')
    return total, parts | {'total': total}

  # Its shapes are asked for before it is used: it is traced once for both.
  return jax.jit(jax.grad(loss, has_aux=True), inline=True)


def _accumulate_in_order(cfg, params, router, batch_nBT, scales, num_micro):
  """Sums over sequences of all devices, to the same bits on any of them."""
  rows = batch_nBT.weights_BT.shape[1]  # of whose balance losses the mean was
  scales = scales | {'balance': scales['balance'] / rows}
  grad = _grad(cfg, params, router, scales)
  return deterministic.accumulate(grad, params, batch_nBT, num_micro)


def _accumulate(cfg, params, router, batch_nBT, scales, num_micro):
  """Sums gradients and loss parts of the micro-batches in use."""
  grad = _grad(cfg, params, router, scales)
  micro = lambda i: jax.tree.map(lambda x: x[i], batch_nBT)
  if batch_nBT.weights_BT.shape[0] == 1:
    return grad(params, micro(0))
  shapes = jax.eval_shape(grad, params, micro(0))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  add = lambda i, sums: jax.tree.map(jnp.add, sums, grad(params, micro(i)))
  return jax.lax.fori_loop(0, num_micro, add, zeros)


def _clip(grads, norm, limit):
  """Scales the gradient to a global norm of at most `limit` (TR 4.2)."""
  scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda g: g * scale, grads)


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
