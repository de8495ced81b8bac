"""Runs a schedule's table as one SPMD program (TR 3.2.1).

Every rank of `pipe` runs the same loop over ticks. In a tick it does what its
row of the table says, with operands out of its buffers; then all ranks pass on
what they made, and share the work of embedding and head: both are cut over the
vocabulary, so that no rank has more of it than another. The table is an input:
another number of micro-batches compiles nothing anew.

A branch that is not taken is a loop of no turns rather than a conditional: what
a loop carries stays in place, gradient sums above all, and what passes through
a conditional may be copied.

Letters: c chunks (stages) of a rank, n slots of a chunk, s slots of a buffer, d
directions, k the main model and its MTP depths; T in `_TRf` and `_Tdg` ticks.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config, precision
from dsv3_jax.nn import model
from dsv3_jax.nn import stage as stages
from dsv3_jax.parallel.pipeline import (
  activation_buffers,
  instructions,
  param_layout,
  split_backward,
  stage_params,
  vocab_parallel,
)

Tree = Any
State = dict[str, Any]
_AXIS = stage_params.AXIS


class Kind(NamedTuple):
  """What tells the program of one stage from that of another."""

  num_dense: int
  num_moe: int
  first: bool
  last: bool


class Table(NamedTuple):
  """A program's arrays, padded to the longest step.

  counts: how many ticks count, and how many micro-batches.
  """

  fields_TRf: jax.Array
  globals_Tdg: jax.Array
  counts: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A model, its layout, and the program of its longest step."""

  cfg: config.Config
  layout: param_layout.Layout
  program: instructions.Program


def gradients(
  pipe: Pipeline,
  params: Tree,
  router: Tree,
  batch_nBT: model.Batch,
  scales: dict[str, jax.Array],
  table: Table,
) -> tuple[Tree, dict[str, jax.Array]]:
  """Gradients of a whole step and its loss parts, inside a mapped function.

  Args:
    params: of `Layout.from_model`, compute forms of this rank's part. router:
      likewise, `{'moe': [1, c, n, E], 'mtp': [depth, E]}`.
    scales: of `model.loss_scales`, with 'mtp_weight'.
  Returns:
    Gradients like `params`, of this device's tokens, and parts as `Model.loss`
    has them, of all ranks; 'load' is [1, c, n, E], of this one's masters.
  """
  run = Run(pipe, params, router, batch_nBT, scales)

  def tick(t, state):
    return run.tick(state, table.fields_TRf[t, 0], table.globals_Tdg[t])

  return run.finish(jax.lax.fori_loop(0, table.counts[0], tick, run.start()))


