"""A plan as a PNG, and as one page of HTML that needs nothing else."""

import base64
import html
import io
import os
from typing import Any

import matplotlib.axes
import matplotlib.figure

from dsv3_jax.planning import device_memory, planner, run_cost

_COLOURS = (
  '#f7b955', '#79c99e', '#7fd3de', '#9db4ee', '#e59aa7', '#c3a6de', '#b0b0b0',
  '#d8c28c', '#8fb08c',
)  # fmt: skip
_STYLE = (
  'body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;color:#222}'
  'table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;'
  'border-bottom:1px solid #ddd}td.n{text-align:right}img{max-width:100%}'
)


def figure(planned: planner.Planned) -> matplotlib.figure.Figure:
  """Memory and time of a step as two bars."""
  drawn = matplotlib.figure.Figure(figsize=(9, 4.2), dpi=140)
  upper, lower = drawn.subplots(2, 1)
  capacity = planned.chip.hbm_bytes * (1 - device_memory.RESERVE) / 1e9
  sizes = {n: b / 1e9 for n, b in planned.memory.parts.items() if b}
  _bar(upper, sizes, 'GB')
  upper.axvline(capacity, color='#c0392b', linewidth=1.5)
  upper.set_xlim(0, 1.05 * max(capacity, sum(sizes.values())))
  verdict = 'fits' if planned.fits else 'does not fit'
  upper.set_title(
    f'memory of a chip: {sum(sizes.values()):.1f} GB, {verdict} '
    f'{capacity:.0f} of {planned.chip.hbm_bytes / 1e9:.0f} GB (line)',
    fontsize=10,
    loc='left',
  )
  _bar(lower, {n: s for n, s in planned.step.parts.items() if s}, 's')
  lower.set_title(
    f'step: {planned.step.seconds:.2f} s +- {planned.error:.0%}, '
    f'{planned.layout.describe()}',
    fontsize=10,
    loc='left',
  )
  drawn.tight_layout()
  return drawn


def _bar(
  axes: matplotlib.axes.Axes, parts: dict[str, float], unit: str
) -> None:
  left = 0.0
  for i, (name, size) in enumerate(parts.items()):
    label = f'{name}, {size:.2f} {unit}'
    colour = _COLOURS[i % len(_COLOURS)]
    axes.barh(0, size, left=left, color=colour, edgecolor='white', label=label)
    left += size
  axes.set_yticks([])
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.legend(
    loc='upper center',
    bbox_to_anchor=(0.5, -0.25),
    ncols=4,
    fontsize=7,
    frameon=False,
  )


def save_png(planned: planner.Planned, path: str | os.PathLike) -> None:
  figure(planned).savefig(path, format='png')


def page(
  planned: planner.Planned,
  summary: dict[str, Any],
  costs: list[run_cost.Row] = (),
) -> str:
  """One self-contained HTML page: figures, bars, assumptions."""
  image = io.BytesIO()
  figure(planned).savefig(image, format='png')
  source = base64.b64encode(image.getvalue()).decode('ascii')
  title = f'{planned.layout.devices:,} x {planned.chip.name}'
  scalars = {
    name: value
    for name, value in summary.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }
  body = [
    f'<h1>{html.escape(title)}</h1>',
    f'<p>{html.escape(planned.layout.describe())}</p>',
    f'<img alt="memory and time" src="data:image/png;base64,{source}">',
    _table(
      ('figure', 'value'),
      [(name, f'{value:,.6g}') for name, value in scalars.items()],
    ),
    f'<p>{html.escape(summary["memory_explained"])}</p>',
  ]
  if costs:
    rows = [
      (
        f'{row.name.strip()}, {row.unit}',
        f'{row.predicted:,.2f}',
        f'{row.published:,.2f}',
        f'{row.residual:+.1%}',
      )
      for row in costs
    ]
    body.append(_table(('cost', 'predicted', 'report', 'residual'), rows))
  items = ''.join(f'<li>{html.escape(x)}' for x in summary['assumptions'])
  body.append(f'<h2>Assumptions</h2><ul>{items}</ul>')
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
    f'{html.escape(title)}</title><style>{_STYLE}</style>'
    f'<body>{"".join(body)}</body></html>\n'
  )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  cells = ''.join(f'<th>{html.escape(x)}' for x in head)
  lines = [f'<tr>{cells}']
  for first, *rest in rows:
    values = ''.join(f'<td class="n">{html.escape(x)}' for x in rest)
    lines.append(f'<tr><td>{html.escape(first)}{values}')
  return f'<table>{"".join(lines)}</table>'
