"""Split stages on several devices: collectives, and a pipeline of two stages.

The pipeline is the smallest that keeps all that a real one does: a table of
actions, one `lax.switch` in one `lax.scan`, and slots that are used again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.pipeline import split_backward
from tests.parallel.pipeline import stages

ROWS, DIM, MICRO = 4, 6, 3


def draw(shape, seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


def mesh_of(count, axis):
  kind = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh(
    (count,), (axis,), axis_types=kind, devices=jax.devices()[:count]
  )


def exchanging(params, x, consts):
  """A stage with collectives, of a local [ROWS, DIM]."""
  hidden = jnp.tanh(x @ params['up'])
  sent = jax.lax.all_to_all(hidden, 'expert', 0, 0, tiled=True)
  y = (sent * jax.lax.psum(hidden, 'expert')) @ params['down']
  return y + consts, {'loss': jnp.sum(y**2), 'count': jnp.sum(y > 0)}


@pytest.mark.parametrize('check_vma', [False, True])
@pytest.mark.parametrize('loss', [0.3, None])
def test_collectives(check_vma, loss):
  trained = lambda params: params

  def body(params, x, dy):
    consts = jnp.ones(DIM)
    parts = split_backward.split_stage(exchanging, params, x, consts)
    daux = {'loss': loss, 'count': None}
    if loss is not None:
      daux['loss'] = loss * jnp.sum(dy)  # varies, as the loss does
    y, aux, residuals = parts.forward(params, x, consts)
    dx, carry = parts.backward_input(params, residuals, dy, daux)
    got = y, aux, dx, parts.backward_weight(params, carry)
    if loss is None:
      daux['loss'] = 0.0 * aux['loss']
    want = stages.vjp(exchanging, trained, params, x, consts, dy, daux)
    stored = (*parts.residuals, *parts.carry)
    assert (DIM, DIM) not in [shape.shape for shape in stored]
    names = stages.names(parts, 'backward_input')
    assert 'all_to_all' in names
    assert 'all_to_all' not in stages.names(parts, 'backward_weight')
    whole = jax.tree.map(jnp.atleast_1d, (list(got), want))
    # Without vma, gradients are each device's own.
    return whole if check_vma else jax.tree.map(lambda v: v[None], whole)

  cut, everywhere = PartitionSpec('expert'), PartitionSpec()
  out = [cut, cut, cut, everywhere] if check_vma else [cut] * 4
  run = jax.shard_map(
    body,
    mesh=mesh_of(4, 'expert'),
    in_specs=(everywhere, cut, cut),
    out_specs=(out, out),
    check_vma=check_vma,
  )
  params = {'up': draw((DIM, DIM), 0), 'down': draw((DIM, DIM), 1)}
  got, want = jax.jit(run)(
    params, draw((4 * ROWS, DIM), 2), draw((4 * ROWS, DIM), 3)
  )
  stages.assert_near(got, want)


# Rank by rank and tick by tick: F, I or W and the micro-batch; . is idle.
TABLE = (
  'F0 F1 F2 I0 W0 I1 W1 .  I2 W2',
  '.  F0 I0 F1 I1 W0 F2 I2 W1 W2',
)
# Slots of residuals by micro-batch, and of carries: fewer than micro-batches.
SLOTS, WAITING = (0, 1, 2), (0, 1, 0)


def stage(params, x, consts):
  """With a loss of its own, as a balance loss is."""
  y = x + jnp.tanh(x @ params['up'] * consts) @ params['down']
  return y, {'loss': jnp.mean(jnp.square(y)), 'count': jnp.sum(y > 0)}


def actions():
  """The table as [ticks, ranks] of actions and of micro-batches."""
  cells = [row.split() for row in TABLE]
  kinds = [['.FIW'.index(cell[0]) for cell in row] for row in cells]
  micro = [[int(cell[1:] or 0) for cell in row] for row in cells]
  return jnp.array(kinds).T, jnp.array(micro).T


def exchange(rank, state, out, kinds, micro):
  """Sends what a rank computed on; kinds, micro: of both ranks in this tick."""
  down = jax.lax.ppermute(out, 'pipe', [(0, 1)])
  up = jax.lax.ppermute(out, 'pipe', [(1, 0)])
  keep = lambda name, m, new, yes: (
    state[name].at[m].set(jnp.where(yes, new, state[name][m]))
  )
  sent = (rank == 1) & (kinds[0] == 1)
  back = (rank == 0) & (kinds[1] == 2)
  state |= {'in': keep('in', micro[0], down, sent)}
  return state | {'dy': keep('dy', micro[1], up, back)}


def pipeline(params, x_m, consts_m):
  """What one of two ranks does: gradients, and losses by micro-batch.

  The last stage's cotangent is its output; every loss counts once.
  """
  rank = jax.lax.axis_index('pipe')
  parts = split_backward.split_stage(stage, params, x_m[0], consts_m[0])
  slots = lambda count, shape: jnp.zeros((count, *shape.shape), shape.dtype)
  state = {
    'in': x_m,
    'dy': jnp.zeros_like(x_m),
    'residuals': [slots(3, shape) for shape in parts.residuals],
    'carry': [slots(2, shape) for shape in parts.carry],
    'grads': jax.tree.map(jnp.zeros_like, params),
    'dx': jnp.zeros_like(x_m),
    'loss': jnp.zeros(MICRO),
  }
  put = lambda arrays, i, values: [
    array.at[i].set(value) for array, value in zip(arrays, values, strict=True)
  ]
  nothing = jnp.zeros_like(x_m[0])

  def idle(state, m):
    del m
    return state, nothing

  def forward(state, m):
    y, aux, saved = parts.forward(params, state['in'][m], consts_m[m])
    residuals = put(state['residuals'], jnp.array(SLOTS)[m], saved)
    dy = state['dy'].at[m].set(jnp.where(rank == 1, y, 0.0))
    loss = state['loss'].at[m].set(aux['loss'])
    new = {'residuals': residuals, 'dy': dy, 'loss': loss}
    return state | new, y

  def backward_input(state, m):
    residuals = [r[jnp.array(SLOTS)[m]] for r in state['residuals']]
    daux = {'loss': jnp.ones(()), 'count': None}
    dx, saved = parts.backward_input(params, residuals, state['dy'][m], daux)
    carry = put(state['carry'], jnp.array(WAITING)[m], saved)
    return state | {'carry': carry, 'dx': state['dx'].at[m].set(dx)}, dx

  def backward_weight(state, m):
    carry = [c[jnp.array(WAITING)[m]] for c in state['carry']]
    dparams = parts.backward_weight(params, carry)
    grads = jax.tree.map(jnp.add, state['grads'], dparams)
    return state | {'grads': grads}, nothing

  def tick(state, row):
    kinds, micro = row
    branches = (idle, forward, backward_input, backward_weight)
    state, out = jax.lax.switch(kinds[rank], branches, state, micro[rank])
    return exchange(rank, state, out, kinds, micro), None

  state, _ = jax.lax.scan(tick, state, actions())
  outputs = {name: state[name] for name in ('grads', 'dx', 'loss')}
  return jax.tree.map(lambda v: v[None], outputs)


def test_a_pipeline_of_two_stages():
  params = {'up': draw((2, DIM, 9), 0), 'down': draw((2, 9, DIM), 1)}
  x_m, consts_m = draw((MICRO, ROWS, DIM), 2), draw((MICRO, 9), 3)

  def own(params, x_m, consts_m):
    return pipeline(jax.tree.map(lambda w: w[0], params), x_m, consts_m)

  whole, cut = PartitionSpec(), PartitionSpec('pipe')
  run = jax.shard_map(
    own,
    mesh=mesh_of(2, 'pipe'),
    in_specs=(cut, whole, whole),
    out_specs=cut,
    check_vma=False,
  )
  got = jax.jit(run)(params, x_m, consts_m)

  def loss(params, x_m):
    total, losses = 0.0, []
    for m in range(MICRO):
      y = x_m[m]
      for rank in range(2):
        own = jax.tree.map(lambda w, rank=rank: w[rank], params)
        y, aux = stage(own, y, consts_m[m])
        total += aux['loss']
        losses.append(aux['loss'])
      total += 0.5 * jnp.sum(y * y)  # its gradient is y
    return total, jnp.stack(losses).reshape(MICRO, 2).T

  wanted = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)(loss)
  (grads, dx), losses = jax.jit(wanted)(params, x_m)
  stages.assert_near(
    [got['grads'], got['dx'][0], got['loss']], [grads, dx, losses]
  )


def test_the_table_uses_slots_again():
  # A slot must be free when it is written, or the test above tests nothing.
  for row in TABLE:
    cells = row.split()
    for slots, first, last in (SLOTS, 'F', 'I'), (WAITING, 'I', 'W'):
      spans = [
        (slots[m], cells.index(f'{first}{m}'), cells.index(f'{last}{m}'))
        for m in range(MICRO)
      ]
      for slot, start, end in spans:
        others = [s for s in spans if s[0] == slot and s[1:] != (start, end)]
        assert all(e < start or end < s for _, s, e in others)
  assert len(set(WAITING)) < MICRO
