"""One optimizer step as a pure function, compiled once (TR 4.2).

State is a plain dict of arrays: `params` (f32 master weights), `opt` (AdamW
moments), `router` (biases) and `guard` (the spike state: statistics of the loss
that decide whether a step counts; checkpoints have it by this key). Gradients
of the micro-batches are summed in f32. How many are used is an operand, so the
batch ramp does not recompile. The router biases move once a step, on the load
of all micro-batches and all devices.

A non-finite or, if `train.spike_sigmas` asks for it, a spiking loss leaves the
whole state untouched. After a non-finite loss no later step changes the state,
so that a host that reads metrics late loses nothing. After five spikes in a row
the loss has moved for good, and its statistics begin anew.
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
from dsv3_jax.parallel import (
  accumulation,
  deterministic,
  state_layout,
  zero,
)
from dsv3_jax.training import optimizer as optim

Spec = sharding.Spec
State = dict
Hyper = dict[str, float]

# Whole rows: a token's integers are few, and each looks at its neighbours.
BATCH_SPEC = sharding.to_spec((None, 'batch', None), sharding.RULES, 3)
# Schedules all-to-alls beside products that do not need them, as in DualPipe's
# F&B. Compiled for an H100, not run: `benchmarks/results/overlap_h100.md`.
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
    'router': model.init_router_biases(cfg.model),
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

  step: `(state, batch_nBT, num_microbatches, hyper) -> (state, metrics)`, to be
  compiled. `batch_nBT` holds up to n micro-batches; `num_microbatches`, of the
  method of that name, says how many count; the rest is padding. `hyper` holds
  this step's 'lr', 'mtp_weight' and 'bias_rate'.
  """

  def __init__(self, cfg: config.Config, mesh: jax.sharding.Mesh):
    self.cfg, self.mesh = cfg, mesh
    # Where there are no stages, ranks take more of the batch.
    self.model_mesh = sharding.without_pipe(mesh)
    self.state_layout = state_layout.make(cfg, mesh.shape)
    self.accumulation = self.state_layout.accumulation
    count_specs = self.accumulation.num_microbatches_specs()
    self.step = sharding.shard_map_step(
      functools.partial(_step, cfg, self.state_layout),
      mesh,
      self.state_layout.rules,
      in_specs=(self.specs(), BATCH_SPEC, count_specs, Spec()),
      out_specs=(self.specs(), Spec()),
    )

  def jit(self, **options) -> Callable:
    """`step` as it is to be compiled; `options` as of `jax.jit`."""
    platform = self.mesh.devices.flat[0].platform
    compiler_options = dict(_COMPILER_OPTIONS.get(platform, {}))
    if self.cfg.parallel.deterministic:
      compiler_options |= deterministic.COMPILER_OPTIONS
    step = jax.jit(self.step, compiler_options=compiler_options, **options)
    return processes.compile_then_barrier(step)

  def num_microbatches(self, count: int) -> Any:
    """The operand of `step` for this number of micro-batches."""
    return self.accumulation.num_microbatches(count)

  def specs(self) -> State:
    """The partition of each array: masters and moments exist once."""
    router_biases = self.state_layout.router_biases_specs()
    return self._specs(self.state_layout.placed) | {'router': router_biases}

  def shardings(self) -> State:
    """Where each array of the state is."""
    return sharding.named_shardings(self.specs(), self.mesh)

  def model_shardings(self) -> State:
    """Where each array of a state in the model's form is, sharded as much."""
    specs = self._specs(self.state_layout.model_placed)
    return sharding.named_shardings(specs, self.model_mesh)

  def _specs(self, placed: Any) -> State:
    """Partitions of a state with these placements and replicated biases."""
    specs = jax.tree.map(lambda _: Spec(), state_shapes(self.cfg))
    masters = zero.masters(placed)
    opt = specs['opt']._replace(mean=masters, square=masters)
    return specs | {'params': masters, 'opt': opt}

  def batch_sharding(self) -> jax.sharding.NamedSharding:
    """Of [micro-batch, B, T] arrays: rows are sharded over the batch axes."""
    return sharding.named_shardings(BATCH_SPEC, self.mesh)

  def init(self, key: jax.Array) -> State:
    """A fresh state."""
    init = lambda key: self._convert_from_model(init_state(self.cfg, key))
    init = jax.jit(init, out_shardings=self.shardings())
    return processes.compile_then_barrier(init)(key)

  # A save and an evaluation come again and again: conversions compile once.
  @functools.cached_property
  def from_model(self) -> Callable[[State], State]:
    """Takes a state in the model's form to the form of this trainer."""
    return self.state_layout.param_layout.compile(
      self._convert_from_model, self.shardings()
    )

  @functools.cached_property
  def to_model(self) -> Callable[[State], State]:
    """Takes a state to the model's form: for checkpoints and evaluation."""
    convert = functools.partial(_convert, self.state_layout.to_model)
    return self.state_layout.param_layout.compile(
      convert, self.model_shardings()
    )

  def params_from_model(self, params: Any) -> Any:
    """The parameters alone, or their average, in the form of this trainer."""
    return self._params_from_model(params) if params else params

  def params_to_model(self, params: Any) -> Any:
    """The parameters alone, or their average, in the model's form."""
    return self._params_to_model(params) if params else params

  def weights_from_model(self, weights: State) -> State:
    """'params' and 'router' alone in the form of this trainer."""
    convert = lambda weights: dict(
      zip(
        ('params', 'router'),
        self.state_layout.from_model(weights['params'], weights['router']),
        strict=True,
      )
    )
    shardings = self.shardings()
    shardings = {name: shardings[name] for name in ('params', 'router')}
    layout = self.state_layout.param_layout
    return layout.compile(convert, shardings)(weights)

  @functools.cached_property
  def _params_from_model(self) -> Callable:
    layout = self.state_layout.param_layout
    return layout.compile(layout.from_model, self.shardings()['params'])

  @functools.cached_property
  def _params_to_model(self) -> Callable:
    layout = self.state_layout.param_layout
    return layout.compile(layout.to_model, self.model_shardings()['params'])

  def _convert_from_model(self, state: State) -> State:
    return _convert(self.state_layout.from_model, state)


