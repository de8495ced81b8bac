"""What tests of safetensors files share: arrays of any bits, and both readers.

The safetensors package cannot read two of our dtypes into NumPy, so bytes are
compared.
"""

import numpy as np
import pytest
import safetensors
from hypothesis import strategies as st

from dsv3_jax import errors
from dsv3_jax.checkpoint.safetensors import header as shard_header
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.checkpoint.safetensors import writer as shard_writer

TensorSpec = shard_writer.TensorSpec
ONE, TWO = (
  'model-00001-of-00002.safetensors',
  'model-00002-of-00002.safetensors',
)
NUMPY_HAS = [name for name in shards.DTYPES if name[:2] not in ('BF', 'F8')]


def filled(spec, seed=0):
  """An array of random bits: NaNs and subnormals too."""
  rng = np.random.default_rng(seed)
  raw = rng.integers(0, 256, spec.nbytes, np.uint8)
  if spec.dtype == 'BOOL':
    raw &= 1
  return raw.view(shards.DTYPES[spec.dtype]).reshape(spec.shape)


def put(path, arrays, dtype_of=shards.DTYPE_NAMES):
  """Writes a file with our writer, a tensor at a time."""
  specs = [TensorSpec(n, dtype_of[a.dtype], a.shape) for n, a in arrays.items()]
  with shard_writer.ShardWriter(path, specs) as writer:
    for name, array in arrays.items():
      writer.write(name, 0, array)


def bits(arrays):
  """What must be equal: dtype, shape and bytes."""
  return {n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()}


def theirs(path):
  """The package's view of a file, as bytes."""
  return {
    name: (
      shards.DTYPES[view['dtype']],
      tuple(view['shape']),
      bytes(view['data']),
    )
    for name, view in safetensors.deserialize(path.read_bytes())
  }


def ours(folder):
  with shards.Folder(folder) as opened:
    return bits({name: opened.read(name) for name in opened.entries})


def refused(call, *expected):
  """The one line of an InputError, which holds all of `expected`."""
  with pytest.raises(errors.InputError) as caught:
    call()
  line = str(caught.value)
  assert len(line.splitlines()) == 1, line
  for part in expected:
    assert part in line, line
  return line


names = st.text(
  st.characters(exclude_categories=['Cs']), min_size=1, max_size=12
).filter(lambda name: name != shard_header.METADATA)
shapes = st.lists(st.sampled_from((0, 1, 2, 3, 7)), max_size=4).map(tuple)
# Not Specs yet: beartype, which checks them, draws from Python's `random`.
tensors = st.lists(
  st.tuples(names, st.sampled_from(list(shards.DTYPES)), shapes),
  max_size=6,
  unique_by=lambda tensor: tensor[0],
)


def make_pair(folder):
  """A folder of two files: a and b in the first, c in the second."""
  folder.mkdir()
  specs = [TensorSpec(name, 'F32', (2, 3)) for name in 'abc']
  planned = shard_writer.plan_shards(specs, 2 * specs[0].nbytes)
  for file, some in zip((ONE, TWO), planned, strict=True):
    put(folder / file, {spec.name: filled(spec) for spec in some})
  shard_writer.write_index(folder, planned)
  return folder
