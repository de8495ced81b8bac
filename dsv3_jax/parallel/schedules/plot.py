"""A picture of a schedule: a row a rank, each action as wide as its time."""

import dataclasses
import itertools
import os

import matplotlib.axes
import matplotlib.collections
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches

from dsv3_jax.parallel.schedules import actions, report

# Label, and the colour of a rank's first chunk; others are darker.
_LOOKS = {
  actions.FORWARD: ('forward', '#f7b955'),
  actions.BACKWARD: ('full backward', '#79c99e'),
  actions.INPUT: ('input half', '#7fd3de'),
  actions.WEIGHT: ('weight half', '#9db4ee'),
}
_IDLE = '#ececec'
_DARKEST = 0.5  # how much of the colour the last chunk loses
_FONT = 7.0  # points
_ROW = 0.42  # inches a rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
  """One rectangle; times to the right, ranks down."""

  kind: str
  chunk: int
  left: float
  right: float
  top: float
  bottom: float
  microbatch: int


def boxes(simulated: report.SimulatedSchedule) -> list[Box]:
  """What to draw; an overlapped forward is above its backward."""
  drawn = []
  schedule, timeline = simulated.schedule, simulated.timeline
  for rank, order in enumerate(schedule.orders):
    held = schedule.held(rank)
    when = timeline.starts[rank], timeline.ends[rank]
    for action, start, end in zip(order, *when, strict=True):
      passes = [(action.kind, action.forward or action.backward)]
      if action.kind == actions.OVERLAPPED:
        passes = [
          (actions.FORWARD, action.forward),
          (actions.BACKWARD, action.backward),
        ]
      for place, (kind, task) in enumerate(passes):
        box = Box(
          kind=kind,
          chunk=held.index(task.stage),
          left=float(start),
          right=float(end),
          top=rank + place / len(passes),
          bottom=rank + (place + 1) / len(passes),
          microbatch=task.microbatch,
        )
        drawn.append(box)
  return drawn


def save(simulated: report.SimulatedSchedule, path: str | os.PathLike) -> None:
  """Writes the picture, in the format of the path's ending."""
  schedule, total = simulated.schedule, float(simulated.timeline.total)
  drawn = boxes(simulated)
  per_unit = 0.25 * len(drawn) / sum(box.right - box.left for box in drawn)
  inner = min(max(7.0, per_unit * 1.5 * total), 30.0)
  chunks, rows = len(schedule.held(0)), _ROW * schedule.ranks
  below = 0.65 + 0.17 * chunks
  width, height = inner + 0.8, rows + below + 0.6
  figure = matplotlib.figure.Figure(figsize=(width, height), dpi=140)
  axes = figure.add_axes(
    (0.65 / width, below / height, inner / width, rows / height)
  )
  axes.set(xlim=(0, total), ylim=(schedule.ranks, 0), xlabel='time')
  axes.set_yticks(
    [rank + 0.5 for rank in range(schedule.ranks)],
    [f'rank {rank}' for rank in range(schedule.ranks)],
  )
  axes.tick_params(axis='y', length=0)
  axes.set_facecolor(_IDLE)
  axes.spines[['top', 'right']].set_visible(False)
  _fill(axes, drawn, chunks)
  _number(axes, drawn, chunks, 72 * inner / total)
  for rank in range(1, schedule.ranks):
    axes.axhline(rank, color='white', linewidth=2.5)
  _legend(figure, drawn, schedule)
  axes.set_title(_title(simulated), fontsize=10, loc='left')
  figure.savefig(path)


def _title(simulated: report.SimulatedSchedule) -> str:
  first, cost, memory, _ = report.summary(simulated).splitlines()
  return f'{first}\n{cost}; {memory}'


def _colour(kind: str, chunk: int, chunks: int) -> tuple[float, ...]:
  dark = _DARKEST * chunk / max(chunks - 1, 1)
  return tuple(
    (1 - dark) * channel
    for channel in matplotlib.colors.to_rgb(_LOOKS[kind][1])
  )


def _fill(axes: matplotlib.axes.Axes, drawn: list[Box], chunks: int) -> None:
  corners = [
    [(b.left, b.top), (b.right, b.top), (b.right, b.bottom), (b.left, b.bottom)]
    for b in drawn
  ]
  colours = [_colour(b.kind, b.chunk, chunks) for b in drawn]
  axes.add_collection(
    matplotlib.collections.PolyCollection(
      corners, facecolors=colours, edgecolors='white', linewidths=0.5
    )
  )


def labels(drawn: list[Box], points: float) -> list[str]:
  """The micro-batch of each box, or nothing where it does not fit.

  Args:
    points: the width of a time of 1.
  """
  fits = lambda box, label: (
    (box.right - box.left) * points > (0.62 * _FONT * len(label) + 1.5)
  )
  pairs = [(box, str(box.microbatch)) for box in drawn]
  return [label if fits(box, label) else '' for box, label in pairs]


def _number(
  axes: matplotlib.axes.Axes, drawn: list[Box], chunks: int, points: float
) -> None:
  for box, label in zip(drawn, labels(drawn, points), strict=True):
    if label:
      axes.text(
        (box.left + box.right) / 2,
        (box.top + box.bottom) / 2,
        label,
        fontsize=_FONT,
        color='black' if box.chunk / chunks < 0.5 else 'white',
        ha='center',
        va='center_baseline',
      )


def _legend(
  figure: matplotlib.figure.Figure, drawn: list[Box], schedule: actions.Schedule
) -> None:
  """A column a kind, a row a chunk."""
  chunks = len(schedule.held(0))
  name = 'direction' if len(schedule.homes) > 1 else 'chunk'
  used = {box.kind for box in drawn}
  kinds = [kind for kind in _LOOKS if kind in used]
  keys = [(_IDLE, 'idle')] + [('none', '')] * (chunks - 1)
  for kind, chunk in itertools.product(kinds, range(chunks)):
    which = f', {name} {chunk}' if chunks > 1 else ''
    keys.append((_colour(kind, chunk, chunks), _LOOKS[kind][0] + which))
  figure.legend(
    handles=[
      matplotlib.patches.Patch(color=colour, label=label)
      for colour, label in keys
    ],
    loc='lower center',
    ncols=len(kinds) + 1,
    fontsize=8,
    frameon=False,
  )
