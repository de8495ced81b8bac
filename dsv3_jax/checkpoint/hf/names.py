"""Maps our parameters to the published checkpoint's tensors and back.

`table(cfg)` lists every tensor of the Hugging Face layout with the parameters
(leaves) that it consists of. A `TensorPlace` adds the shapes and converts
slices of leaves to rows of the tensor and back. PyTorch stores a matrix as
[out, in] and flattens heads; our matrices have their inputs first and heads as
a dim. kv_b_proj holds, head by head, key and value matrix. MTP module k is
layer `num_layers + k`, with copies of embedding and head, which our modules
share with the main model (TR 2.2). RoPE dims are interleaved in both.
"""

import functools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.checkpoint import fp8_blocks, lazy_array
from dsv3_jax.nn import model

Tree = dict[str, Any]

_PIECE_BYTES = 32 << 20
_SQUARE = 256


class ParamLeaf(NamedTuple):
  """A parameter by its keys; `index` selects from its leading dims."""

  path: tuple[str, ...]
  index: tuple[int, ...] = ()


class HfTensor(NamedTuple):
  """One tensor of the Hugging Face layout.

  leaves: concatenated along their last dim.
  num_in: number of leading dims that are inputs of a matrix; 0 if both layouts
    store the array in the same way.
  copy: another tensor holds the same values, and import reads that one.
  """

  name: str
  leaves: tuple[ParamLeaf, ...]
  num_in: int
  copy: bool = False


_SWIGLU = (
  ('gate_proj', 'w_gate'),
  ('up_proj', 'w_up'),
  ('down_proj', 'w_down'),
)


def table(cfg: config.ModelConfig) -> Iterator[HfTensor]:
  """Every tensor of the model, each once.

  A generator, as an untrusted `cfg` may claim any number of layers.
  """
  embed, head = (
    ParamLeaf(('params', 'embed', 'w')),
    ParamLeaf(('params', 'head', 'w')),
  )
  final_norm = ParamLeaf(('params', 'final_norm', 'norm'))
  yield HfTensor('model.embed_tokens.weight', (embed,), 0)
  yield HfTensor('model.norm.weight', (final_norm,), 0)
  yield HfTensor('lm_head.weight', (head,), 1)
  for i in range(cfg.num_layers):
    stack, at = 'dense_layers', i
    if is_moe := i >= cfg.num_dense_layers:
      stack, at = 'moe_layers', i - cfg.num_dense_layers
    where = ParamLeaf(('params', stack, f'layer_{at}'))
    if cfg.scan_layers:
      where = ParamLeaf(('params', stack, 'layers'), (at,))
    bias = ParamLeaf(('router', 'moe'), (at,)) if is_moe else None
    yield from _block(cfg, f'model.layers.{i}.', where, bias)
  for k in range(cfg.mtp.depth):
    prefix, path = f'model.layers.{cfg.num_layers + k}.', ('params', f'mtp_{k}')
    bias = ParamLeaf(('router', 'mtp'), (k,))
    yield from _block(cfg, prefix, ParamLeaf((*path, 'block')), bias)
    norm = lambda name, path=path: (ParamLeaf((*path, name, 'norm')),)
    yield HfTensor(prefix + 'embed_tokens.weight', (embed,), 0, copy=True)
    yield HfTensor(prefix + 'enorm.weight', norm('embed_norm'), 0)
    yield HfTensor(prefix + 'hnorm.weight', norm('hidden_norm'), 0)
    yield HfTensor(
      prefix + 'eh_proj.weight', (ParamLeaf((*path, 'w_proj')),), 1
    )
    yield HfTensor(prefix + 'shared_head.norm.weight', norm('final_norm'), 0)
    yield HfTensor(prefix + 'shared_head.head.weight', (head,), 1, copy=True)


def has_biases(cfg: config.ModelConfig) -> bool:
  """True if the layout has router biases; with V2's gate it has none."""
  return cfg.moe.score_func == 'sigmoid'


