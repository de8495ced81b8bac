"""Reads a folder of the published layout as our parameters.

`open_folder` checks names, shapes and dtypes of all tensors against the model.
Each parameter is then a `LazyArray`: a slice is read, checked for non-finite
values, dequantised and transposed on demand. Folders with the names of the
released inference code (`wq_a`, `ffn.experts.0.w1`) are read as well.
"""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import fp8_blocks, lazy_array
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.checkpoint.safetensors import finite
from dsv3_jax.checkpoint.safetensors import reader as shards

Leaves = dict[tuple[str, ...], lazy_array.LazyArray | fp8_blocks.Quantized]

_FLOATS = ('F32', 'BF16', 'F16')
_SCALE = '_scale_inv'  # suffix of the weight's name
# Part of a published name -> part of the inference code's name.
_OFFICIAL = {
  'lm_head': 'head',
  'embed_tokens': 'embed',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'self_attn': 'attn',
  'mlp': 'ffn',
  'q_proj': 'wq',
  'q_a_proj': 'wq_a',
  'q_a_layernorm': 'q_norm',
  'q_b_proj': 'wq_b',
  'kv_a_proj_with_mqa': 'wkv_a',
  'kv_a_layernorm': 'kv_norm',
  'kv_b_proj': 'wkv_b',
  'o_proj': 'wo',
  'gate_proj': 'w1',
  'down_proj': 'w2',
  'up_proj': 'w3',
  'e_score_correction_bias': 'bias',
}
_MTP = re.compile(r'model\.layers\.(\d+)\.eh_proj\.weight')
_ROTARY = re.compile(r'.*\.rotary_emb\.inv_freq')  # a table, not a weight


def official_name(name: str) -> str:
  """The inference code's name of a tensor of the main model."""
  parts = name.removeprefix('model.').split('.')
  return '.'.join(_OFFICIAL.get(part, part) for part in parts)


def mtp_depth(folder: shards.Folder) -> int:
  """Number of layers with an eh_proj, whatever `config.json` claims."""
  return sum(bool(_MTP.fullmatch(name)) for name in folder.entries)


def open_folder(
  folder: shards.Folder, cfg: config.Config, keep_fp8: bool = False
) -> Leaves:
  """Parameters and router biases by path, in the dtypes of the files.

  Args:
    keep_fp8: FP8 tensors become `Quantized` of LazyArrays, the two leaves of
      kv_b_proj with scales for each row; else they are dequantised to f32.

  Raises:
    InputError: a tensor is missing, surplus, or of another shape or dtype.
      Later, from the LazyArrays: a value or scale is not finite.
  """
  files = _names(folder, cfg.model)  # first, as it bounds the model's size
  places = hf_names.places(cfg)
  _check(folder, places, files)
  sources: dict[tuple[str, ...], dict] = {}
  for place in places:
    if place.tensor.copy:
      continue
    for part, leaf in enumerate(place.tensor.leaves):
      piece = _Piece(folder, files[place.tensor.name], place, part)
      sources.setdefault(leaf.path, {})[leaf.index] = piece
  return {
    path: _leaf(sources[path], shape, keep_fp8)
    if path in sources
    else _zeros(shape)
    for path, shape in hf_names.leaf_shapes(cfg).items()
  }


def _zeros(shape: tuple[int, ...]) -> lazy_array.LazyArray:
  """Router biases of a model that has none."""
  read = lambda slices: np.zeros([s.stop - s.start for s in slices], 'f4')
  return lazy_array.LazyArray(shape, np.dtype(np.float32), read, shape)


def _leaf(
  pieces: dict, shape: tuple[int, ...], keep_fp8: bool
) -> lazy_array.LazyArray | fp8_blocks.Quantized:
  """One parameter, stacked over its layers and experts."""
  lead, first = len(next(iter(pieces))), next(iter(pieces.values()))
  ones = (1,) * lead

  def array(shape, dtype, read, chunk):
    stacked = _Stacked(pieces, np.dtype(dtype), read)
    return lazy_array.LazyArray(
      shape, stacked.dtype, stacked.read, ones + chunk
    )

  kinds = {piece.dtype for piece in pieces.values()}
  if len(kinds) > 1 or (not keep_fp8 and np.dtype(fp8_blocks.E4M3) in kinds):
    return array(shape, np.float32, _Piece.read, first.chunk)
  (kind,) = kinds
  if kind != fp8_blocks.E4M3:
    return array(shape, kind, _Piece.read_stored, first.chunk)
  scales = first.scales_shape
  return fp8_blocks.Quantized(
    array(shape, kind, _Piece.read_stored, first.chunk),
    array((*shape[:lead], *scales), np.float32, _Piece.read_scales, scales),
    first.place.tile,
  )