class Run:
  """What does not change from tick to tick, and what happens in one."""

  def __init__(self, pipe, params, router, batch_nBT, scales):
    self.cfg, self.program, self.params = pipe.cfg, pipe.program, params
    self.depth = pipe.cfg.model.mtp.depth
    self.batch_nBT, self.scales = batch_nBT, scales
    self.compute = precision.POLICIES[pipe.cfg.precision].compute
    self.router = router
    schedule = pipe.program.schedule
    self.ends = vocab_parallel.Ends(
      pipe.cfg, schedule, params, batch_nBT, scales
    )
    self.maker = stage_params.Chunks(pipe.cfg, pipe.layout, schedule)
    self.chunks = self.maker.from_masters(params, router)
    tail = ['final_norm', *(f'mtp_{k}' for k in range(self.depth))]
    self.tail = self.maker.weights({name: params[name] for name in tail})
    self.shape = self.ends.shape
    # One half of each kind stands for all: weights have the same shapes.
    branches = [half for branch in pipe.program.branches for half in branch]
    halves = {half.kind: half for half in branches if half is not None}
    self.parts = {kind: self._split(half) for kind, half in halves.items()}

  @functools.cached_property
  def kept(self) -> activation_buffers.Pool:
    """What F leaves to B or I."""
    return activation_buffers.Pool(
      {k: part.residuals for k, part in self.parts.items()}
    )

  @functools.cached_property
  def carry(self) -> activation_buffers.Pool:
    """What I leaves to W."""
    return activation_buffers.Pool(
      {k: part.carry for k, part in self.parts.items()}
    )

  # Stages.

  def _weights(self, half: instructions.Half) -> stage_params.Weights:
    """What the stage's module declares, out of its chunk."""
    kind = self.program.kinds[half.kind]
    names = [f'dense_{n}' for n in range(kind.num_dense)]
    names += [f'moe_{n}' for n in range(kind.num_moe)]
    pick = lambda tree: {name: tree[name] for name in names if name in tree}
    found = stage_params.Weights(*map(pick, self.chunks[half.chunk].layers))
    if kind.last:
      pairs = zip(found, self.tail, strict=True)
      found = stage_params.Weights(*(a | b for a, b in pairs))
    return found

  def _consts(self, half: instructions.Half, microbatch) -> tuple:
    """Batch and router biases that a stage reads."""
    kind = self.program.kinds[half.kind]
    batch = jax.tree.map(
      lambda x: vocab_parallel.take(x, microbatch), self.batch_nBT
    )
    router = {'moe': self.chunks[half.chunk].bias_nE[: kind.num_moe]}
    return batch, router | {k: v for k, v in self.router.items() if k == 'mtp'}

  def _split(self, half: instructions.Half) -> split_backward.Split:
    """The parts of a stage's function."""
    cfg, kind = self.cfg, self.program.kinds[half.kind]
    policy = precision.POLICIES[cfg.precision]
    net = stages.Stage(
      cfg.model,
      cfg.balance,
      policy,
      cfg.data.isolate_samples,
      kind.num_dense,
      kind.num_moe,
      kind.last,
    )

    def run(w, x, consts):
      variables = {'params': w.weights}
      if w.quantized:
        variables['quantized'] = w.quantized
      return net.apply(variables, *x, *consts)

    x_BTD = jnp.zeros(self.shape, self.compute)
    x = (x_BTD, [x_BTD] * self.depth if kind.last else [])
    return split_backward.split_stage(
      run,
      self._weights(half),
      x,
      self._consts(half, jnp.int32(0)),
      trained=lambda w: w.weights,
    )

  # One tick.

  def start(self) -> State:
    """Empty buffers and sums."""
    slots = self.program.slots
    wide = (1 + self.depth, *self.shape)
    zeros = lambda *shape: jnp.zeros(shape, self.compute)
    f32 = lambda tree: jax.tree.map(
      lambda w: jnp.zeros(w.shape, jnp.float32), tree
    )
    pairs = any(map(_is_pair, self.program.branches))
    count = self.cfg.model.moe.num_experts
    return {
      'acted': jnp.int32(0),
      'y': zeros(*self.shape),
      'hidden': zeros(*wide),
      'dx': zeros(*self.shape),
      'dahead': zeros(self.depth, *self.shape),
      'in': zeros(slots.get('in', 0) + 1, *self.shape),
      'grad': zeros(slots.get('grad', 0) + 1, *self.shape),
      'head': zeros(slots['head'] + 1, *wide),
      'kept': self.kept.empty(slots['kept']),
      'fresh': self.kept.empty(int(pairs)),
      'carry': self.carry.empty(slots.get('carry', 0)),
      'grads': [f32(chunk.layers.weights) for chunk in self.chunks],
      'tail': f32(self.tail.weights),
      'ends': f32({name: self.params[name] for name in ('embed', 'head')}),
      'load': [jnp.zeros_like(chunk.bias_nE) for chunk in self.chunks],
      'mtp_load': jnp.zeros((self.depth, count), jnp.float32),
      'loss': jnp.zeros(()),
      'mtp_loss': jnp.zeros(()),
      'balance': jnp.zeros(()),
    }

  def tick(self, state: State, row, now) -> State:
    """An action, the exchange, the head, the gradient of the embedding."""
    row = dict(zip(self._fields(), row, strict=True))
    now = [dict(zip(instructions.GLOBALS, way, strict=True)) for way in now]
    embedded = [self.ends.embed(way) for way in now]
    for number, branch in enumerate(self.program.branches):
      if number:
        ours = (row['branch'] == number) & _in_order(state)
        act = functools.partial(self._turn, branch, embedded, row)
        state = jax.lax.fori_loop(0, ours.astype(jnp.int32), act, state)
    state = self._exchange(self._keep(state, row), row)
    for way, told in enumerate(now):
      act = functools.partial(self.ends.head, way, told['last_f'], row)
      state = vocab_parallel.when(
        (told['last_f'] >= 0) & _in_order(state), act, state
      )
      act = functools.partial(self.ends.embed_gradient, way, told)
      any_ = (told['first_b'] >= 0) | (told['last_b'] >= 0)
      state = vocab_parallel.when(any_, act, state)
    return state

  def _fields(self) -> list[Any]:
    ways = range(len(self.program.schedule.homes))
    return [
      *instructions.FIELDS,
      *self.program.lanes,
      *(f'head_{way}' for way in ways),
    ]

  def _turn(
    self, branch: instructions.Branch, embedded, row, turn, state: State
  ):
    """The only turn of a branch's loop.

    What does not depend on the turn the compiler does ahead of the loop, so in
    every tick, whichever branch is taken: operands must seem to.
    """
    row = {name: _late(value, turn) for name, value in row.items()}
    embedded = jax.tree.map(lambda x: _late(x, turn), embedded)
    return self._act(branch, embedded, row | {'turn': turn}, state)

  def _act(self, branch: instructions.Branch, embedded, row, state: State):
    """The backward half first: it frees what the forward half may take."""
    state = state | {'acted': state['acted'] + 1}
    if branch.backward is not None:
      state = self._backward(branch.backward, row, state)
    if branch.forward is not None:
      where = 'fresh' if _is_pair(branch) else 'kept'
      state = self._forward(branch.forward, embedded, row, where, state)
    return state

  def _keep(self, state: State, row) -> State:
    """Puts what the forward half of a pair left in its slot.

    In the pair's own branch the buffers would be copied as a whole, since its
    backward half reads them.
    """
    pairs = list(map(_is_pair, self.program.branches))
    if not any(pairs):
      return state

    def keep(state):
      kept = {
        name: vocab_parallel.put(buffer, row['f_kept'], state['fresh'][name][0])
        for name, buffer in state['kept'].items()
      }
      return state | {'kept': kept}

    return vocab_parallel.when(
      jnp.array(pairs)[row['branch']] & _in_order(state), keep, state
    )

  def _forward(self, half, embedded, row, where, state: State) -> State:
    kind = self.program.kinds[half.kind]
    way = row['f_direction']
    x = vocab_parallel.take(state['in'], row['f_in'])
    if kind.first:
      x = jnp.stack([x for x, _ in embedded])[way]
    ahead = []
    if kind.last and self.depth:
      ahead = list(jnp.stack([jnp.stack(a) for _, a in embedded])[way])
    consts = self._consts(half, row['f_microbatch'])
    with jax.named_scope('forward'):
      y, told, kept = self.parts[half.kind].forward(
        self._weights(half), (x, ahead), consts
      )
    state = state | {'hidden' if kind.last else 'y': y}
    slot = row['f_kept'] if where == 'kept' else jnp.int32(0)
    state[where] = self.kept.put(state[where], half.kind, slot, kept)
    state['balance'] += told['balance'] * self.scales['balance']
    state['mtp_load'] += 0 if not kind.last else told['mtp_load']
    loads = list(state['load'])
    if kind.num_moe:
      at = loads[half.chunk].at[: kind.num_moe]
      loads[half.chunk] = at.add(told['load'])
    return state | {'load': loads}

  def _backward(self, half, row, state: State) -> State:
    kind, parts = self.program.kinds[half.kind], self.parts[half.kind]
    weights, state = self._weights(half), dict(state)
    late = lambda xs: [_late(x, row['turn']) for x in xs]
    if half.part == 'W':
      with jax.named_scope('backward_weight'):
        carry = self.carry.take(state['carry'], half.kind, row['b_carry'])
        grads = parts.backward_weight(weights, late(carry))
      return self._add(half, state, grads)
    dy = vocab_parallel.take(
      state['head' if kind.last else 'grad'], row['b_grad']
    )
    count = self.cfg.model.moe.num_experts
    zeros = lambda n: jnp.zeros((n, count), jnp.float32)
    dtold = {
      'balance': self.scales['balance'],
      'load': zeros(kind.num_moe),
      'mtp_load': zeros(self.depth if kind.last else 0),
    }
    kept = late(self.kept.take(state['kept'], half.kind, row['b_kept']))
    if half.part == 'I':
      with jax.named_scope('backward_input'):
        dx, carry = parts.backward_input(weights, kept, dy, dtold)
      state['carry'] = self.carry.put(
        state['carry'], half.kind, row['b_carry'], carry
      )
    else:
      with jax.named_scope('backward'):
        dx, grads = parts.backward(weights, kept, dy, dtold)
      state = self._add(half, state, grads)
    state['dx'], dahead = dx
    if kind.last and self.depth:
      state['dahead'] = jnp.stack(dahead)
    return state

  def _add(self, half, state: State, grads: Tree) -> State:
    """Adds a stage's weight gradients to its chunk's and the tail's sums."""
    sums, tail = list(state['grads']), dict(state['tail'])
    mine = dict(sums[half.chunk])
    for name, grad in grads.items():
      where = tail if name in tail else mine
      where[name] = jax.tree.map(
        lambda a, b: a + b.astype(jnp.float32), where[name], grad
      )
    sums[half.chunk] = mine
    return state | {'grads': sums, 'tail': tail}

  def _exchange(self, state: State, row) -> State:
    """What was made goes on its ways; a table says what is taken of it."""
    state, ranks = dict(state), self.program.schedule.ranks
    ordered = _in_order(state)
    with jax.named_scope('pipeline_exchange'):
      for lane in self.program.lanes:
        x = jnp.where(ordered, state[lane.what], 0)
        if lane.hop:
          pairs = [(r, (r + lane.hop) % ranks) for r in range(ranks)]
          x = jax.lax.ppermute(x, _AXIS, pairs)
        buffer = {'y': 'in', 'dx': 'grad'}[lane.what]
        state[buffer] = vocab_parallel.put(state[buffer], row[lane], x)
    return state

  def finish(self, state: State) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradients of the masters, and the parts of the loss."""
    grads = self.maker.to_masters(state['grads']) | state['tail']
    grads |= state['ends']
    balance = jax.lax.psum(state['balance'], _AXIS)
    total = state['loss'] + self.scales['mtp_weight'] * state['mtp_loss']
    parts = {name: state[name] for name in ('loss', 'mtp_loss')}
    return grads, parts | {
      'balance': balance,
      'total': total + balance,
      'load': self.maker.sums(state['load']),
      'mtp_load': jax.lax.psum(state['mtp_load'], _AXIS),
    }


def _late(x: jax.Array, turn: jax.Array) -> jax.Array:
  """The same, but not known before a loop's turn."""
  return jnp.where(turn < 0, jnp.zeros_like(x), x)


def _in_order(state: State) -> jax.Array:
  """True, but only known when the loops before have run.

  Loops of branches that share no result may change places. Then a buffer that
  one reads and a later one writes would be copied, and where an exchange blocks
  a rank might wait in it before its own action, while others wait for that.
  """
  return state['acted'] >= 0


def _is_pair(branch: instructions.Branch) -> bool:
  """Both halves use the same buffers."""
  return branch.forward is not None and branch.backward is not None