def _block(
  cfg: config.ModelConfig, prefix: str, where: ParamLeaf, bias: ParamLeaf | None
) -> Iterator[HfTensor]:
  """Tensors of one layer; `bias` is its router bias, None in dense layers."""

  def tensor(name, path, num_in=0, index=()):
    leaves = tuple(
      ParamLeaf((*where.path, *p.split('.')), where.index + index)
      for p in path.split(' ')
    )
    return HfTensor(prefix + name + '.weight', leaves, num_in)

  yield tensor('input_layernorm', 'attention_norm.norm')
  yield tensor('post_attention_layernorm', 'ffn_norm.norm')
  attn = 'self_attn.'
  if cfg.mla.q_lora_rank:
    yield tensor(attn + 'q_a_proj', 'attention.w_dq', 1)
    yield tensor(attn + 'q_a_layernorm', 'attention.q_norm')
    yield tensor(attn + 'q_b_proj', 'attention.w_uq', 1)
  else:
    yield tensor(attn + 'q_proj', 'attention.w_q', 1)
  yield tensor(attn + 'kv_a_proj_with_mqa', 'attention.w_dkv', 1)
  yield tensor(attn + 'kv_a_layernorm', 'attention.kv_norm')
  yield tensor(attn + 'kv_b_proj', 'attention.w_uk attention.w_uv', 1)
  yield tensor(attn + 'o_proj', 'attention.w_o', 2)
  if bias is None:
    for theirs, ours in _SWIGLU:
      yield tensor(f'mlp.{theirs}', f'ffn.{ours}', 1)
    return
  yield tensor('mlp.gate', 'moe.w_router', 1)
  if has_biases(cfg):
    yield HfTensor(prefix + 'mlp.gate.e_score_correction_bias', (bias,), 0)
  for theirs, ours in _SWIGLU:
    for e in range(cfg.moe.num_experts):
      yield tensor(f'mlp.experts.{e}.{theirs}', f'moe.{ours}', 1, (e,))
    if cfg.moe.num_shared_experts:
      yield tensor(f'mlp.shared_experts.{theirs}', f'moe.shared.{ours}', 1)


@functools.lru_cache(maxsize=4)  # tracing takes a while
def leaf_shapes(
  cfg: config.Config,
) -> Mapping[tuple[str, ...], tuple[int, ...]]:
  """Shapes of all parameters and router biases by path; allocates nothing."""
  tree = {
    'params': model.param_shapes(model.build(cfg)),
    'router': jax.eval_shape(lambda: model.init_router_biases(cfg.model)),
  }
  flat = jax.tree_util.tree_leaves_with_path(tree)
  shapes = {tuple(k.key for k in path): leaf.shape for path, leaf in flat}
  return types.MappingProxyType(shapes)