class _Piece(NamedTuple):
  """One leaf's part of one tensor of a file."""

  folder: shards.Folder
  name: str
  place: hf_names.TensorPlace
  part: int

  @property
  def dtype(self) -> np.dtype:
    return shards.DTYPES[self.folder.entries[self.name].dtype]

  @property
  def chunk(self) -> tuple[int, ...]:
    """Chunk of the leaf: full rows of the file, up to `CHUNK_BYTES` in f32."""
    shape, at = self.place.shapes[self.part], self.place.tensor.num_in
    step = 4 * math.prod(self.place.file_shape[1:]) * self.place.rows_per_step
    count = max(1, min(shape[at], lazy_array.CHUNK_BYTES // step))
    return (*shape[:at], count, *shape[at + 1 :])

  @property
  def scales_shape(self) -> tuple[int, int]:
    """Shape of the leaf's scales: blocks of inputs, blocks of outputs."""
    shape, at = self.place.shapes[self.part], self.place.tensor.num_in
    sides = (math.prod(shape[:at]), math.prod(shape[at:]))
    tile = self.place.tile
    return tuple(-(-n // t) for n, t in zip(sides, tile, strict=True))

  def read(self, slices: lazy_array.Slices) -> np.ndarray:
    """A slice of the leaf, in f32."""
    return self._read_span(slices, read_rows)

  def read_stored(self, slices: lazy_array.Slices) -> np.ndarray:
    """A slice of the leaf, as stored."""
    return self._read_span(slices, read_values)

  def read_scales(self, slices: lazy_array.Slices) -> np.ndarray:
    """A slice of the leaf's scales."""
    scales = read_scales(self.folder, self.name)
    if len(self.place.shapes) > 1:  # scales for each row, split like the rows
      rows = np.repeat(scales, fp8_blocks.TILE[0], axis=0)
      rows = rows[: self.place.file_shape[0]]
      widths = [shape[-1] for shape in self.place.shapes]
      heads = rows.reshape(-1, sum(widths), rows.shape[-1])
      halves = np.split(heads, np.cumsum(widths)[:-1], axis=1)
      scales = halves[self.part].reshape(-1, rows.shape[-1])
    return scales.T[slices]

  def _read_span(self, slices: lazy_array.Slices, read: Callable) -> np.ndarray:
    """Reads the rows that contain a slice, then slices them."""
    at, per = self.place.tensor.num_in, self.place.rows_per_step
    rows = slice(slices[at].start * per, slices[at].stop * per)
    ours = self.place.split(read(self.folder, self.name, rows))[self.part]
    spans = list(slices)
    spans[at] = slice(None)
    return ours[tuple(spans)]


class _Stacked(NamedTuple):
  """A leaf with leading dims for layers and experts, a piece for each."""

  pieces: dict[tuple[int, ...], _Piece]
  dtype: Any
  read_piece: Callable[[_Piece, lazy_array.Slices], np.ndarray]

  def read(self, slices: lazy_array.Slices) -> np.ndarray:
    lead = len(next(iter(self.pieces)))
    sizes = [s.stop - s.start for s in slices]
    if math.prod(sizes[:lead]) == 1:
      index = tuple(s.start for s in slices[:lead])
      piece = self.read_piece(self.pieces[index], slices[lead:])
      return piece.reshape(sizes)
    out = np.empty(sizes, self.dtype)
    for at in itertools.product(*(range(n) for n in sizes[:lead])):
      index = tuple(s.start + i for s, i in zip(slices[:lead], at, strict=True))
      out[at] = self.read_piece(self.pieces[index], slices[lead:])
    return out


def read_values(folder: shards.Folder, name: str, rows: slice) -> np.ndarray:
  """Rows of a tensor, as stored.

  Raises:
    InputError: one holds a NaN or an infinity.
  """
  values = folder.read(name, rows)
  finite.check(values, f'{folder.entries[name].path}: {name}', rows.start)
  return values


def read_scales(folder: shards.Folder, name: str) -> np.ndarray:
  """All scales of the weight `name`, in f32; 0 only for blocks of zeros.

  Raises:
    InputError: one is not finite or not > 0.
  """
  where = scale_name(folder, name)
  scales = folder.read(where).astype(np.float32)
  high, wide = fp8_blocks.TILE
  used = scales.copy()
  for i in np.flatnonzero((scales == 0).any(axis=1)):
    rows = folder.read(name, slice(i * high, (i + 1) * high))
    nonzero = (rows.view(np.uint8) & 0x7F).any(axis=0)  # without the sign
    starts = np.arange(0, len(nonzero), wide)
    filled = np.logical_or.reduceat(nonzero, starts)
    used[i, (scales[i] == 0) & ~filled] = 1.0
  finite.check_scales(used, f'{folder.entries[where].path}: {where}')
  return scales


def read_rows(folder: shards.Folder, name: str, rows: slice) -> np.ndarray:
  """Rows of a tensor in f32, dequantised if it has scales.

  Raises:
    InputError: see `read_values` and `read_scales`.
  """
  values = read_values(folder, name, rows)
  if scale_name(folder, name) is None:
    return values.astype(np.float32)
  scales = read_scales(folder, name)
  return fp8_blocks.dequantize_host(values, scales, first_row=rows.start)


def scale_name(folder: shards.Folder, name: str) -> str | None:
  """The name of a weight's block scales, if it has any."""
  for candidate in (name + _SCALE, name.removesuffix('weight') + 'scale'):
    if candidate != name and candidate in folder.entries:
      return candidate
  return None


def _names(folder: shards.Folder, cfg: config.ModelConfig) -> dict[str, str]:
  """Published name -> name in this folder; refuses the first missing one.

  An untrusted config may claim any number of layers and experts. This stops at
  the first one that the folder lacks, before memory is used for each.
  """
  official, files = 'embed.weight' in folder.entries, {}
  for tensor in hf_names.table(cfg):
    name = official_name(tensor.name) if official else tensor.name
    # Copies of shared matrices are optional.
    if name not in folder.entries and not tensor.copy:
      raise errors.InputError(f'{folder.directory}: tensor {name} is missing')
    files[tensor.name] = name
  return files


def _check(
  folder: shards.Folder,
  places: list[hf_names.TensorPlace],
  files: dict[str, str],
) -> None:
  """Checks that every tensor fits the model and that there is no other."""
  left = {name for name in folder.entries if not _ROTARY.fullmatch(name)}
  for place in places:
    name = files[place.tensor.name]
    if name in folder.entries:
      _check_entry(folder, name, place)
      left -= {name, scale_name(folder, name)}
  if left:
    raise errors.InputError(
      f'{folder.directory}: tensor {min(left)} is no part of this model'
    )


def check_copies(folder: shards.Folder, cfg: config.ModelConfig) -> None:
  """Checks that MTP modules have the main model's embedding and head.

  Raises:
    InputError: one of them differs.
  """
  tensors = list(hf_names.table(cfg))
  originals = {x.leaves: x.name for x in tensors if not x.copy}
  for tensor in tensors:
    name, original = tensor.name, originals[tensor.leaves]
    if not tensor.copy or name not in folder.entries:
      continue
    rows, columns = folder.entries[name].shape
    count = max(1, lazy_array.CHUNK_BYTES // (4 * columns))
    for start in range(0, rows, count):
      part = slice(start, start + count)
      if not np.array_equal(
        read_rows(folder, name, part), read_rows(folder, original, part)
      ):
        raise errors.InputError(
          f'{folder.entries[name].path}: {name} differs from {original}, which '
          'MTP modules share (TR 2.2): a model with its own is not built'
        )


def _check_entry(
  folder: shards.Folder, name: str, place: hf_names.TensorPlace
) -> None:
  entry, want = folder.entries[name], place.file_shape
  if entry.shape != want:
    raise errors.InputError(
      f'{entry.path}: {name} has shape {list(entry.shape)}, wanted {list(want)}'
    )
  scale = scale_name(folder, name)
  if entry.dtype == 'F8_E4M3' and scale is None:
    raise errors.InputError(f'{entry.path}: {name} is FP8 and has no scales')
  if entry.dtype not in (*_FLOATS, 'F8_E4M3') or (
    scale is not None and entry.dtype != 'F8_E4M3'
  ):
    raise errors.InputError(
      f'{entry.path}: {name} has dtype {entry.dtype}, wanted one of '
      f'{", ".join(_FLOATS)}, or F8_E4M3 with scales'
    )
  if scale is not None:
    scales = folder.entries[scale]
    blocks = tuple(-(-n // 128) for n in want)
    good = scales.dtype in ('F32', 'BF16') and scales.shape == blocks
    if not good or len(want) != 2:
      raise errors.InputError(
        f'{scales.path}: {scale} is {scales.dtype}{list(scales.shape)}, wanted '
        f'F32{list(blocks)} or BF16{list(blocks)}'
      )
