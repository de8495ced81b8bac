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

  compute, master: mesh axes that cut each dim, '-' where none does. elements:
  of the whole; those on one device of the compute form, and of the master,
  which is also how the moments and their average are cut.
  """
  sizes = {axis: getattr(cfg.parallel, axis) for axis in sharding.AXES}
  plan = state_layout.make(cfg, sizes)

  form = lambda params: plan.from_model(params, model.init_router(cfg.model))
  shapes = model.param_shapes(model.build(cfg))
  params, router = jax.eval_shape(form, shapes)
  found = []
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), place in zip(leaves, zero.leaves(plan.placed), strict=True):
    found.append(
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
  for name, spec in plan.router_specs().items():
    shape = router[name].shape
    found.append(
      {
        'array': f'router.{name}',
        'shape': 'x'.join(map(str, shape)),
        'compute': _spec(spec),
        'master': _spec(spec),
        'elements': math.prod(shape),
      }
    )
  return found


def totals(found: list[Row]) -> Row:
  """Sums of the last columns."""
  names = ('elements', 'compute_per_device', 'master_per_device')
  sums = {name: sum(row.get(name, 0) for row in found) for name in names}
  return {'array': 'all', 'shape': '', 'compute': '', 'master': ''} | sums


def _spec(spec: sharding.Spec) -> str:
  each = ['+'.join(sharding.axes_of(axes)) or '-' for axes in spec]
  return ' '.join(each) or '-'


def _local(shape, spec: sharding.Spec, sizes: Mapping[str, int]) -> int:
  parts = [sizes[a] for axes in spec for a in sharding.axes_of(axes)]
  return int(math.prod(shape) // np.prod(parts, dtype=np.int64))


def render(cfg: config.Config, *, as_json: bool) -> str:
  """The table and its sums, for people or as one JSON object."""
  found = rows(cfg)
  if as_json:
    return json.dumps({'arrays': found, 'total': totals(found)})
  lines = [
    list(_COLUMNS),
    *(
      [str(row.get(n, '')) for n in _COLUMNS] for row in [*found, totals(found)]
    ),
  ]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  pad = lambda line: '  '.join(
    cell.rjust(width) if at > 3 else cell.ljust(width)
    for at, (cell, width) in enumerate(zip(line, widths, strict=True))
  )
  return '\n'.join(pad(line).rstrip() for line in lines)
