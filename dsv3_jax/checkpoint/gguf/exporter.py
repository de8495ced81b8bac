"""Writes parameters as a GGUF file for llama.cpp, piece by piece.

The file is written as `OUTPUT.partial`, front to back, in pieces of at most
32 MB of f32. One rename at the end makes it `OUTPUT`. An export that fails or
is interrupted removes it; one that is killed leaves it to the next. MTP modules
are left out: `deepseek2` has none.
"""

import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import gguf

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import full_disk, lazy_array, partial_folder
from dsv3_jax.checkpoint.gguf import metadata, tensors, vocabulary
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.checkpoint.safetensors import writer as shard_writer
from dsv3_jax.data import tokenizer as tokenizers

_FILE_TYPES = {
  'float32': gguf.LlamaFileType.ALL_F32,
  'bfloat16': gguf.LlamaFileType.MOSTLY_BF16,
  'q8_0': gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT  # bytes, of each tensor
_FULL = 'nothing of it is left, and the source is as it was; free space, repeat'


def export(
  cfg: config.Config,
  leaves: Mapping[tuple[str, ...], Any],
  output: str | pathlib.Path,
  *,
  tokenizer: tokenizers.Tokenizer,
  dtype: str = 'bfloat16',
  progress: Callable[[str], None] = lambda line: None,
) -> None:
  """Writes the file.

  Args:
    leaves: path -> array with `shape` and slicing: NumPy, JAX or LazyArray.
    dtype: of matrices: 'float32', 'bfloat16' or 'q8_0'.
    progress: called with a line for each finished layer, and at the end.

  Raises:
    InputError: `output` exists or cannot be written, its disk has too little
      space, llama.cpp has no such model or tokenizer, or a weight is not finite
      (names the tensor).
    FullDiskError: nothing is left behind.
  """
  output = pathlib.Path(output)
  partial = partial_folder.path(output)
  if partial.is_dir():
    raise errors.InputError(
      f'{partial} is a folder, of an interrupted export: name another --output'
    )
  metadata.check(cfg)
  vocabulary.check(tokenizer, cfg.model.vocab_size)
  table = tensors.table(cfg, dtype)
  if depth := cfg.model.mtp.depth:
    progress(f'model.mtp.depth={depth}: left out, llama.cpp has no MTP here')
  writer = gguf.GGUFWriter(None, metadata.ARCH)
  writer.add_type(gguf.GGUFType.MODEL)
  writer.add_name(output.stem)
  writer.add_file_type(_FILE_TYPES[dtype])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  metadata.write(writer, cfg)
  vocabulary.write(writer, tokenizer, cfg.model.vocab_size)
  try:
    partial_folder.make(partial.parent)
    with full_disk.reported(output, _FULL):
      _write_header(writer, partial, table)
      _check_space(partial, table)
      _write_data(partial, table, hf_names.dequantised(leaves, cfg), progress)
      shard_writer.flush(partial)
    partial.rename(output)
  except BrokenPipeError:
    raise  # nobody reads the progress any more
  except OSError as error:
    raise errors.InputError(
      f'--output={output} not written: {error}'
    ) from error
  finally:
    partial.unlink(missing_ok=True)
  progress(f'{output}  {output.stat().st_size / 1e9:.2f} GB')


def _write_header(
  writer: gguf.GGUFWriter, path: pathlib.Path, table: list[tensors.GgufTensor]
) -> None:
  """Writes all that comes before the data."""
  for tensor in table:
    writer.add_tensor_info(
      tensor.name, tensor.shape, 'float32', tensor.nbytes, tensor.kind
    )
  try:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
  finally:
    writer.close()


def _check_space(path: pathlib.Path, table: list[tensors.GgufTensor]) -> None:
  """Refuses to begin with data that the disk has no space for."""
  size = sum(tensor.nbytes + -tensor.nbytes % _ALIGNMENT for tensor in table)
  free = shutil.disk_usage(path.parent).free
  if size > free:
    raise errors.InputError(
      f'--output: {path.parent} has {free / 1e9:.2f} GB of free space, but the '
      f'file needs {size / 1e9:.2f} GB: free space, or name another folder'
    )


def _write_data(
  path: pathlib.Path,
  table: list[tensors.GgufTensor],
  leaves: Mapping[tuple[str, ...], Any],
  progress: Callable[[str], None],
) -> None:
  """Appends the data of all tensors, each aligned."""
  layers = [tensor.name.split('.')[:2] for tensor in table]
  size = 0
  with path.open('ab') as stream:
    _align(stream)
    for i, tensor in enumerate(table):
      start = stream.tell()
      read = functools.partial(tensor.read, leaves=leaves)
      for _, piece in lazy_array.read_ahead(read, tensor.pieces()):
        stream.write(piece)
      size += stream.tell() - start
      assert stream.tell() - start == tensor.nbytes, tensor.name
      _align(stream)
      is_last = layers[i] != (layers[i + 1 :] or [None])[0]
      if layers[i][0] == 'blk' and is_last:
        progress(f'{".".join(layers[i])}  {size / 1e9:.2f} GB so far')


def _align(stream) -> None:
  """Appends zeros up to the next multiple of the alignment."""
  stream.write(bytes(-stream.tell() % _ALIGNMENT))
