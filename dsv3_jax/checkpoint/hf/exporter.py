"""Writes parameters as a Hugging Face folder, piece by piece.

A shard file has its full size from the start and is filled in place, in pieces
of at most 32 MB of f32. Everything is written into `OUTPUT.partial`, with a
journal of the finished shards; one rename at the end makes it `OUTPUT`. An
export that was interrupted keeps its finished shards when it runs again.

  model-00001-of-00163.safetensors  model.safetensors.index.json  SHA256SUMS
  config.json  generation_config.json  tokenizer.json  tokenizer_config.json ...
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import fp8_blocks, full_disk, partial_folder
from dsv3_jax.checkpoint.hf import config as hf_config
from dsv3_jax.checkpoint.hf import generation_config, kept_files
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.checkpoint.safetensors import finite
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.checkpoint.safetensors import writer as shard_writer

_DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'fp8': 'BF16'}
# Linears that the published checkpoint holds in FP8 (TR 3.3.1): not the
# embedding, the head, the gate, norms, nor MTP's projection.
_FP8 = (
  *('q_proj', 'q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj'),
  *('o_proj', 'gate_proj', 'up_proj', 'down_proj'),
)
_JOURNAL = 'finished.json'
_FULL = (
  'its finished shards are safe; free space, and the same command goes on '
  'from them'
)

Leaves = Mapping[tuple[str, ...], Any]


class _Source(NamedTuple):
  """The leaves as stored, and with `Quantized` leaves dequantised to f32."""

  stored: Leaves
  plain: Leaves


def manifest(cfg: config.Config, dtype: str) -> list[shard_writer.TensorSpec]:
  """Name, dtype and shape of every tensor of an export; allocates nothing.

  Args:
    dtype: 'float32', 'bfloat16' or 'fp8'. Router biases are always f32.
  """
  specs = []
  for place in hf_names.places(cfg):
    specs += _specs(place, dtype)
  return specs


def without_mtp(
  cfg: config.Config, leaves: Leaves
) -> tuple[config.Config, Leaves]:
  """The main model alone, for readers that refuse the tensors of MTP."""
  mtp = dataclasses.replace(cfg.model.mtp, depth=0)
  net = dataclasses.replace(cfg.model, mtp=mtp)
  cfg = dataclasses.replace(cfg, model=net)
  return cfg, {path: leaves[path] for path in hf_names.leaf_shapes(cfg)}


def _specs(
  place: hf_names.TensorPlace, dtype: str
) -> list[shard_writer.TensorSpec]:
  """The tensor and, if it is FP8, its block scales."""
  name, shape = place.tensor.name, place.file_shape
  if name.endswith('e_score_correction_bias'):
    return [shard_writer.TensorSpec(name, 'F32', shape)]
  if dtype == 'fp8' and name.split('.')[-2] in _FP8:
    blocks = tuple(-(-n // 128) for n in shape)
    return [
      shard_writer.TensorSpec(name, 'F8_E4M3', shape),
      shard_writer.TensorSpec(name + '_scale_inv', 'F32', blocks),
    ]
  return [shard_writer.TensorSpec(name, _DTYPES[dtype], shape)]


def export(
  cfg: config.Config,
  leaves: Leaves,
  output: str | pathlib.Path,
  *,
  dtype: str = 'bfloat16',
  shard_bytes: int = 5_000_000_000,
  documents: Mapping[str, bytes] | None = None,
  source: str = '',
  progress: Callable[[str], None] = lambda line: None,
) -> None:
  """Writes the folder.

  Args:
    leaves: path -> array with `shape` and slicing: NumPy, JAX or LazyArray.
    dtype: of matrices: 'float32', 'bfloat16' or 'fp8'.
    shard_bytes: maximum size of a file, unless one tensor is larger.
    documents: file -> content; see `kept_files.documents`. `config.json` has
      the token ids of their `generation_config.json`.
    source: identifies the weights. An interrupted export resumes only if it is
      the same.
    progress: called with a line for each finished shard.

  Raises:
    InputError: `output` exists, the format cannot say what the model computes,
      or a weight is not finite (names the tensor).
    FullDiskError: finished shards are kept.
  """
  output = pathlib.Path(output)
  partial = partial_folder.path(output)
  body = hf_config.write(cfg, dtype)  # first, as it may refuse
  _check_biases(cfg, leaves)
  places = hf_names.places(cfg)
  of = {spec.name: p for p in places for spec in _specs(p, dtype)}
  planned = shard_writer.plan_shards(manifest(cfg, dtype), shard_bytes)
  names = shard_writer.shard_names(len(planned))
  mark = hashlib.sha256(repr((source, cfg.model, dtype, planned)).encode())
  digests = _begin(partial, mark.hexdigest())
  both = _Source(leaves, hf_names.dequantised(leaves, cfg))
  jobs = {
    name: functools.partial(_write_shard, partial / name, specs, of, both)
    for name, specs in zip(names, planned, strict=True)
  }
  files = dict(documents or {})
  body |= generation_config.token_ids(files)
  files['config.json'] = (json.dumps(body, indent=2) + '\n').encode()
  with full_disk.reported(partial, _FULL):
    try:
      _write_shards(partial, jobs, mark.hexdigest(), digests, progress)
    except errors.InputError as error:
      # Resuming would fail alike, unless the source could not be read just now.
      if not isinstance(error.__cause__, OSError):
        shutil.rmtree(partial)
      raise
    shard_writer.write_index(partial, planned)
    kept_files.write(partial, files)
    shard_writer.write_sums(partial, digests)
  (partial / _JOURNAL).unlink()
  partial.rename(output)


def _check_biases(cfg: config.Config, leaves: Leaves) -> None:
  """Checks that no router bias would be lost."""
  if hf_names.has_biases(cfg.model):
    return
  for path, leaf in leaves.items():
    if path[0] == 'router' and np.any(np.asarray(leaf[:])):
      raise errors.InputError(
        "router biases must be 0 with model.moe.score_func='softmax' to be "
        'exported: the format of V2 has none (train with optim.bias_rate 0)'
      )


def _write_shards(
  partial: pathlib.Path,
  jobs: Mapping[str, Callable[[], None]],
  mark: str,
  digests: dict[str, str],
  progress: Callable[[str], None],
) -> None:
  """Writes shards that have no digest; hashes one while writing the next."""

  def finish(name: str) -> None:
    if name not in digests:
      digest = shards.digest(partial / name)
      shard_writer.flush(partial / name)
      digests[name] = digest
      _note(partial, mark, digests)
    size = (partial / name).stat().st_size
    progress(f'{name}  {size / 1e9:.2f} GB')

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    last = None
    for name, write in jobs.items():
      if name not in digests:
        write()
      if last is not None:
        last.result()
      last = pool.submit(finish, name)
    last.result()


def _begin(partial: pathlib.Path, mark: str) -> dict[str, str]:
  """Makes the folder; returns digests of shards that can be kept."""
  partial_folder.make(partial)
  if any(path.is_dir() for path in partial.iterdir()):
    raise errors.InputError(
      f'{partial} is of an interrupted import: remove it, or name another '
      '--output'
    )
  try:
    old = json.loads((partial / _JOURNAL).read_text(encoding='utf-8'))
    same = old['mark'] == mark
  except (OSError, ValueError, KeyError, TypeError):
    same = False
  kept = old['digests'] if same else {}
  for path in partial.iterdir():
    if path.name not in kept:
      path.unlink()
  return {name: d for name, d in kept.items() if (partial / name).exists()}


def _note(partial: pathlib.Path, mark: str, digests: dict[str, str]) -> None:
  scratch = partial / f'.{_JOURNAL}'
  body = {'mark': mark, 'digests': digests}
  scratch.write_text(json.dumps(body), encoding='utf-8')
  scratch.replace(partial / _JOURNAL)


def _write_shard(
  path: pathlib.Path,
  specs: list[shard_writer.TensorSpec],
  of: dict[str, hf_names.TensorPlace],
  leaves: _Source,
) -> None:
  """Writes the tensors of one shard, on all cores."""
  workers = os.cpu_count() or 1
  with (
    shard_writer.ShardWriter(path, specs) as writer,
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
  ):
    waiting = collections.deque()
    for job in _jobs(specs, of, leaves, writer):
      waiting.append(pool.submit(*job))
      if len(waiting) > 2 * workers:  # bounds the memory
        waiting.popleft().result()
    while waiting:
      waiting.popleft().result()


def _jobs(specs, of, leaves, writer) -> Iterator[tuple]:
  """A function and its arguments for each piece of a weight and its scales."""
  here = {spec.name: spec for spec in specs}
  for name in dict.fromkeys(n.removesuffix('_scale_inv') for n in here):
    place = of[name]
    pair = (here.get(name), here.get(name + '_scale_inv'))
    for start, stop in place.pieces():
      yield _write_piece, pair, place, start, stop, leaves, writer


def _write_piece(pair, place, start, stop, leaves, writer) -> None:
  """Reads, transposes, converts and writes one piece of a tensor.

  Args:
    pair: specs of the weight and its scales; None for one in another file.
  """
  spec, scales = pair
  first = start * place.rows_per_step
  write_fp8 = scales is not None or spec.dtype == 'F8_E4M3'
  kept = [leaves.stored[leaf.path] for leaf in place.tensor.leaves]
  if write_fp8 and isinstance(kept[0], fp8_blocks.Quantized):
    values = {
      leaf.path: q.values
      for leaf, q in zip(place.tensor.leaves, kept, strict=True)
    }
    values = place.read(start, stop, values)
    scales_ij = None if start else _kept_scales(place, kept)
  else:
    values = place.read(start, stop, leaves.plain)
    if write_fp8:
      values = np.ascontiguousarray(values, np.float32)
      finite.check(values, place.tensor.name, first)
      values, scales_ij = fp8_blocks.quantize_host(values, place.tensor.name)
  if spec is not None:
    dtype = shards.DTYPES[spec.dtype]
    values = np.ascontiguousarray(values.astype(dtype, copy=False))
    finite.check(values, place.tensor.name, first)
    writer.write(spec.name, first, values)
  if scales is not None and scales_ij is not None:
    writer.write(scales.name, first // 128, scales_ij)


def _kept_scales(
  place: hf_names.TensorPlace, kept: list[fp8_blocks.Quantized]
) -> np.ndarray:
  """Block scales of a tensor whose leaves are FP8 already."""
  per_leaf = [
    np.asarray(q.scales[leaf.index])
    for leaf, q in zip(place.tensor.leaves, kept, strict=True)
  ]
  if len(per_leaf) == 1:
    return np.ascontiguousarray(per_leaf[0].T)
  # kv_b_proj: its leaves have a scale for each row. Joined by heads, the rows
  # of a block have equal scales again.
  heads = [
    x.T.reshape(-1, shape[-1], x.shape[0])
    for x, shape in zip(per_leaf, place.shapes, strict=True)
  ]
  rows = np.concatenate(heads, axis=1).reshape(-1, per_leaf[0].shape[0])
  return np.ascontiguousarray(rows[:: fp8_blocks.TILE[0]])