def _convert(change: Callable, state: State) -> State:
  """Changes the form of parameters, moments and biases."""
  opt = state['opt']
  params, router_biases = change(state['params'], state['router'])
  mean, _ = change(opt.mean, state['router'])
  square, _ = change(opt.square, state['router'])
  opt = opt._replace(mean=mean, square=square)
  return state | {'params': params, 'router': router_biases, 'opt': opt}


def make_train_step(
  cfg: config.Config,
) -> Callable[[State, model.Batch, jax.Array, Hyper], tuple[State, dict]]:
  """`Trainer.step` on one device; `num_microbatches` is an int32.

  The one-device reference of tests and benchmarks; training uses `Trainer`.
  """
  sizes = dict.fromkeys(sharding.AXES, 1)
  return functools.partial(_step, cfg, state_layout.make(cfg, sizes))


def _step(cfg, layout, state, batch_nBT, num_microbatches, hyper):
  """Gradients, clipping, AdamW and biases, on each device."""
  with jax.named_scope('gather_weights'):
    params = zero.gather(state['params'], layout.placed)
  scales = _scales(cfg, layout, batch_nBT, num_microbatches, hyper)
  operands = (params, state['router'], batch_nBT, scales, num_microbatches)
  grads, norm, parts = _gradients(cfg, layout, *operands)
  with jax.named_scope('optimizer'):
    norm, parts, finite = _agreed(norm, parts)
    grads = _clip(grads, norm, cfg.optim.clip_norm)
    spike_state = state['guard']
    spike = _is_spike(spike_state, parts['loss'], cfg.train.spike_sigmas)
    moved = spike & (spike_state['skips'] >= _SPIKE_PATIENCE)
    count = jnp.where(moved, 0, spike_state['count'])
    fresh = spike_state | {'count': count}
    skip = spike & ~moved
    halted = spike_state['halted'] | ~finite
    optimizer = optim.adamw(cfg.optim)
    new = jax.lax.cond(
      ~skip & ~halted,
      lambda: _advance(
        optimizer, state | {'guard': fresh}, grads, parts, hyper
      ),
      lambda: state,
    )
    skips = jnp.where(skip, spike_state['skips'] + 1, 0)
    new = new | {'guard': new['guard'] | {'skips': skips, 'halted': halted}}
  metrics = {k: v for k, v in parts.items() if 'load' not in k}
  metrics |= {'skipped': skip.astype(jnp.int32), 'halted': halted}
  metrics |= {'grad_norm': norm, 'max_violation': _violation(layout, parts)}
  return new, metrics


