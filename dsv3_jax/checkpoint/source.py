"""Opens whatever holds a model: a training workdir or a Hugging Face folder.

Training, warm starts, export and inference all read parameters through here.
Nothing is read from disk until a leaf is asked for.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import fp8_blocks, lazy_array, store
from dsv3_jax.checkpoint.hf import importer
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model


def read_config(directory: str | pathlib.Path) -> config.Config:
  """The experiment that a workdir was started with.

  Raises:
    InputError: there is no readable `config.json`.
  """
  path = pathlib.Path(directory) / 'config.json'
  source = config.read_json(path)
  try:
    return config.from_config_dict(source)
  except errors.InputError as error:
    raise errors.InputError(f'{path}: {error}') from error


def read_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer | None:
  """`tokenizer.json`, which an imported model may lack.

  Raises:
    InputError: it is damaged.
  """
  path = directory / 'tokenizer.json'
  return tokenizers.Tokenizer.from_file(path) if path.exists() else None


def describe(
  directory: str | pathlib.Path, base: Mapping[str, Any]
) -> tuple[config.Config, tokenizers.Tokenizer | None]:
  """What `load` would load, without its weights, of which nothing is read.

  Raises:
    InputError: there is no such thing, or its settings cannot be read.
  """
  directory = pathlib.Path(directory)
  if is_hf_folder(directory):
    with shards.Folder(directory) as folder:
      cfg = importer.experiment(folder, base)
  else:
    cfg = read_config(directory)
  return cfg, read_tokenizer(directory)


@contextlib.contextmanager
def open_source(
  directory: pathlib.Path,
  base: Mapping[str, Any],
  *,
  step: int = -1,
  ema: bool = False,
  keep_fp8: bool = False,
) -> Iterator[tuple[config.Config, importer.Leaves]]:
  """The experiment and the parameters, yet unread, of what `load` loads.

  Args:
    keep_fp8: FP8 of a Hugging Face folder comes as `Quantized`; that of a
      workdir always does.

  Raises:
    InputError: see `load`.
  """
  if not is_hf_folder(directory):
    with _open_workdir(directory, step, ema) as found:
      yield found
    return
  if step >= 0 or ema:
    raise errors.InputError(f'{directory} has neither steps nor an average')
  with importer.opened(directory, base, keep_fp8) as found:
    yield found


def mark(directory: pathlib.Path, step: int = -1, ema: bool = False) -> str:
  """Differs for other weights: another step, a step made anew, other files."""
  if is_hf_folder(directory):
    files = sorted(directory.glob('*.safetensors'))
    told = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f'{directory.absolute()} {told}'
  checkpoints = store.Store(directory / 'checkpoints', keep=1)
  with contextlib.closing(checkpoints):
    newest = checkpoints.latest() or 0
    return f'{checkpoints.mark(newest if step < 0 else step)} {ema}'


@contextlib.contextmanager
def _open_workdir(
  directory: pathlib.Path, step: int, ema: bool
) -> Iterator[tuple[config.Config, importer.Leaves]]:
  """The experiment of a workdir and the parameters of one of its steps."""
  cfg = read_config(directory)
  if ema and not cfg.optim.ema_decay:
    raise errors.InputError('optim.ema_decay=0.0: this run kept no average')
  checkpoints = store.Store(directory / 'checkpoints', keep=cfg.checkpoint.keep)
  with contextlib.closing(checkpoints):
    newest = checkpoints.latest()
    if newest is None:
      raise errors.InputError(
        f'{checkpoints.directory} holds no committed step'
      )
    arrays = checkpoints.open(newest if step < 0 else step)
    yield cfg, step_leaves(arrays, cfg, ema)


def is_hf_folder(directory: pathlib.Path) -> bool:
  """True if there is a `config.json` of transformers' kind."""
  path = directory / 'config.json'
  return path.exists() and 'model_type' in shards.read_json(path)


def step_leaves(
  arrays: dict[tuple[str, ...], lazy_array.LazyArray],
  cfg: config.Config,
  ema: bool = False,
) -> importer.Leaves:
  """The parameters (or their average) and biases among a step's arrays.

  Raises:
    InputError: one of them is missing or has another shape.
  """
  tiles = {
    leaf.path: place.tile
    for place in hf_names.places(cfg)
    for leaf in place.tensor.leaves
  }
  leaves: importer.Leaves = {}
  for path, shape in hf_names.leaf_shapes(cfg).items():
    at = ('train', *path)
    if ema and path[0] == 'params':
      at = ('ema', *path[1:])
    if (*at, 'values') in arrays:
      values, scales = arrays[*at, 'values'], arrays[*at, 'scales']
      found: Any = fp8_blocks.Quantized(values, scales, tiles[path])
    else:
      found = arrays.get(at)
    if found is None or tuple(found.shape) != shape:
      has = 'none' if found is None else list(found.shape)
      raise errors.InputError(
        f'the checkpoint has {has} for {".".join(at)}, wanted {list(shape)}'
      )
    leaves[path] = found
  return leaves


def to_devices(
  leaves: importer.Leaves,
  cfg: config.Config,
  dtype: str,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.ShardingRules = sharding.RULES,
) -> tuple[dict, model.Router]:
  """Parameters and router biases, each at its place on the mesh.

  Args:
    dtype: of matrices; norms, gates and biases are f32.
    mesh: None is the first device.
    rules: which axes of the mesh shard a parameter.
  """
  specs = model.param_specs(model.build(cfg), rules)
  whole = jax.sharding.PartitionSpec()
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  tree: dict[str, Any] = {'params': {}, 'router': {}}
  for path, leaf in hf_names.dequantised(leaves, cfg).items():
    spec = (
      hf_names.get({'params': specs}, path) if path[0] == 'params' else whole
    )
    place = one if mesh is None else jax.sharding.NamedSharding(mesh, spec)
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    kept = path[0] == 'router' or model.is_f32(path[-1])
    leaf = leaf.astype('float32' if kept else dtype)
    node[path[-1]] = lazy_array.to_device(leaf, place)
  return tree['params'], tree['router']
