"""Opens a Hugging Face folder, and writes a workdir from one."""

import contextlib
import copy
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import fp8_blocks, full_disk, partial_folder, store
from dsv3_jax.checkpoint.hf import config as hf_config
from dsv3_jax.checkpoint.hf import kept_files
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.checkpoint.hf import reader as hf_reader
from dsv3_jax.checkpoint.safetensors import reader as shards

Leaves = hf_reader.Leaves
_FULL = 'nothing of it is left, and --hf is as it was; free space, and repeat'
_MOST_ALONE = 10**6  # of every dim and count of a config without tensors


@contextlib.contextmanager
def open_folder(
  directory: pathlib.Path, base: Mapping[str, Any], keep_fp8: bool = False
) -> Iterator[tuple[config.Config, Leaves]]:
  """The settings and the parameters of a folder, checked but not read.

  Args:
    base: every setting that `config.json` does not name.
    keep_fp8: FP8 tensors stay `Quantized`; else they are dequantised to f32.

  Raises:
    InputError: something in the folder is wrong; names file and tensor.
  """
  with shards.Folder(directory) as folder:
    cfg = read_config(folder, base)
    leaves = hf_reader.open_folder(folder, cfg, keep_fp8)
    folder.verify()
    hf_reader.check_copies(folder, cfg.model)
    yield cfg, leaves


def read_config(
  folder: shards.Folder, base: Mapping[str, Any]
) -> config.Config:
  """`base` with the model's shape from the folder's `config.json`.

  Raises:
    InputError: it is damaged, or describes a model that is not built.
  """
  where = folder.directory / 'config.json'
  most = sum(entry.nbytes for entry in folder.entries.values())
  settings = hf_config.read(where, most)
  settings['mtp.depth'] = hf_reader.mtp_depth(folder)
  return _config_of(settings, where, base)


def read_config_alone(
  where: pathlib.Path, base: Mapping[str, Any]
) -> config.Config:
  """The same from a `config.json` without tensors, which is trusted.

  Args:
    where: the file, or its folder.

  Raises:
    InputError: see `read_config`.
  """
  where = where / 'config.json' if where.is_dir() else where
  return _config_of(hf_config.read(where, _MOST_ALONE), where, base)


def _config_of(
  settings: Mapping[str, Any], where: pathlib.Path, base: Mapping[str, Any]
) -> config.Config:
  """`base` with settings of the model."""
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
  sample = body['sample']
  sample['max_new_tokens'] = min(sample['max_new_tokens'], max(1, length // 2))
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
  """Writes a workdir that `dsv3_jax.load` and `dsv3 export` read.

  Args:
    dtype: 'float32', 'bfloat16', or 'fp8': FP8 tensors of the folder keep their
      values and scales, all others become 'bfloat16'.

  Raises:
    InputError: something in the folder is wrong, or `output` exists.
    FullDiskError: nothing is left behind.
  """
  directory, output = pathlib.Path(directory), pathlib.Path(output)
  partial = partial_folder.path(output)
  if any(partial.glob(f'*{shards.SUFFIX}')):
    raise errors.InputError(
      f'{partial} is of an interrupted export: remove it, or name another '
      '--output'
    )
  with open_folder(directory, base, keep_fp8=dtype == 'fp8') as (cfg, leaves):
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted import
    partial_folder.make(partial)
    try:
      with full_disk.reported(output, _FULL):
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
  """Writes step 0, the settings, and the files that are kept."""
  checkpoints = store.Store(partial / 'checkpoints', keep=1)
  with contextlib.closing(checkpoints):
    checkpoints.save(0, tree, {'progress': {'step': 0, 'tokens': 0}})
  text = config.to_json(cfg)
  (partial / 'config.json').write_text(text, encoding='utf-8')
  kept_files.write(partial, kept_files.read(directory))


def _tree(leaves: Leaves, dtype: str) -> dict[str, Any]:
  """The nested dict that a checkpoint holds."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    if isinstance(leaf, fp8_blocks.Quantized):
      leaf = {'values': leaf.values, 'scales': leaf.scales}
    else:
      low = dtype != 'float32' and path[0] == 'params'
      leaf = leaf.astype(jnp.bfloat16 if low else jnp.float32)
    hf_names.put(tree, ('train', *path), leaf)
  return tree
