"""Where every array of a training state is, as a table (TR 3.2)."""

import json
import math
from collections.abc import Mapping

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from dsv3_jax.parallel import state_layout, zero

Row = dict[str, str | int]
_COLUMNS = (
  'array',
  'shape',
  'compute',
  'master',
  'elements',
  'compute_per_device',
  'master_per_device',
)


def rows(cfg: config.Config) -> list[Row]:
  """A row for every parameter and every other kind of state.

  compute, master: mesh axes over which each dim is sharded, '-' for none.
  elements: of the whole array; then those on one device of the compute form and
  of the master, whose sharding moments and average share.
  """
  sizes = {axis: getattr(cfg.parallel, axis) for axis in sharding.AXES}
  layout = state_layout.make(cfg, sizes)

  shapes = model.param_shapes(model.build(cfg))
  biases = jax.eval_shape(lambda: model.init_router_biases(cfg.model))
  params, router_biases = jax.eval_shape(layout.from_model, shapes, biases)
  table = []
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), place in zip(
    leaves, zero.leaves(layout.placed), strict=True
  ):
    table.append(
      {
        'array': '.'.join(str(key.key) for key in path),
        'shape': 'x'.join(map(str, leaf.shape)),
        'compute': _spec(place.compute),
        'master': _spec(place.master),
        'elements': math.prod(leaf.shape),
        'compute_per_device': _local(leaf.shape, place.compute, sizes),
        'master_per_device': _local(leaf.shape, place.master, sizes),
      }
    )
  for name, spec in layout.router_biases_specs().items():
    shape = router_biases[name].shape
    table.append(
      {
        'array': f'router.{name}',
        'shape': 'x'.join(map(str, shape)),
        'compute': _spec(spec),
        'master': _spec(spec),
        'elements': math.prod(shape),
      }
    )
  return table


def totals(table: list[Row]) -> Row:
  """Sums of the last columns."""
  names = ('elements', 'compute_per_device', 'master_per_device')
  sums = {name: sum(row.get(name, 0) for row in table) for name in names}
  return {'array': 'all', 'shape': '', 'compute': '', 'master': ''} | sums


def _spec(spec: sharding.Spec) -> str:
  dims = ['+'.join(sharding.axes_of(axes)) or '-' for axes in spec]
  return ' '.join(dims) or '-'


def _local(shape, spec: sharding.Spec, sizes: Mapping[str, int]) -> int:
  parts = [sizes[a] for axes in spec for a in sharding.axes_of(axes)]
  return int(math.prod(shape) // np.prod(parts, dtype=np.int64))


def render(cfg: config.Config, *, as_json: bool) -> str:
  """The table and its sums, for people or as one JSON object."""
  table = rows(cfg)
  if as_json:
    return json.dumps({'arrays': table, 'total': totals(table)})
  lines = [
    list(_COLUMNS),
    *(
      [str(row.get(n, '')) for n in _COLUMNS] for row in [*table, totals(table)]
    ),
  ]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  pad = lambda line: '  '.join(
    cell.rjust(width) if at > 3 else cell.ljust(width)
    for at, (cell, width) in enumerate(zip(line, widths, strict=True))
  )
  return '\n'.join(pad(line).rstrip() for line in lines)
