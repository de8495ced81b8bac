"""Schedules in numbers: played on lists, every value is where it is read."""

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax import errors
from dsv3_jax.parallel.pipeline import instructions
from dsv3_jax.parallel.schedules import make as schedules

NAMES = instructions.FIELDS


@functools.cache
def compiled(kind, stages, microbatches):
  schedule = schedules.make_schedule(
    kind, stages=stages, microbatches=microbatches
  )
  last = stages - 1
  kinds = tuple(
    'first' if s == 0 else 'last' if s == last else '' for s in range(stages)
  )
  return instructions.compile_schedule(schedule, kinds)


class Player:
  """Runs a program on ranks whose values are their own names."""

  def __init__(self, program):
    self.program, self.schedule = program, program.schedule
    self.chunks = instructions.chunks(program.schedule)
    self.ranks = [{} for _ in range(program.schedule.ranks)]
    self.done = []

  def play(self):
    ways = len(self.schedule.homes)
    transfers = self.program.transfers
    for row, vocab_row in zip(
      self.program.fields_tick_rank,
      self.program.vocab_fields_tick_direction,
      strict=True,
    ):
      sent = [self._act(rank, row[rank]) for rank in range(len(row))]
      for rank, fields in enumerate(row):
        arrivals = fields[len(NAMES) :]
        for transfer, slot in zip(transfers, arrivals.tolist(), strict=False):
          source = (rank - transfer.hop) % len(row)
          buffer = {'y': 'in', 'dx': 'grad'}[transfer.payload]
          self.ranks[rank][buffer, slot] = sent[source].get(transfer.payload)
        for way in range(ways):
          micro = int(vocab_row[way, instructions.VOCAB_FIELDS.index('last_f')])
          if micro >= 0:
            home = self.schedule.homes[way][-1]
            assert sent[home]['y'] == ('y', self.schedule.stages - 1, micro)
            slot = int(arrivals[len(transfers) + way])
            self.ranks[rank]['head', slot] = ('dhead', micro)
    return self.done

  def _act(self, rank, fields):
    at = dict(zip(NAMES, fields[: len(NAMES)].tolist(), strict=True))
    branch, mine = self.program.branches[at['branch']], self.ranks[rank]
    sent, last = {}, self.schedule.stages - 1
    if (stage_pass := branch.backward) is not None:
      stage, micro = self.chunks[rank][stage_pass.chunk], at['b_microbatch']
      assert self.program.kinds[stage_pass.stage_kind] == self._kind(stage)
      if stage_pass.action_kind == 'W':
        assert mine['carry', at['b_carry']] == (stage, micro)
      else:
        assert mine['residuals', at['b_residuals']] == (stage, micro)
        want = ('dhead', micro) if stage == last else ('dx', stage + 1, micro)
        assert mine['head' if stage == last else 'grad', at['b_grad']] == want
        sent['dx'] = ('dx', stage, micro)
        if stage_pass.action_kind == 'I':
          mine['carry', at['b_carry']] = (stage, micro)
      self.done.append((stage_pass.action_kind, stage, micro))
    if (stage_pass := branch.forward) is not None:
      stage, micro = self.chunks[rank][stage_pass.chunk], at['f_microbatch']
      assert at['f_direction'] == self.schedule.direction(micro)
      if stage:
        assert mine['in', at['f_in']] == ('y', stage - 1, micro)
      mine['residuals', at['f_residuals']] = (stage, micro)
      sent['y'] = ('y', stage, micro)
      self.done.append(('F', stage, micro))
    return sent

  def _kind(self, stage):
    last = self.schedule.stages - 1
    return 'first' if stage == 0 else 'last' if stage == last else ''


SIZES = [
  ('gpipe', 4, 3),
  ('1f1b', 4, 7),
  ('interleaved', 4, 4),
  ('interleaved', 8, 8),
  ('zb1p', 4, 9),
  ('dualpipe', 2, 4),
  ('dualpipe', 8, 20),
  ('dualpipev', 4, 5),
  ('dualpipev', 16, 18),
]


