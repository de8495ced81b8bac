"""Opens whatever holds a model: a training workdir or a Hugging Face folder.

Warm starts, export and inference read parameters through this module only.
`describe` reads the settings, `open_source` adds the parameters as arrays that
are read from disk slice by slice, `to_devices` reads them.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from dsv3_jax import config, config_files, errors
from dsv3_jax.checkpoint import fp8_blocks, lazy_array, store
from dsv3_jax.checkpoint.hf import generation_config, importer
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.checkpoint.hf import reader as hf_reader
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data import tokenizer_files
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model

Leaves = hf_reader.Leaves


def describe(
  directory: str | pathlib.Path, base: Mapping[str, Any]
) -> tuple[config.Config, tokenizers.Tokenizer | None]:
  """The settings and the tokenizer of a model; no weight is read.

  Args:
    directory: a workdir or a Hugging Face folder.
    base: every setting that a Hugging Face folder does not name.

  Raises:
    InputError: there is no model, or its settings cannot be read.
  """
  directory = pathlib.Path(directory)
  if is_hf_folder(directory):
    with shards.Folder(directory) as folder:
      cfg = importer.read_config(folder, base)
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
) -> Iterator[tuple[config.Config, Leaves]]:
  """The settings of a model and its parameters, which are not read yet.

  Hashes are checked before this yields.

  Args:
    directory: a workdir or a Hugging Face folder.
    base: every setting that a Hugging Face folder does not name.
    step: of a workdir; -1 is the newest.
    ema: of a workdir: the average of the weights (TR 3.2.3) in their place.
    keep_fp8: FP8 tensors of a Hugging Face folder stay `Quantized`; those of a
      workdir always do.

  Raises:
    InputError: there is no model, no such step, no average, or damage.
  """
  if not is_hf_folder(directory):
    with _open_workdir(directory, step, ema) as (cfg, leaves):
      yield cfg, leaves
    return
  if step >= 0 or ema:
    raise errors.InputError(f'{directory} has neither steps nor an average')
  with importer.open_folder(directory, base, keep_fp8) as (cfg, leaves):
    yield cfg, leaves


def mark(directory: pathlib.Path, step: int = -1, ema: bool = False) -> str:
  """A string that identifies the weights that `open_source` would open.

  It changes with the step, with a step's content, and with the files of a
  Hugging Face folder (names, sizes, times).

  Raises:
    CheckpointError: a workdir has no such step.
  """
  if is_hf_folder(directory):
    files = sorted(directory.glob('*.safetensors'))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f'{directory.absolute()} {stats}'
  checkpoints = store.Store(directory / 'checkpoints', keep=1)
  with contextlib.closing(checkpoints):
    newest = checkpoints.latest() or 0
    return f'{checkpoints.mark(newest if step < 0 else step)} {ema}'


def is_hf_folder(directory: pathlib.Path) -> bool:
  """True if there is a `config.json` of transformers."""
  path = directory / 'config.json'
  return path.exists() and 'model_type' in shards.read_json(path)


def read_config(directory: str | pathlib.Path) -> config.Config:
  """The settings that a workdir was started with.

  Raises:
    InputError: there is no readable `config.json`.
  """
  path = pathlib.Path(directory) / 'config.json'
  settings = config_files.read_json(path)
  try:
    return config.from_config_dict(settings)
  except errors.InputError as error:
    raise errors.InputError(f'{path}: {error}') from error


def read_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer | None:
  """`tokenizer.json`; None if there is none, as in some Hugging Face folders.

  It has the special tokens, the chat template and the ends of answers that the
  files beside it name.

  Raises:
    InputError: it is damaged, or one of those files is.
  """
  path = directory / 'tokenizer.json'
  if not path.exists():
    return None
  eos_ids = generation_config.read(directory).eos_ids
  settings = tokenizer_files.read(directory, eos_ids)
  return tokenizers.Tokenizer.from_file(path, settings)


def step_leaves(
  arrays: dict[tuple[str, ...], lazy_array.LazyArray],
  cfg: config.Config,
  ema: bool = False,
) -> Leaves:
  """The parameters (or their average) and biases among a step's arrays.

  Raises:
    InputError: one of them is missing or has another shape.
  """
  tiles = {
    leaf.path: place.tile
    for place in hf_names.places(cfg)
    for leaf in place.tensor.leaves
  }
  leaves: Leaves = {}
  for path, shape in hf_names.leaf_shapes(cfg).items():
    at = ('train', *path)
    if ema and path[0] == 'params':
      at = ('ema', *path[1:])
    if (*at, 'values') in arrays:
      values, scales = arrays[*at, 'values'], arrays[*at, 'scales']
      leaf: Any = fp8_blocks.Quantized(values, scales, tiles[path])
    else:
      leaf = arrays.get(at)
    if leaf is None or tuple(leaf.shape) != shape:
      has = 'none' if leaf is None else list(leaf.shape)
      raise errors.InputError(
        f'the checkpoint has {has} for {".".join(at)}, wanted {list(shape)}'
      )
    leaves[path] = leaf
  return leaves


def to_devices(
  leaves: Leaves,
  cfg: config.Config,
  dtype: str,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.ShardingRules = sharding.RULES,
) -> tuple[dict, model.RouterBiases]:
  """Reads parameters and router biases onto the devices, sharded.

  Args:
    dtype: of matrices; norms, gates and biases are f32.
    mesh: None is the first device.
    rules: which mesh axes shard a parameter; router biases are replicated.
  """
  specs = model.param_specs(model.build(cfg), rules)
  replicated = jax.sharding.PartitionSpec()
  tree: dict[str, Any] = {'params': {}, 'router': {}}
  for path, leaf in hf_names.dequantised(leaves, cfg).items():
    is_param = path[0] == 'params'
    spec = hf_names.get({'params': specs}, path) if is_param else replicated
    if mesh is None:
      target = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
      target = jax.sharding.NamedSharding(mesh, spec)
    is_f32 = not is_param or model.is_f32(path[-1])
    leaf = leaf.astype('float32' if is_f32 else dtype)
    hf_names.put(tree, path, lazy_array.to_device(leaf, target))
  return tree['params'], tree['router']


@contextlib.contextmanager
def _open_workdir(
  directory: pathlib.Path, step: int, ema: bool
) -> Iterator[tuple[config.Config, Leaves]]:
  """The settings of a workdir and the parameters of one of its steps."""
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
