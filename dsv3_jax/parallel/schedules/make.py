"""Pipeline schedules by name: which sizes are legal, and their formulas.

`stages` counts the pieces into which the layers are split, and times are those
of one stage. With P ranks, r one of them, m micro-batches:

| kind | P | legal m | bubble (TR table 2) | live activations |
| --- | --- | --- | --- | --- |
| gpipe | stages | >= 1 | (P-1)(f+b) | m |
| 1f1b | stages | >= 1 | (P-1)(f+b) | min(m, P-r) |
| interleaved | stages / chunks | P, 2P, ... | (P-1)(f+b) | see below |
| zb1p | stages | >= P | (P-1)(f+b-2w) | P |
| dualpipe | stages, even | even, >= 2P | (P/2-1)(fb+b-3w) | P+1 |
| dualpipev | stages / 2 | >= 2P | (P-1)(fb+b-3w) | 2P+1 |

f is the forward, b the full backward, w its weight half, fb a forward and a
backward overlapped. An activation is that of one stage. Interleaved with v
chunks a rank has at most min(m v, P v + P-1-2r) of them. The report's
(PP-1)(F+B)/v is the same bubble, with F and B of all v stages of a rank. The
report's PP for DualPipeV is its stages, 2P.

The formulas of gpipe, 1f1b and interleaved are exact for any times. That of
zb1p is exact where w <= f and w <= b-w; elsewhere the bubble is larger. Those
of dualpipe and dualpipev are exact where f = b-w >= w, for any fb from
max(f, b) to f+b. With b-w >= w and f < b-w the bubble is smaller, with f > b-w
larger. With two ranks (one for DualPipeV) there is no bubble.
"""

from dsv3_jax import errors
from dsv3_jax.parallel.schedules import dualpipe, unidirectional
from dsv3_jax.parallel.schedules.actions import Number, Schedule

# Their backwards are full ones, unless `split_backward` splits them.
UNIDIRECTIONAL = ('gpipe', '1f1b', 'interleaved')
KINDS = (*UNIDIRECTIONAL, 'zb1p', 'dualpipe', 'dualpipev')


