"""Whole files beside the safetensors package; plans; files filled in place."""

import concurrent.futures
import errno
import itertools
import json
import math
import os
import pathlib
import tempfile

import hypothesis
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.checkpoint.safetensors import writer as shard_writer
from tests.checkpoint.safetensors import shard_files as files

TensorSpec = shard_writer.TensorSpec


@pytest.fixture(name='pair')
def _pair(tmp_path):
  return files.make_pair(tmp_path / 'pair')


@hypothesis.given(files.tensors)
def test_the_package_reads_what_we_write(tensors):
  specs = [TensorSpec(*tensor) for tensor in tensors]
  arrays = {spec.name: files.filled(spec, i) for i, spec in enumerate(specs)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / shards.SINGLE
    files.put(path, arrays)
    assert files.theirs(path) == files.bits(arrays) == files.ours(folder)
    if all(spec.dtype in files.NUMPY_HAS for spec in specs):
      assert files.bits(safetensors.numpy.load_file(path)) == files.bits(arrays)
    with safetensors.safe_open(path, 'numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}


@hypothesis.given(files.tensors)
def test_we_read_what_the_package_writes(tensors):
  specs = [TensorSpec(*tensor) for tensor in tensors]
  arrays = {spec.name: files.filled(spec, i) for i, spec in enumerate(specs)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'any name.safetensors'
    safetensors.numpy.save_file(arrays, path, {'some': 'thing'})
    assert files.ours(folder) == files.bits(arrays)


@pytest.mark.parametrize('dtype', shards.DTYPES)
def test_every_dtype_goes_both_ways(tmp_path, dtype):
  assert shards.DTYPE_NAMES[shards.DTYPES[dtype]] == dtype
  array = files.filled(TensorSpec('x', dtype, (5, 3)))
  files.put(tmp_path / shards.SINGLE, {'x': array})
  assert (
    files.ours(tmp_path)
    == files.theirs(tmp_path / shards.SINGLE)
    == files.bits({'x': array})
  )


@hypothesis.given(
  st.sampled_from(list(shards.DTYPES)),
  files.shapes.filter(len),
  st.slices(8).filter(lambda rows: rows.step in (None, 1)),
)
def test_rows_are_numpys_rows(dtype, shape, rows):
  before, array = (
    files.filled(TensorSpec('a', 'F64', (3,))),
    files.filled(TensorSpec('x', dtype, shape)),
  )
  with tempfile.TemporaryDirectory() as folder:
    files.put(
      f'{folder}/{shards.SINGLE}', {'a': before, 'x': array, 'z': before}
    )
    with shards.Folder(folder) as opened:
      got = opened.read('x', rows)
  assert files.bits({'x': got}) == files.bits({'x': array[rows]})


def test_rows_are_all_that_is_read(tmp_path, monkeypatch):
  files.put(
    tmp_path / shards.SINGLE,
    {'x': np.arange(3000, dtype='f4').reshape(300, 10)},
  )
  asked = []
  real = os.preadv

  def counted(handle, rooms, offset):
    asked.append(sum(map(len, rooms)))
    return real(handle, rooms, offset)

  monkeypatch.setattr(os, 'preadv', counted)
  with shards.Folder(tmp_path) as opened:
    got = opened.read('x', slice(7, 9))
  assert sum(asked) == 2 * 10 * 4
  np.testing.assert_array_equal(got.ravel(), np.arange(70, 90))


def test_a_read_in_short_pieces_is_whole(tmp_path, monkeypatch):
  array = files.filled(TensorSpec('x', 'I32', (50,)))
  files.put(tmp_path / shards.SINGLE, {'x': array})
  real = os.preadv
  monkeypatch.setattr(os, 'preadv', lambda h, r, o: real(h, [r[0][:7]], o))
  assert files.ours(tmp_path) == files.bits({'x': array})


def test_arrays_are_the_callers_own(tmp_path):
  files.put(tmp_path / shards.SINGLE, {'x': np.zeros(4, 'f4')})
  with shards.Folder(tmp_path) as opened:
    first = opened.read('x')
    assert first.flags.owndata and first.flags.writeable
    first[:] = 1
    assert not opened.read('x').any()
  first[:] = 2  # also after `close`


def test_many_threads_read_and_write_one_folder(tmp_path):
  specs = [TensorSpec(f't{i}', 'I32', (64, 5)) for i in range(6)]
  planned = shard_writer.plan_shards(specs, 2 * specs[0].nbytes)
  shard_files = shard_writer.shard_names(len(planned))
  arrays = {spec.name: files.filled(spec, i) for i, spec in enumerate(specs)}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for file, some in zip(shard_files, planned, strict=True):
      with shard_writer.ShardWriter(tmp_path / file, some) as writer:
        jobs = [
          pool.submit(writer.write, s.name, row, arrays[s.name][row : row + 1])
          for row in reversed(range(64))
          for s in some
        ]
        for job in jobs:
          job.result()
    shard_writer.write_index(tmp_path, planned)
    with shards.Folder(tmp_path) as opened:
      asked = list(itertools.product(arrays, range(64)))
      got = pool.map(
        lambda at: opened.read(at[0], slice(at[1], at[1] + 1)), asked
      )
      for (name, row), rows in zip(asked, got, strict=True):
        np.testing.assert_array_equal(rows, arrays[name][row : row + 1])
  for file in shard_files:
    safetensors.numpy.load_file(tmp_path / file)


@hypothesis.given(files.tensors, st.integers(1, 300))
def test_a_plan_is_greedy_and_in_order(tensors, most):
  specs = [TensorSpec(*tensor) for tensor in tensors]
  planned = shard_writer.plan_shards(iter(specs), most)
  assert [spec for shard in planned for spec in shard] == specs
  size = lambda shard: sum(spec.nbytes for spec in shard)
  for shard in planned:
    assert shard
    assert size(shard) <= most or len(shard) == 1
  for shard, after in itertools.pairwise(planned):
    assert size(shard) + after[0].nbytes > most


@pytest.mark.parametrize('most', [0, -1])
def test_a_plan_needs_room(most):
  files.refused(
    lambda: shard_writer.plan_shards([], most), f'shard_bytes={most}'
  )


def test_names_are_the_published_ones():
  assert shard_writer.shard_names(1) == ['model.safetensors']
  names = shard_writer.shard_names(163)
  assert names[0] == 'model-00001-of-00163.safetensors'
  assert names[-1] == 'model-00163-of-00163.safetensors'
  assert len(set(names)) == 163 and names == sorted(names)


def test_an_index_is_the_published_one(pair):
  text = (pair / shards.INDEX).read_text()
  body = {
    'metadata': {'total_size': 72},
    'weight_map': {'a': files.ONE, 'b': files.ONE, 'c': files.TWO},
  }
  assert text == json.dumps(body, indent=2) + '\n'
  assert not list(pair.glob('.*'))


def test_one_file_has_no_index(tmp_path):
  shard_writer.write_index(tmp_path, [[TensorSpec('a', 'F32', (2,))]])
  shard_writer.write_index(tmp_path, [])
  assert not list(tmp_path.iterdir())


def test_a_file_has_its_size_from_the_start(tmp_path):
  path = tmp_path / shards.SINGLE
  path.write_bytes(b'x' * 10_000)  # of an export that was interrupted
  specs = [
    TensorSpec('a', 'U8', (3,)),
    TensorSpec('b', 'F64', (5, 2)),
    TensorSpec('c', 'BF16', ()),
  ]
  writer = shard_writer.ShardWriter(path, specs)
  with writer:
    size, entries = path.stat().st_size, shards.read_header(path)
    start = int.from_bytes(path.read_bytes()[:8], 'little') + 8
    assert start % 8 == 0 and size == start + 3 + 80 + 2
    for spec in specs:
      entry = entries[spec.name]
      assert (entry.dtype, entry.shape) == (spec.dtype, spec.shape)
      assert entry.offset % shards.DTYPES[spec.dtype].itemsize == 0
      writer.write(spec.name, 0, files.filled(spec))
  assert path.stat().st_size == size
  writer.close()  # again: nothing to do
  with pytest.raises(AssertionError, match='closed'):
    writer.write('a', 0, np.zeros(3, np.uint8))


@hypothesis.given(st.data())
def test_blocks_may_come_in_any_order(data):
  specs = [TensorSpec(*tensor) for tensor in data.draw(files.tensors)]
  arrays = {spec.name: files.filled(spec, i) for i, spec in enumerate(specs)}
  blocks = []
  for spec in specs:
    cuts = data.draw(st.sets(st.integers(0, spec.num_rows)))
    edges = sorted({0, spec.num_rows, *cuts})
    blocks += [(spec.name, *edge) for edge in itertools.pairwise(edges)]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / shards.SINGLE
    with shard_writer.ShardWriter(path, specs) as writer:
      for name, start, stop in data.draw(st.permutations(blocks)):
        array = arrays[name]
        writer.write(name, start, array[start:stop] if array.ndim else array)
    assert files.theirs(path) == files.bits(arrays)


SPEC = TensorSpec('w', 'F32', (4, 3))


@pytest.mark.parametrize(
  'blocks',
  [[], [(0, 3)], [(1, 4)], [(0, 2), (3, 4)], [(0, 4), (2, 3)],
   [(0, 2), (0, 2)], [(0, 4), (0, 4)], [(0, 0)]],
)  # fmt: skip
def test_a_row_missing_or_written_twice_is_our_bug(tmp_path, blocks):
  writer = shard_writer.ShardWriter(tmp_path / shards.SINGLE, [SPEC])
  for start, stop in blocks:
    writer.write('w', start, np.zeros((stop - start, 3), 'f4'))
  before = len(os.listdir('/proc/self/fd'))
  with pytest.raises(AssertionError, match='w: '):
    writer.close()
  assert len(os.listdir('/proc/self/fd')) == before - 1


@pytest.mark.parametrize(
  ('start', 'array'),
  [
    (0, np.zeros((4, 3), 'f8')),
    (0, np.zeros((4, 3), '>f4')),
    (0, np.zeros((4, 2), 'f4')),
    (0, np.zeros((4, 3, 1), 'f4')),
    (0, np.zeros(12, 'f4')),
    (0, np.zeros((3, 4), 'f4').T),
    (0, np.zeros((8, 3), 'f4')[::2]),
    (1, np.zeros((4, 3), 'f4')),
    (-1, np.zeros((4, 3), 'f4')),
    (4, np.zeros((1, 3), 'f4')),
  ],
)
def test_a_block_that_does_not_fit_is_our_bug(tmp_path, start, array):
  path = tmp_path / shards.SINGLE
  with shard_writer.ShardWriter(path, [SPEC]) as writer:
    with pytest.raises(AssertionError):
      writer.write('w', start, array)
    writer.write('w', 0, np.ones((4, 3), 'f4'))
  assert files.ours(tmp_path) == files.bits({'w': np.ones((4, 3), 'f4')})


def test_specs_that_no_file_can_hold_are_our_bug(tmp_path):
  for specs in ([SPEC, SPEC], [TensorSpec('__metadata__', 'F32', ())],
                [TensorSpec('', 'F32', ())]):  # fmt: skip
    with pytest.raises(AssertionError):
      shard_writer.ShardWriter(tmp_path / shards.SINGLE, specs)
  assert not list(tmp_path.iterdir())


def test_an_error_inside_is_the_one_that_is_seen(tmp_path):
  before = len(os.listdir('/proc/self/fd'))
  with (
    pytest.raises(KeyError, match='mine'),
    shard_writer.ShardWriter(tmp_path / shards.SINGLE, [SPEC]),
  ):
    raise KeyError('mine')
  assert len(os.listdir('/proc/self/fd')) == before


def test_a_disk_that_is_full_at_once_leaves_no_handle(tmp_path, monkeypatch):
  before = len(os.listdir('/proc/self/fd'))

  def full(*args):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(shard_writer.os, 'truncate', full)
  with pytest.raises(OSError, match='No space left'):
    shard_writer.ShardWriter(tmp_path / shards.SINGLE, [SPEC])
  assert len(os.listdir('/proc/self/fd')) == before


def test_a_tensor_beyond_4_gb_has_its_place(tmp_path):
  """The file is a hole but for its ends: it takes no room on the disk."""
  spec = TensorSpec('w', 'U8', (5, 2**30))
  path = tmp_path / shards.SINGLE
  writer = shard_writer.ShardWriter(path, [spec, TensorSpec('z', 'U8', (3,))])
  writer.write('z', 0, np.array([1, 2, 3], np.uint8))
  with pytest.raises(AssertionError, match='w: 0 of 5'):
    writer.close()
  with shards.Folder(tmp_path) as opened:
    assert opened.entries['w'].nbytes == 5 * 2**30 == math.prod(spec.shape)
    assert opened.read('z').tolist() == [1, 2, 3]
    assert opened.read('w', slice(5, None)).shape == (0, 2**30)
