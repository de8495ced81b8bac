"""A fresh run that starts from another run's weights (TR 4.3).

It takes the parameters and router biases of the other run's newest step.
Moments, average, position in the data and step begin anew. Once it has a step
of its own it resumes from that, and the other run is not needed.
"""

import contextlib
import pathlib

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import lazy_array, source, store
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.distributed import processes
from dsv3_jax.training import step as steps

Leaves = source.Leaves


def start_directory(
  cfg: config.Config, workdir: pathlib.Path
) -> pathlib.Path | None:
  """The workdir to start from; None if there is none, or no start."""
  checkpoints = store.Store(workdir / 'checkpoints', cfg.checkpoint.keep)
  with contextlib.closing(checkpoints):
    if not cfg.checkpoint.init_from or checkpoints.latest() is not None:
      return None
  directory = pathlib.Path(cfg.checkpoint.init_from)
  with processes.propagate_errors('init_from'):
    if not directory.is_dir():
      raise errors.InputError(
        f'checkpoint.init_from={str(directory)!r} cannot be read: '
        'name a workdir'
      )
  return directory


def read(cfg: config.Config, directory: pathlib.Path) -> Leaves:
  """Parameters and biases, of checked hashes and shapes, not yet read.

  Raises:
    InputError: no workdir with a whole step, or one of another model.
  """
  setting = f'checkpoint.init_from={str(directory)!r}'
  try:
    with source.open_source(directory, {}) as (_, leaves):
      pass
  except errors.InputError as error:
    raise errors.InputError(f'{setting}: {error}') from error
  wanted = hf_names.leaf_shapes(cfg)
  for path in dict.fromkeys([*wanted, *leaves]):
    shape = tuple(leaves[path].shape) if path in leaves else None
    if shape != wanted.get(path):
      raise errors.InputError(
        f'{setting}: its {".".join(path)} is {_spell(shape)}, wanted '
        f'{_spell(wanted.get(path))}: model must be as there'
      )
  return leaves


def start(
  trainer: steps.Trainer, state: steps.State, leaves: Leaves
) -> steps.State:
  """A fresh state with these weights, each read where its master is."""
  places, tree = trainer.model_shardings(), {'params': {}, 'router': {}}
  for path, leaf in hf_names.dequantised(leaves, trainer.cfg).items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    leaf = leaf.astype('float32')
    node[path[-1]] = lazy_array.to_device(leaf, hf_names.get(places, path))
  return state | trainer.weights_from_model(tree)


def _spell(shape: tuple[int, ...] | None) -> str:
  return 'none' if shape is None else str(list(shape))