def make_schedule(
  kind: str,
  *,
  stages: int,
  microbatches: int,
  chunks: int | None = None,
  split_backward: bool = False,
) -> Schedule:
  """The schedule of that kind.

  Args:
    kind: one of `KINDS`.
    stages: pieces of the model, on all ranks together.
    microbatches: of a step; under dualpipe the first half enters at rank 0, the
      second at the last rank.
    chunks: stages a rank under interleaved (None: 2); no other kind takes it.
    split_backward: each full backward becomes its two halves, W right after I,
      so that a tick lasts as long as one half. Only for `UNIDIRECTIONAL`: the
      other kinds split some backwards by themselves.

  Raises:
    InputError: an unknown kind, or sizes that are not legal for it (see the
      module docstring); names the nearest legal ones.
  """
  ranks = check_sizes(kind, stages, microbatches, chunks)
  if split_backward and kind not in UNIDIRECTIONAL:
    raise errors.InputError(
      f'split is for {", ".join(UNIDIRECTIONAL)}: {kind} splits its '
      'backwards by itself'
    )
  down = tuple(range(ranks))
  homes = (down * (stages // ranks),)
  match kind:
    case 'gpipe':
      orders = unidirectional.gpipe(ranks, microbatches)
    case '1f1b':
      orders = unidirectional.one_f_one_b(ranks, microbatches)
    case 'interleaved':
      orders = unidirectional.interleaved(ranks, microbatches, stages // ranks)
    case 'zb1p':
      orders = unidirectional.zb1p(ranks, microbatches)
    case 'dualpipe':
      homes = (down, down[::-1])
      orders = dualpipe.dualpipe(ranks, microbatches)
    case _:
      homes = (down + down[::-1],)
      orders = dualpipe.dualpipev(ranks, microbatches)
  if split_backward:
    orders = unidirectional.split_backwards(orders)
  return Schedule(
    kind=kind, microbatches=microbatches, homes=homes, orders=orders
  )


def stages_per_rank(kind: str, chunks: int | None = None) -> int:
  """Stages whose masters a rank holds; `chunks` as in `make_schedule`."""
  return {'interleaved': chunks or 2, 'dualpipev': 2}.get(kind, 1)


def check_sizes(
  kind: str, stages: int, microbatches: int, chunks: int | None = None
) -> int:
  """The number of ranks; raises as `make_schedule` does."""
  if kind not in KINDS:
    raise errors.InputError(f'kind={kind!r} must be one of: {", ".join(KINDS)}')
  if chunks is not None and kind != 'interleaved':
    raise errors.InputError(
      f'chunks={chunks} is for interleaved, not for {kind}'
    )
  if chunks is not None and chunks < 2:
    raise errors.InputError(
      f'chunks={chunks} must be >= 2: with one chunk it is 1f1b'
    )
  per_rank = stages_per_rank(kind, chunks)
  step = 2 if kind == 'dualpipe' else per_rank
  rule = f'a multiple of {step}' if step > 1 else '>= 1'
  _check_size('stages', stages, kind, step, step, rule)
  ranks = stages // per_rank
  least, step, rule = {
    'interleaved': (ranks, ranks, f'a multiple of stages / chunks = {ranks}'),
    'zb1p': (ranks, 1, f'>= stages = {stages}'),
    'dualpipe': (2 * ranks, 2, f'even and >= 2 * stages = {2 * stages}'),
    'dualpipev': (2 * ranks, 1, f'>= stages = {stages}'),
  }.get(kind, (1, 1, '>= 1'))
  _check_size('microbatches', microbatches, kind, least, step, rule)
  return ranks


def _check_size(
  name: str, value: int, kind: str, least: int, step: int, rule: str
) -> None:
  """Legal sizes are the multiples of `step` from `least` on."""
  if value >= least and value % step == 0:
    return
  below = value - value % step
  nearest = f'{below} and {below + step} are the nearest'
  if value < least:
    nearest = f'{least} is the nearest'
  raise errors.InputError(
    f'{name}={value} must be {rule} under {kind}: {nearest}'
  )


def parameter_copies(schedule: Schedule) -> list[int]:
  """Parameters of each rank, in shares of the model (TR table 2).

  A share is one stage or, under interleaved, all stages of a rank. DualPipe has
  every stage on two ranks. DualPipeV has two stages on each of half as many
  ranks, and no stage twice.
  """
  share = schedule.stages // schedule.ranks
  if schedule.kind != 'interleaved':
    share = 1
  return [len(schedule.held(rank)) // share for rank in range(schedule.ranks)]


def closed_form_bubble(
  kind: str,
  *,
  ranks: int,
  f: Number = 1,
  b: Number = 2,
  w: Number = 1,
  fb: Number | None = None,
  split_backward: bool = False,
) -> Number:
  """The bubble by formula, for equal stages and no time between ranks.

  The module docstring says for which times it is exact. With `split_backward`
  no rank waits for a weight half: (P-1)(f+b-w), exact except for interleaved
  with w > f.

  Args:
    f: of one stage, as in `simulate.Times`; likewise the other times.
  """
  overlapped = f + b if fb is None else fb
  match kind:
    case 'gpipe' | '1f1b' | 'interleaved':
      return (ranks - 1) * (f + b - (w if split_backward else 0))
    case 'zb1p':
      return (ranks - 1) * (f + b - 2 * w)
    case 'dualpipe':
      return (ranks // 2 - 1) * (overlapped + b - 3 * w)
    case 'dualpipev':
      return (ranks - 1) * (overlapped + b - 3 * w)
  raise errors.InputError(f'kind={kind!r} must be one of: {", ".join(KINDS)}')
