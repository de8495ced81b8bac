"""A thread a rank: gradients of one device, and no silence when one dies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layouts
from dsv3_jax import precision
from dsv3_jax.nn import model
from dsv3_jax.nn import stage as stages
from dsv3_jax.ops import cross_entropy, mtp_loss
from dsv3_jax.parallel.pipeline import param_layout, threaded
from dsv3_jax.parallel.schedules import make as schedules
from tests import limits
from tests.parallel.pipeline.stages import assert_near
from tests.parallel.schedules import tables

KINDS = [(kind, split) for kind in schedules.KINDS for split in (False, True)]
KINDS = [k for k in KINDS if not k[1] or k[0] in schedules.UNIDIRECTIONAL]
DIM, MICRO = 5, 8


def chain(kind, ranks, split=False):
  """A schedule and its functions, with parameters and inputs."""
  item = schedules.stages_per_rank(kind)
  schedule = schedules.make_schedule(
    kind, stages=item * ranks, microbatches=MICRO, split_backward=split
  )
  last = schedule.stages - 1

  def function(at):
    def run(params, x, consts):
      h = jnp.tanh((x if at else consts['x']) @ params['w'] + params['b'])
      aux = {'size': jnp.mean(h**4)}
      if at == last:
        return (), aux | {'loss': jnp.sum((h - consts['target']) ** 2)}
      return h, aux

    return run

  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  # Small enough that rounding does not grow from stage to stage.
  weights = lambda: {'w': 0.4 * draw(DIM, DIM), 'b': draw(DIM)}
  params = [weights() for _ in range(schedule.stages)]
  consts = [{'x': draw(3, DIM), 'target': draw(3, DIM)} for _ in range(MICRO)]
  return (
    schedule,
    [function(at) for at in range(schedule.stages)],
    params,
    consts,
  )


def build(schedule, functions, params, consts):
  split_stages = tables.split_chain(
    functions, params, [consts[0]] * len(params)
  )
  daux = [{'size': jnp.float32(0.3)} for _ in params]
  daux[-1]['loss'] = jnp.float32(1.0)
  held = [
    threaded.ThreadedStage(*item[:2], consts, item[2])
    for item in zip(split_stages, params, daux, strict=True)
  ]
  return threaded.ThreadedExecutor(
    schedule, held, jax.devices()[: schedule.ranks]
  )


def losses_of(functions, params, consts):
  total = 0.0
  for const in consts:
    x = ()
    for run, w in zip(functions, params, strict=True):
      x, aux = run(w, x, const)
      total += 0.3 * aux['size'] + aux.get('loss', 0.0)
  return total


@pytest.mark.parametrize(('kind', 'split'), KINDS)
def test_gradients_are_those_of_one_device(kind, split):
  schedule, functions, params, consts = chain(
    kind, 4 if kind != 'gpipe' else 3, split
  )
  played = build(schedule, functions, params, consts).run()
  loss = lambda params: losses_of(functions, params, consts)
  total, want = jax.value_and_grad(loss)(params)
  assert_near(played.grads, want)
  got = sum(
    0.3 * aux['size'] + aux.get('loss', 0.0)
    for aux in jax.device_get([*played.aux.values()])
  )
  assert_near([got], [total])
  for row, order in zip(played.timeline.starts, schedule.orders, strict=True):
    assert len(row) == len(order) and row == sorted(row)


def dead(executor, stage, act):
  """The executor with a stage whose backward pass does something else."""
  functions = executor.stages[stage].functions

  class DeadFunctions:
    forward = staticmethod(functions.forward)

    @staticmethod
    def backward(*_):
      act()

  executor.stages[stage] = executor.stages[stage]._replace(
    functions=DeadFunctions
  )
  return executor


def test_a_dead_rank_raises_in_the_caller():
  def fail():
    raise FloatingPointError('stage 1')

  executor = dead(build(*chain('1f1b', 3)), 1, fail)
  with pytest.raises(FloatingPointError, match='stage 1'):
    executor.run()


def test_ranks_that_wait_in_a_circle_are_told():
  schedule, *rest = chain('1f1b', 2)
  first, second = (list(order) for order in schedule.orders)
  first.sort(key=lambda action: (action.forward or action.backward).microbatch)
  second[0], second[2] = second[2], second[0]  # F1 before F0, and before B0
  second[1], second[2] = second[2], second[1]
  orders = (tuple(first), tuple(second))
  executor = build(dataclasses.replace(schedule, orders=orders), *rest)
  stats = (
    'rank 0 waits for the input gradient of micro-batch 0 at stage 1; rank'
  )
  with pytest.raises(TimeoutError, match=stats):
    executor.run(timeout=3.0)


def test_sizes_must_fit():
  schedule, *rest = chain('1f1b', 2)
  executor = build(schedule, *rest)
  with pytest.raises(
    ValueError, match='1 devices and 2 stages must be 2 and 2'
  ):
    threaded.ThreadedExecutor(schedule, executor.stages, jax.devices()[:1])


LAYER_RANGES = ((0, 1), (1, 2))  # a dense layer; a MoE layer, MTP


def model_stage(cfg, layout, at, scales):
  """A stage of the model with embedding or head, as its rank would have it."""
  policy = precision.POLICIES[cfg.precision]
  dense, moe = (layout.stages[at].count(stack) for stack in param_layout.STACKS)
  last, depth = at == len(layout.stages) - 1, cfg.model.mtp.depth
  net = stages.PipelineStage(
    cfg.model, cfg.balance, policy, False, dense, moe, last
  )

  def run(params, x, consts):
    batch, router_biases = consts
    w_VD = params['embed']
    ahead = []
    if last:
      ahead = [w_VD[t] for t in model.tokens_ahead(batch, depth)]
    x = x if at else w_VD[batch.tokens_BT]
    y, stats = net.apply(
      {'params': params['layers']}, x, ahead, batch, router_biases
    )
    stats = {'balance': stats['balance'] * scales['balance']}
    if not last:
      return y, stats
    weights_BT = batch.weights_BT * scales['main']
    targets = [(batch.targets_BT, weights_BT)]
    for k in range(1, depth + 1):
      targets.append(model.loss_targets(batch, scales, k, False))
    sums = [
      cross_entropy.head_loss(h, params['head'], *target)
      for h, target in zip(y, targets, strict=True)
    ]
    mtp = scales['mtp_weight'] * sum(sums[1:], jnp.zeros(()))
    return (), stats | {'loss': sums[0] + mtp}

  return run


def model_params(params, layout, at):
  """What `model_stage` has of the parameters by slots."""
  named = {}
  for stack in param_layout.STACKS:
    for n in range(layout.stages[at].count(stack)):
      take = lambda x, n=n: x[at, 0, n]
      named[f'{stack}_{n}'] = jax.tree.map(take, params[stack])
  of_stage = {'layers': named, 'embed': params['embed']['w']}
  if at == len(layout.stages) - 1:
    tail = [name for name in params if name.startswith(('final', 'mtp'))]
    named |= {name: params[name] for name in tail}
    of_stage['head'] = params['head']['w']
  return of_stage


@pytest.mark.nightly
def test_the_model_under_dualpipe_is_one_device():
  changes = {'model.num_layers': 2, 'train.batch_size': 32}
  changes |= {'train.batch_size_start': 32, 'model.remat': 'none'}
  cfg = layouts.make_config({}, changes)
  state, batch_nBT = layouts.start(cfg), layouts.batch(cfg, 0)
  state = jax.tree.map(jnp.asarray, state)
  params, router_biases = state['params'], state['router']
  scales = mtp_loss.loss_scales(
    cfg.model.mtp, batch_nBT.weights_BT, batch_nBT.segments_BT, False
  ) | {'mtp_weight': 0.3}
  micro = [jax.tree.map(lambda x, i=i: x[i], batch_nBT) for i in range(4)]
  net = model.build(cfg, training=True)
  loss = lambda params, batch: net.apply(
    {'params': params}, batch, router_biases, scales, method='loss'
  )[0]
  grad = jax.jit(jax.value_and_grad(loss))
  add = lambda *item: sum(item)
  total, want = jax.tree.map(add, *(grad(params, item) for item in micro))

  layout = param_layout.make(cfg.model, LAYER_RANGES, ((0,), (1,)))
  schedule = schedules.make_schedule('dualpipe', stages=2, microbatches=4)
  split = lambda tree: [
    model_params(layout.from_model(tree), layout, at) for at in range(2)
  ]
  moe = layout.to_slots('moe', router_biases['moe'])
  consts = [
    [(item, router_biases | {'moe': moe[at, 0]}) for item in micro]
    for at in range(2)
  ]
  functions = [model_stage(cfg, layout, at, scales) for at in range(2)]
  firsts = [item[0] for item in consts]
  split_stages = tables.split_chain(functions, split(params), firsts)
  one = jnp.float32(1.0)
  daux = [{'balance': one}, {'balance': one, 'loss': one}]
  held = map(threaded.ThreadedStage, split_stages, split(params), consts, daux)
  # On one device: what is compiled for one rank serves the other.
  executor = threaded.ThreadedExecutor(
    schedule, list(held), jax.devices()[:1] * 2
  )
  played = executor.run(timeout=limits.HANG)
  stats = jax.device_get([*played.aux.values()])
  got = sum(sum(aux.values()) for aux in stats)
  assert_near([got], [total])
  # The embedding is used by both stages, so its gradient is their sum.
  grads, wanted = played.grads, split(want)
  grads[0]['embed'] = grads[1]['embed'] = sum(g['embed'] for g in grads)
  assert_near(grads, wanted)
