"""From a Hugging Face folder to a workdir, or straight onto the devices."""

import contextlib
import copy
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config, errors, sharding
from dsv3_jax.checkpoint import hf, hf_config, hf_read, lazy, shards, store
from dsv3_jax.nn import model
from dsv3_jax.ops import fp8

Leaves = hf_read.Leaves


def is_folder(directory: pathlib.Path) -> bool:
  """True if there is a `config.json` of transformers' kind."""
  path = directory / 'config.json'
  return path.exists() and 'model_type' in shards.read_json(path)


@contextlib.contextmanager
def opened(
  directory: pathlib.Path, base: Mapping[str, Any], keep_fp8: bool = False
) -> Iterator[tuple[config.Config, Leaves]]:
  """The experiment and the parameters of a folder, all checked.

  Args:
    base: every setting that `config.json` does not name.

  Raises:
    InputError: something in the folder is wrong; names file and tensor.
  """
  with shards.Folder(directory) as folder:
    cfg = experiment(folder, base)
    leaves = hf_read.open_folder(folder, cfg, keep_fp8)
    folder.verify()
    hf_read.check_copies(folder, cfg.model)
    yield cfg, leaves


def experiment(folder: shards.Folder, base: Mapping[str, Any]) -> config.Config:
  """`base` with the shape that `config.json` tells.

  Raises:
    InputError: it is damaged, or tells of a model that is not built.
  """
  where = folder.directory / 'config.json'
  most = sum(entry.nbytes for entry in folder.entries.values())
  settings = hf_config.read(where, most)
  settings['mtp.depth'] = hf_read.mtp_depth(folder)
  body = copy.deepcopy(dict(base))
  for name, value in settings.items():
    node = body['model']
    *path, last = name.split('.')
    for key in path:
      node = node[key]
    node[last] = value
  length = body['model']['max_seq_len']
  body['data']['tokenizer'] = 'tokenizer.json'
  body['data']['seq_len'] = min(body['data']['seq_len'], length)
  body['eval']['stride'] = min(body['eval']['stride'], length)
  room = body['sample']
  room['max_new_tokens'] = min(room['max_new_tokens'], max(1, length // 2))
  try:
    return config.from_config_dict(body)
  except errors.InputError as error:
    raise errors.InputError(f'{where}: {error}') from error


def to_workdir(
  directory: str | pathlib.Path,
  output: str | pathlib.Path,
  base: Mapping[str, Any],
  dtype: str = 'float32',
) -> None:
  """Writes a workdir that `load` and `export` take, chunk by chunk.

  Args:
    dtype: 'float32', 'bfloat16', or 'fp8': what is FP8 in the folder is kept as
      it is, with its scales, and the rest becomes 'bfloat16'.

  Raises:
    InputError: something in the folder is wrong, or `output` exists.
  """
  directory, output = pathlib.Path(directory), pathlib.Path(output)
  if output.exists():
    raise errors.InputError(f'--output={output} exists: name another')
  partial = output.with_name(output.name + '.partial')
  with opened(directory, base, keep_fp8=dtype == 'fp8') as (cfg, leaves):
    try:
      shutil.rmtree(partial, ignore_errors=True)  # of an earlier try
      partial.mkdir(parents=True)
    except OSError as error:
      raise errors.InputError(
        f'--output={output} cannot be written ({error.strerror})'
      ) from error
    try:
      _fill(partial, directory, cfg, _tree(leaves, dtype))
      partial.rename(output)
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise


def _fill(
  partial: pathlib.Path,
  directory: pathlib.Path,
  cfg: config.Config,
  tree: dict[str, Any],
) -> None:
  """Step 0, its configuration, and the tokenizer if there is one."""
  checkpoints = store.Store(partial / 'checkpoints', keep=1)
  with contextlib.closing(checkpoints):
    checkpoints.save(0, tree, {'progress': {'step': 0, 'tokens': 0}})
  text = config.to_json(cfg)
  (partial / 'config.json').write_text(text, encoding='utf-8')
  if (directory / 'tokenizer.json').exists():
    shutil.copyfile(directory / 'tokenizer.json', partial / 'tokenizer.json')


def _tree(leaves: Leaves, dtype: str) -> dict[str, Any]:
  """The nested dict that a checkpoint holds."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for key in ('train', *path[:-1]):
      node = node.setdefault(key, {})
    if isinstance(leaf, fp8.Quantized):
      leaf = {'values': leaf.values, 'scales': leaf.scales}
    else:
      low = dtype != 'float32' and path[0] == 'params'
      leaf = leaf.astype(jnp.bfloat16 if low else jnp.float32)
    node[path[-1]] = leaf
  return tree


def of_step(
  arrays: dict[tuple[str, ...], lazy.LazyArray],
  cfg: config.Config,
  ema: bool = False,
) -> Leaves:
  """The parameters (or their average) and biases among a step's arrays.

  Raises:
    InputError: one of them is missing or has another shape.
  """
  tiles = {
    leaf.path: place.tile
    for place in hf.places(cfg)
    for leaf in place.tensor.leaves
  }
  leaves: Leaves = {}
  for path, shape in hf.leaf_shapes(cfg).items():
    at = ('train', *path)
    if ema and path[0] == 'params':
      at = ('ema', *path[1:])
    if (*at, 'values') in arrays:
      values, scales = arrays[*at, 'values'], arrays[*at, 'scales']
      found: Any = fp8.Quantized(values, scales, tiles[path])
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
  leaves: Leaves,
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
  for path, leaf in hf.dequantised(leaves, cfg).items():
    spec = hf.get({'params': specs}, path) if path[0] == 'params' else whole
    place = one if mesh is None else jax.sharding.NamedSharding(mesh, spec)
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    kept = path[0] == 'router' or model.is_f32(path[-1])
    leaf = leaf.astype('float32' if kept else dtype)
    node[path[-1]] = lazy.to_device(leaf, place)
  return tree['params'], tree['router']