def _gradients(cfg, layout, *operands):
  """Gradients of masters, their norm, and loss parts, of all devices."""
  if cfg.parallel.deterministic:
    grads, parts = _deterministic_gradients(cfg, *operands)
    norm = deterministic.norm(grads)
    return zero.shard(grads, layout.placed), norm, parts
  grads, parts = layout.accumulation.gradients(*operands)
  with jax.named_scope('reduce_gradients'):
    grads = zero.reduce(grads, layout.placed)
    parts = collectives.psum(parts, sharding.TOKEN_AXES)
    return grads, zero.norm(grads, layout.placed), parts


def _agreed(norm, parts):
  """Norm, loss parts, and whether both are finite, equal on all devices.

  Devices may sum in different orders, and replicated state must not differ
  between them by a bit.
  """
  sums = {k: x for k, x in parts.items() if 'load' not in k}
  agreed = {'norm': norm} | sums
  bad = functools.reduce(
    jnp.logical_or, [~jnp.isfinite(x) for x in agreed.values()]
  )
  bad = collectives.pmax(bad.astype(jnp.int32), sharding.AXES) > 0
  agreed = {k: collectives.pmax(x, sharding.AXES) for k, x in agreed.items()}
  return agreed.pop('norm'), parts | agreed, ~bad


def _violation(layout, parts):
  """MaxVio, mean over all layers."""
  load = layout.param_layout.all_loads(parts['load'])
  load_LE = jnp.concatenate([load, parts['mtp_load']])
  return routing.max_violation(load_LE)


def _scales(cfg, layout, batch_nBT, num_microbatches, hyper):
  """What the sums of each loss are multiplied by."""
  capacity = batch_nBT.weights_BT.shape[0]
  used = layout.accumulation.in_use(num_microbatches, capacity)
  weights = batch_nBT.weights_BT * used[:, None, None]
  segments = batch_nBT.segments_BT * used[:, None, None]
  scales = mtp_loss.loss_scales(
    cfg.model.mtp, weights, segments, cfg.data.isolate_samples
  )
  return scales | {'mtp_weight': hyper['mtp_weight']}


def _deterministic_gradients(
  cfg, params, router_biases, batch_nBT, scales, num_microbatches
):
  """Sums over sequences of all devices, to the same bits on any of them."""
  rows = batch_nBT.weights_BT.shape[1]  # of whose balance losses the mean was
  scales = scales | {'balance': scales['balance'] / rows}
  grad = accumulation.gradient_of(cfg, params, router_biases, scales)
  return deterministic.accumulate(grad, params, batch_nBT, num_microbatches)


def _clip(grads, norm, limit):
  """Scales the gradient to a global norm of at most `limit` (TR 4.2)."""
  scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda g: g * scale, grads)


def _is_spike(spike_state, loss, sigmas):
  """True if the loss lies far above its running mean."""
  if not sigmas:
    return jnp.zeros((), jnp.bool_)
  limit = spike_state['mean'] + sigmas * jnp.sqrt(spike_state['variance'])
  return (spike_state['count'] >= _SPIKE_WARMUP) & (loss > limit)


def _advance(optimizer, state, grads, parts, hyper):
  """AdamW, router biases, and the loss' running statistics."""
  params, opt = optimizer.update(
    grads, state['opt'], state['params'], hyper['lr']
  )
  loads = {'moe': parts['load'], 'mtp': parts['mtp_load']}
  loads = {name: loads[name] for name in state['router']}
  move = lambda b, load: routing.update_bias(b, load, hyper['bias_rate'])
  spike_state = state['guard']
  # The first steps count in full, so that the mean does not start at 0.
  memory = jnp.minimum(
    _SPIKE_MEMORY, spike_state['count'] / (spike_state['count'] + 1.0)
  )
  delta = parts['loss'] - spike_state['mean']
  return {
    'params': params,
    'opt': opt,
    'router': jax.tree.map(move, state['router'], loads),
    'guard': {
      'mean': spike_state['mean'] + (1.0 - memory) * delta,
      'variance': memory
      * (spike_state['variance'] + (1.0 - memory) * delta**2),
      'count': spike_state['count'] + 1,
      'skips': spike_state['skips'],
      'halted': spike_state['halted'],
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