@pytest.mark.parametrize(('kind', 'stages', 'microbatches'), SIZES)
def test_every_operand_is_in_its_slot(kind, stages, microbatches):
  """And every task is done once, whole or in halves."""
  program = compiled(kind, stages, microbatches)
  done = Player(program).play()
  assert len(done) == len(set(done))
  tasks = {(s, m) for s in range(stages) for m in range(microbatches)}
  of = lambda *kinds: {(s, m) for kind, s, m in done if kind in kinds}
  assert of('F') == of('B', 'I') == tasks
  assert of('I') == of('W') and not of('I') & of('B')


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.data())
def test_any_sizes(data):
  kind = data.draw(st.sampled_from(schedules.KINDS))
  ranks = 2 * data.draw(st.integers(1, 3))
  per_rank = schedules.stages_per_rank(kind)
  extra = 2 * data.draw(st.integers(0, 5))
  count = ranks * (1 + extra) if kind == 'interleaved' else 2 * ranks + extra
  Player(compiled(kind, per_rank * ranks, count)).play()


@pytest.mark.parametrize(
  'field', ['f_in', 'f_residuals', 'b_grad', 'b_residuals']
)
def test_a_wrong_slot_is_seen(field):
  program = compiled('gpipe', 4, 8)
  fields = program.fields_tick_rank.copy()
  backward = int(field[0] == 'b')
  used = [i for i, b in enumerate(program.branches) if b[backward] is not None]
  tick = next(i for i, row in enumerate(fields) if row[2, 0] in used)
  fields[tick, 2, NAMES.index(field)] += 1
  wrong = instructions.PipelineProgram(
    **(vars(program) | {'fields_tick_rank': fields})
  )
  with pytest.raises((AssertionError, KeyError)):
    Player(wrong).play()


@pytest.mark.parametrize(
  ('kind', 'microbatches', 'most'),
  [('gpipe', 12, 12), ('1f1b', 12, 4), ('zb1p', 12, 4), ('dualpipe', 12, 5)],
)
def test_buffers_are_as_small_as_the_schedule_promises(
  kind, microbatches, most
):
  """DualPipe keeps R + 1 micro-batches, of both its stages together."""
  assert compiled(kind, 4, microbatches).slots['residuals'] == most


def legal(kind, ranks, most):
  """Numbers of micro-batches that the schedule takes, ascending."""
  stages = ranks * schedules.stages_per_rank(kind)
  counts = []
  for count in range(1, most + 1):
    with contextlib.suppress(errors.InputError):
      schedules.check_sizes(kind, stages, count)
      counts.append(count)
  return stages, counts


@pytest.mark.parametrize(
  'ranks', [2, 4, pytest.param(8, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize('kind', schedules.KINDS)
def test_a_longer_program_runs_any_shorter_step(kind, ranks):
  """Of kinds of stages that differ wherever they may; as a ramp needs it."""
  stages, counts = legal(kind, ranks, 4 * ranks)
  halves = kind in schedules.UNIDIRECTIONAL
  kinds = ('first', *(f'middle {s % 3}' for s in range(stages - 2)), 'last')
  make = functools.partial(
    schedules.make_schedule, kind, stages=stages, split_backward=halves
  )
  full = instructions.compile_schedule(make(microbatches=counts[-1]), kinds)
  assert len(counts) > 1
  for count in counts[:-1]:
    schedule = make(microbatches=count)
    less = instructions.compile_schedule(schedule, kinds, full.branches)
    assert (
      less.branches == full.branches and less.transfers == full.transfers
    ), count
    assert less.slots.keys() <= full.slots.keys()
    assert all(less.slots[k] <= full.slots[k] for k in less.slots), count
    assert len(less.fields_tick_rank) <= len(full.fields_tick_rank), count