class TensorPlace(NamedTuple):
  """A tensor of the table and the shapes of its leaves' slices.

  Pieces are ranges of steps: a step is one index of the leaves' first output
  dim, and `rows_per_step` rows of the tensor.
  """

  tensor: HfTensor
  shapes: tuple[tuple[int, ...], ...]

  @property
  def steps(self) -> int:
    return self.shapes[0][self.tensor.num_in]

  @property
  def _tail(self) -> tuple[int, ...]:
    """Output dims after the first, of the concatenated leaves."""
    tail = self.shapes[0][self.tensor.num_in + 1 :]
    if len(self.shapes) > 1:
      tail = (*tail[:-1], sum(shape[-1] for shape in self.shapes))
    return tail

  @property
  def rows_per_step(self) -> int:
    return math.prod(self._tail) if self.tensor.num_in else 1

  @property
  def file_shape(self) -> tuple[int, ...]:
    """Shape of the tensor in the file."""
    if not self.tensor.num_in:
      return self.shapes[0]
    inputs = math.prod(self.shapes[0][: self.tensor.num_in])
    return (self.steps * self.rows_per_step, inputs)

  @property
  def tile(self) -> tuple[int, int]:
    """Inputs and outputs of a leaf that share an FP8 scale.

    kv_b_proj has two leaves, whose border may be inside a block. So every
    column of them, a row of kv_b_proj, has its own scales.
    """
    return fp8_blocks.TILE if len(self.shapes) == 1 else (fp8_blocks.TILE[0], 1)

  def leaf_slices(self, start: int, stop: int) -> list[tuple[slice, ...]]:
    """Slices of each leaf for a range of steps."""
    at = self.tensor.num_in
    return [
      (*(slice(0, n) for n in shape[:at]), slice(start, stop))
      + tuple(slice(0, n) for n in shape[at + 1 :])
      for shape in self.shapes
    ]

  def pieces(self) -> Iterator[tuple[int, int]]:
    """Ranges of steps, of bounded size and of full blocks of 128 rows."""
    per = self.rows_per_step
    row_bytes = 4 * math.prod(self.file_shape[1:])
    whole = 128 // math.gcd(per, 128)  # steps until rows are a multiple of 128
    count = max(1, _PIECE_BYTES // (row_bytes * per * whole)) * whole
    for start in range(0, self.steps, count):
      yield start, min(start + count, self.steps)

  def read(
    self, start: int, stop: int, leaves: Mapping[tuple[str, ...], Any]
  ) -> np.ndarray:
    """Rows of a range of steps, from slices of the leaves."""
    slices = self.leaf_slices(start, stop)
    return self.join(
      [
        np.asarray(leaves[leaf.path][(*leaf.index, *part)])
        for leaf, part in zip(self.tensor.leaves, slices, strict=True)
      ]
    )

  def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Converts slices of the leaves to rows of the tensor."""
    bits = [_as_integers(part) for part in parts]
    rows = bits[0] if len(bits) == 1 else np.concatenate(bits, axis=-1)
    if self.tensor.num_in:
      inputs = math.prod(rows.shape[: self.tensor.num_in])
      rows = _turned(rows.reshape(inputs, -1))
    return rows.view(parts[0].dtype)

  def split(self, rows: np.ndarray) -> list[np.ndarray]:
    """Converts rows of the tensor, full steps, to slices of the leaves."""
    if not self.tensor.num_in:
      return [rows]
    inputs = self.shapes[0][: self.tensor.num_in]
    ours = _turned(_as_integers(rows)).view(rows.dtype)
    ours = ours.reshape(*inputs, -1, *self._tail)
    if len(self.shapes) == 1:
      return [ours]
    ends = np.cumsum([shape[-1] for shape in self.shapes])[:-1]
    return np.split(ours, ends, axis=-1)


def _as_integers(x: np.ndarray) -> np.ndarray:
  """The same bits; NumPy copies unknown dtypes element by element."""
  return np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}')


def _turned(x: np.ndarray) -> np.ndarray:
  """x.T, contiguous, transposed in squares that fit into the cache.

  The buffer's rows are padded: rows at a distance of a power of two would evict
  one another from the cache.
  """
  out = lazy_array.empty(x.shape[::-1], x.dtype)
  buffer = np.empty((_SQUARE, _SQUARE + 8), x.dtype)
  for i in range(0, x.shape[0], _SQUARE):
    for j in range(0, x.shape[1], _SQUARE):
      square = x[i : i + _SQUARE, j : j + _SQUARE]
      held = buffer[: square.shape[0], : square.shape[1]]
      held[...] = square
      out[j : j + _SQUARE, i : i + _SQUARE] = held.T
  return out


def places(cfg: config.Config) -> list[TensorPlace]:
  """The table with the shapes of a model."""
  shapes = leaf_shapes(cfg)
  cut = lambda leaf: tuple(shapes[leaf.path][len(leaf.index) :])
  return [
    TensorPlace(tensor, tuple(map(cut, tensor.leaves)))
    for tensor in table(cfg.model)
  ]


def dequantised(
  leaves: Mapping[tuple[str, ...], Any], cfg: config.Config
) -> dict[tuple[str, ...], Any]:
  """The same leaves, with `Quantized` ones as LazyArrays in f32."""
  dims = {
    leaf.path: (len(leaf.index), place.tensor.num_in)
    for place in places(cfg)
    for leaf in place.tensor.leaves
  }

  def plain(path, leaf):
    if not isinstance(leaf, fp8_blocks.Quantized):
      return leaf
    lead, num_in = dims[path]
    read = functools.partial(_read_quantised, leaf, lead, num_in)
    chunk = (1,) * lead + tuple(leaf.shape[lead:])
    return lazy_array.LazyArray(leaf.shape, np.dtype(np.float32), read, chunk)

  return {path: plain(path, leaf) for path, leaf in leaves.items()}


def _read_quantised(
  q: fp8_blocks.Quantized, lead: int, num_in: int, slices: lazy_array.Slices
) -> np.ndarray:
  """Dequantises a slice; reads no values but those of the slice."""
  out = np.array(q.values[slices], np.float32, order='C')
  scales = np.asarray(q.scales[slices[:lead]])
  # A matrix has inputs and outputs of one dim or several.
  ends = ((lead, lead + num_in), (lead + num_in, out.ndim))
  rows, columns = (
    _flat_index(slices[i:j], q.shape[i:j]) // tile
    for (i, j), tile in zip(ends, q.tile, strict=True)
  )
  matrices = out.reshape(*out.shape[:lead], len(rows), len(columns))
  matrices *= scales[..., rows[:, None], columns]
  return out


def _flat_index(
  slices: lazy_array.Slices, shape: tuple[int, ...]
) -> np.ndarray:
  """Where a slice's elements are in the flattened array."""
  return np.arange(math.prod(shape)).reshape(shape)[slices].reshape(-1)


def put(tree: Tree, path: tuple[str, ...], leaf: Any) -> None:
  """Sets the leaf at the end of a path of keys; makes the dicts above it."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf


def get(tree: Tree, path: tuple[str, ...]) -> Any:
  """The leaf at the end of a path of keys."""
  for key in path:
    tree = tree[key]
  return tree
