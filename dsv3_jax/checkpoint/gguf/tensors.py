"""Tensors of a GGUF file, made of those of the Hugging Face layout.

Most have another name only. The experts of a layer are stacked to one tensor.
kv_b_proj is split for attention in the absorbed form:

  attn_k_b  [N, C, H]    a head's key matrix, transposed
  attn_v_b  [N, U, C]    a head's value matrix

Shapes are NumPy's, the last dim contiguous; GGUF lists dims in reverse. Norms,
router and router biases are f32 whatever the dtype, as llama.cpp computes them.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.checkpoint.safetensors import finite

KINDS = {
  'float32': gguf.GGMLQuantizationType.F32,
  'bfloat16': gguf.GGMLQuantizationType.BF16,
  'q8_0': gguf.GGMLQuantizationType.Q8_0,
}
_BLOCK = 32  # weights of Q8_0 that share a scale
_LARGEST = 127.0 * 65504.0  # of a block, whose scale is F16


class Piece(NamedTuple):
  """A range of steps of one tensor of the Hugging Face layout."""

  place: hf_names.TensorPlace
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class GgufTensor:
  """A tensor of the file, stacked of the places in their order.

  transposed: the heads of its one place are.
  """

  name: str
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  places: tuple[hf_names.TensorPlace, ...]
  transposed: bool = False

  @property
  def nbytes(self) -> int:
    """Size [bytes]."""
    block, size = gguf.GGML_QUANT_SIZES[self.kind]
    return int(np.prod(self.shape)) // block * size

  def pieces(self) -> Iterator[Piece]:
    """Pieces of bounded size, in the order of the file."""
    for place in self.places:
      for start, stop in place.pieces():
        yield Piece(place, start, stop)

  def read(self, piece: Piece, leaves: Any) -> np.ndarray:
    """The bytes of a piece.

    Raises:
      InputError: a weight is not finite, or too large for Q8_0.
    """
    place = piece.place
    rows = place.read(piece.start, piece.stop, leaves)
    rows = rows.astype(np.float32, copy=False)
    first = piece.start * place.rows_per_step
    finite.check(rows, place.tensor.name, first)
    if self.transposed:
      heads = rows.reshape(piece.stop - piece.start, -1, rows.shape[-1])
      rows = np.ascontiguousarray(heads.swapaxes(1, 2))
    return _encode(rows, self.kind, place.tensor.name)


def table(cfg: config.Config, dtype: str) -> list[GgufTensor]:
  """Every tensor of the file, in its order; MTP modules are not there.

  Args:
    dtype: of matrices: a key of `KINDS`.

  Raises:
    InputError: Q8_0 has no blocks of that width; names the tensor.
  """
  plain = dataclasses.replace(cfg.model.mtp, depth=0)
  net = dataclasses.replace(cfg.model, mtp=plain)
  places: dict[str, list[hf_names.TensorPlace]] = {}
  for place in hf_names.places(dataclasses.replace(cfg, model=net)):
    stacked = re.sub(r'\.experts\.\d+\.', '.experts.', place.tensor.name)
    places.setdefault(stacked, []).append(place)
  name_map = gguf.get_tensor_name_map(
    gguf.MODEL_ARCH.DEEPSEEK2, cfg.model.num_layers
  )
  rename = lambda name: name_map.get_name(name, ('.weight', '.bias'))
  tensors = []
  for name, parts in places.items():
    tensors += _tensors(name, parts, rename, KINDS[dtype])
  for tensor in tensors:
    if tensor.kind == KINDS['q8_0'] and tensor.shape[-1] % _BLOCK:
      raise errors.InputError(
        f'--format=gguf --dtype=q8_0: {tensor.name} has rows of '
        f'{tensor.shape[-1]}, which must be a multiple of {_BLOCK}'
      )
  return tensors


def _tensors(name, parts, rename, kind) -> Iterator[GgufTensor]:
  """What one tensor, or the tensors of one matrix of all experts, becomes."""
  name = name.replace('e_score_correction_bias', 'e_score_correction.bias')
  place = parts[0]
  if name.endswith('kv_b_proj.weight'):
    split = lambda i: place._replace(
      tensor=place.tensor._replace(leaves=place.tensor.leaves[i : i + 1]),
      shapes=place.shapes[i : i + 1],
    )
    (latent, heads, key), (_, _, value) = place.shapes
    keys = rename(name.replace('kv_b_proj', 'k_b_proj'))
    values = rename(name.replace('kv_b_proj', 'v_b_proj'))
    yield GgufTensor(keys, kind, (heads, latent, key), (split(0),), True)
    yield GgufTensor(values, kind, (heads, value, latent), (split(1),))
    return
  shape = place.file_shape
  if len(shape) == 1 or name.endswith('mlp.gate.weight'):
    kind = KINDS['float32']
  if '.experts.' in name:
    shape = (len(parts), *shape)
  yield GgufTensor(rename(name), kind, shape, tuple(parts))


def _encode(rows, kind, name: str) -> np.ndarray:
  """f32 rows as the bytes of a type."""
  if kind == KINDS['bfloat16']:
    rows = rows.astype(ml_dtypes.bfloat16)
    finite.check(rows, name)
  elif kind == KINDS['q8_0']:
    if np.max(np.abs(rows), initial=0.0) > _LARGEST:
      raise errors.InputError(
        f'{name} holds a weight above {_LARGEST:.3g}, the largest of q8_0'
      )
    rows = gguf.quants.quantize(rows, kind)
  return rows.reshape(-1).view(np.uint8)
