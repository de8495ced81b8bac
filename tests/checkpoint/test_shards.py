"""Safetensors files: ours against the safetensors package, and what we refuse.

The package is the rival for whole files; it cannot read two of our dtypes into
NumPy, so bytes are compared.
"""

import concurrent.futures
import hashlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import tempfile
import tracemalloc

import hypothesis
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from dsv3_jax import errors
from dsv3_jax.checkpoint import shard_header, shard_writer, shards
from tests.checkpoint import fuzz, fuzz_config, fuzz_shards

Spec = shard_writer.Spec
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
  """Writes a file with our writer, whole tensors at once."""
  specs = [Spec(n, dtype_of[a.dtype], a.shape) for n, a in arrays.items()]
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


def refused(call, *said):
  """The one line of an InputError, which holds all of `said`."""
  with pytest.raises(errors.InputError) as caught:
    call()
  line = str(caught.value)
  assert len(line.splitlines()) == 1, line
  for part in said:
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


@hypothesis.given(tensors)
def test_the_package_reads_what_we_write(tensors):
  specs = [Spec(*tensor) for tensor in tensors]
  arrays = {spec.name: filled(spec, i) for i, spec in enumerate(specs)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / shards.SINGLE
    put(path, arrays)
    assert theirs(path) == bits(arrays) == ours(folder)
    if all(spec.dtype in NUMPY_HAS for spec in specs):
      assert bits(safetensors.numpy.load_file(path)) == bits(arrays)
    with safetensors.safe_open(path, 'numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}


@hypothesis.given(tensors)
def test_we_read_what_the_package_writes(tensors):
  specs = [Spec(*tensor) for tensor in tensors]
  arrays = {spec.name: filled(spec, i) for i, spec in enumerate(specs)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'any name.safetensors'
    safetensors.numpy.save_file(arrays, path, {'some': 'thing'})
    assert ours(folder) == bits(arrays)


@pytest.mark.parametrize('dtype', shards.DTYPES)
def test_every_dtype_goes_both_ways(tmp_path, dtype):
  assert shards.DTYPE_NAMES[shards.DTYPES[dtype]] == dtype
  array = filled(Spec('x', dtype, (5, 3)))
  put(tmp_path / shards.SINGLE, {'x': array})
  assert (
    ours(tmp_path) == theirs(tmp_path / shards.SINGLE) == bits({'x': array})
  )


@hypothesis.given(
  st.sampled_from(list(shards.DTYPES)),
  shapes.filter(len),
  st.slices(8).filter(lambda rows: rows.step in (None, 1)),
)
def test_rows_are_numpys_rows(dtype, shape, rows):
  before, array = (
    filled(Spec('a', 'F64', (3,))),
    filled(Spec('x', dtype, shape)),
  )
  with tempfile.TemporaryDirectory() as folder:
    put(f'{folder}/{shards.SINGLE}', {'a': before, 'x': array, 'z': before})
    with shards.Folder(folder) as opened:
      got = opened.read('x', rows)
  assert bits({'x': got}) == bits({'x': array[rows]})


def test_rows_are_all_that_is_read(tmp_path, monkeypatch):
  put(
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
  array = filled(Spec('x', 'I32', (50,)))
  put(tmp_path / shards.SINGLE, {'x': array})
  real = os.preadv
  monkeypatch.setattr(os, 'preadv', lambda h, r, o: real(h, [r[0][:7]], o))
  assert ours(tmp_path) == bits({'x': array})


def test_arrays_are_the_callers_own(tmp_path):
  put(tmp_path / shards.SINGLE, {'x': np.zeros(4, 'f4')})
  with shards.Folder(tmp_path) as opened:
    first = opened.read('x')
    assert first.flags.owndata and first.flags.writeable
    first[:] = 1
    assert not opened.read('x').any()
  first[:] = 2  # also after `close`


def test_many_threads_read_and_write_one_folder(tmp_path):
  specs = [Spec(f't{i}', 'I32', (64, 5)) for i in range(6)]
  planned = shard_writer.plan(specs, 2 * specs[0].nbytes)
  files = shard_writer.shard_names(len(planned))
  arrays = {spec.name: filled(spec, i) for i, spec in enumerate(specs)}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for file, some in zip(files, planned, strict=True):
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
      for (name, row), found in zip(asked, got, strict=True):
        np.testing.assert_array_equal(found, arrays[name][row : row + 1])
  for file in files:
    safetensors.numpy.load_file(tmp_path / file)


# One file, refused.


def entry(dtype='F32', shape=(2,), span=(0, 8), **more):
  body = {'dtype': dtype, 'shape': shape, 'data_offsets': span, **more}
  return json.dumps(body)


def one(name='w', **kwargs):
  return f'{{{json.dumps(name)}: {entry(**kwargs)}}}'


def raw_file(header, data=bytes(8), length=None):
  """Bytes of a file; the header may be nonsense."""
  header = header.encode() if isinstance(header, str) else header
  length = len(header) if length is None else length
  return length.to_bytes(8, 'little') + header + data


PAIR = f'{{"v": {entry()}, "w": %s}}'
HEADERS = {
  'not UTF-8': (b'{"w\xff": 1}', 'not UTF-8'),
  'not JSON': ('{"w": }', 'not JSON'),
  'cut JSON': ('{"w": {"dtype"', 'not JSON'),
  'two values': ('{} {}', 'not JSON'),
  'NaN': (one()[:-1] + ', "x": NaN}', 'not JSON'),
  'raw control character': ('{"\n": 1}', 'not JSON'),
  'array': ('[]', "start with '{'"),
  'number': ('1', "start with '{'"),
  'leading space': (' ' + one(), "start with '{'"),
  'byte order mark': ('\ufeff' + one(), "start with '{'"),
  'UTF-16': (one().encode('utf-16-le'), 'not JSON'),
  'deep': ('{"w":' + '[' * 200_000, 'nested too deeply'),
  'name twice': (f'{{"w": {entry()}, "w": {entry()}}}', "'w' twice"),
  'name twice, escaped': (
    f'{{"w": {entry()}, "\\u0077": {entry()}}}',
    "'w' twice",
  ),
  'metadata twice': ('{"__metadata__": {}, "__metadata__": {}}', 'twice'),
  'metadata no object': ('{"__metadata__": []}', '__metadata__', 'object'),
  'metadata null': ('{"__metadata__": null}', '__metadata__', 'object'),
  'metadata number': ('{"__metadata__": {"k": 1}}', '__metadata__', "'k'"),
  'metadata object': ('{"__metadata__": {"k": {}}}', '__metadata__', "'k'"),
  'metadata surrogate': ('{"__metadata__": {"k": "\\ud800"}}', "'k'"),
  'metadata key twice': ('{"__metadata__": {"k": "", "k": ""}}', "'k' twice"),
}
ENTRIES = {
  'no object': ('{"w": [1]}', 'entry', 'object'),
  'null': ('{"w": null}', 'entry', 'object'),
  'field twice': (
    '{"w": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0]}}',
    "'shape' twice",
  ),
  'no dtype': ('{"w": {"shape": [2], "data_offsets": [0, 8]}}', 'only'),
  'no shape': ('{"w": {"dtype": "F32", "data_offsets": [0, 8]}}', 'only'),
  'no offsets': ('{"w": {"dtype": "F32", "shape": [2]}}', 'only'),
  'surplus field': (one(more=1), 'only', "'more'"),
  'unknown dtype': (one(dtype='F4'), "dtype 'F4'", 'BF16'),
  'lower case dtype': (one(dtype='f32'), "dtype 'f32'"),
  'dtype no string': (one(dtype=['F32']), 'dtype'),
  'dtype null': (one(dtype=None), 'dtype'),
  'shape no list': (one(shape=2), 'shape 2'),
  'shape null': (one(shape=None), 'shape'),
  'negative': (one(shape=[-2]), 'shape [-2]'),
  'negative twice': (one(shape=[-1, -2]), 'shape [-1, -2]'),
  'bool': (one(shape=[2, True]), 'shape [2, True]'),
  'float': (one(shape=[2.0]), 'shape [2.0]'),
  'string': (one(shape=['2']), 'shape'),
  'minus zero': (one(shape=[2]).replace('[2]', '[-0, 2]'), 'shape'),
  'nested shape': (one(shape=[[2]]), 'shape'),
  'nine dims': (one(shape=[2] + [1] * 8), 'at most 8'),
  'overflow of 64 bits': (one(shape=[2**32, 2**32, 2]), 'too large'),
  'overflow to the right size': (
    one(dtype='U8', shape=[2**61 + 1, 8]),
    'large',
  ),
  'beyond 64 bits': (one(shape=[2**64]), 'shape'),
  'a thousand digits': (one(shape=[10**1000]), 'shape'),
  'empty and too large': (one(shape=[0, 2**62, 4], span=(0, 0)), 'too large'),
  'offsets no list': (one(span=8), 'data_offsets 8'),
  'one offset': (one(span=(8,)), 'two integers'),
  'three offsets': (one(span=(0, 4, 8)), 'two integers'),
  'negative offset': (one(span=(-8, 0)), 'two integers'),
  'offsets swapped': (one(span=(8, 0)), 'two integers'),
  'offset float': (one(span=(0, 8.0)), 'two integers'),
  'offset bool': (one(dtype='U8', shape=(1,), span=(False, True)), 'integers'),
  'beyond the data': (one(shape=(3,), span=(0, 12)), 'beyond the 8 bytes'),
  'far beyond': (one(shape=(2**60,), span=(0, 2**62)), 'beyond the 8 bytes'),
  'too small': (one(shape=(1,)), 'hold 8 bytes', 'has 4'),
  'too large': (one(dtype='F64'), 'hold 8 bytes', 'has 16'),
  'scalar': (one(shape=()), 'hold 8 bytes', 'has 4'),
  'same place': (PAIR % entry(), "overlaps tensor 'v': 8 bytes"),
  'overlap': (
    PAIR % entry(shape=(1,), span=(4, 8)),
    "overlaps tensor 'v': 4 bytes",
  ),
  'empty, inside': (PAIR % entry(shape=(0,), span=(4, 4)), "'v'", 'overlaps'),
  'hole at the start': (
    one(shape=(1,), span=(4, 8)),
    'leaves a hole',
    '4 bytes',
  ),
  'rest': (one(shape=(1,), span=(0, 4)), '4 bytes after', 'no tensor'),
}


def refused_file(tmp_path, raw, *said):
  path = tmp_path / 'some.safetensors'
  path.write_bytes(raw)
  refused(lambda: shards.read_header(path), str(path), *said)
  refused(lambda: shards.Folder(tmp_path), str(path), *said)


@pytest.mark.parametrize('case', HEADERS)
def test_a_header_is_refused(tmp_path, case):
  header, *said = HEADERS[case]
  refused_file(tmp_path, raw_file(header), *said)


@pytest.mark.parametrize('case', ENTRIES)
def test_an_entry_is_refused_by_name(tmp_path, case):
  header, *said = ENTRIES[case]
  line = ["'w'", *said] if case != 'empty, inside' else said
  refused_file(tmp_path, raw_file(header), *line)


def test_a_hole_between_tensors_is_refused(tmp_path):
  header = PAIR % entry(span=(12, 20))
  said = ("'w'", "leaves a hole after tensor 'v': 4 bytes")
  refused_file(tmp_path, raw_file(header, bytes(20)), *said)


@pytest.mark.parametrize('name', ['', '\ud800', 'a\udc00b'])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
  refused_file(tmp_path, raw_file(one(name)), repr(name), 'name')


@pytest.mark.parametrize('name', ['a\nb', '\u2028', '\x00', 'x' * 10**6])
def test_any_name_is_told_in_one_short_line(tmp_path, name):
  path = tmp_path / 'some.safetensors'
  path.write_bytes(raw_file(one(name, dtype='F64')))
  line = refused(lambda: shards.read_header(path), 'hold 8 bytes')
  assert len(line) < 500


@pytest.mark.parametrize('size', range(8))
def test_a_file_without_a_length_is_refused(tmp_path, size):
  refused_file(tmp_path, bytes(size), f'{size} bytes')


@pytest.mark.parametrize(
  'length', [0, 10**8 + 1, 2**31, 2**60, 2**63, 2**64 - 1, 'one more']
)
def test_a_length_that_cannot_be_is_refused(tmp_path, length):
  header = one()
  length = len(header) + 9 if length == 'one more' else length
  refused_file(tmp_path, raw_file(header, length=length), str(length))


def test_more_than_the_most_json_is_refused_though_it_is_there(tmp_path):
  path = tmp_path / shards.SINGLE
  path.write_bytes((10**8 + 1).to_bytes(8, 'little') + b'{')
  os.truncate(path, 2 * 10**8)  # a hole: takes no room on the disk
  refused(lambda: shards.read_header(path), str(path), '100000001')
  (tmp_path / shards.INDEX).write_bytes(b'{')
  os.truncate(tmp_path / shards.INDEX, 10**8 + 1)
  refused(lambda: shards.Folder(tmp_path), shards.INDEX, '100000001 bytes')


@pytest.mark.parametrize(
  'raw',
  [
    raw_file(one(), length=2**60),
    raw_file(one(), length=10**8),
    raw_file(one(shape=[2**57], span=(0, 2**59))),
    raw_file(one(shape=[2**28])),
    raw_file(one(dtype='x' * 10**5)),
  ],
)
def test_a_lie_allocates_nothing(tmp_path, raw):
  path = tmp_path / shards.SINGLE
  path.write_bytes(raw)
  tracemalloc.start()
  try:
    with pytest.raises(errors.InputError):
      shards.Folder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 200_000 + 4 * len(raw)


def test_headers_may_be_padded_and_tensors_in_any_order(tmp_path):
  header = (
    f'{{"b": {entry("U8", (1,), (8, 9))}, "e": {entry("F32", (0,), (8, 8))}, '
    f'"a": {entry()}, "s": {entry("BOOL", (), (9, 10))}}}   '
  )
  path = tmp_path / shards.SINGLE
  path.write_bytes(raw_file(header, bytes(range(9)) + b'\x01'))
  assert list(shards.read_header(path)) == ['b', 'e', 'a', 's']
  assert ours(tmp_path) == theirs(path)


def test_a_bool_of_another_byte_is_refused(tmp_path):
  header = one('flag', dtype='BOOL', shape=(2,), span=(0, 2))
  (tmp_path / shards.SINGLE).write_bytes(raw_file(header, b'\x01\x02'))
  with shards.Folder(tmp_path) as opened:
    refused(lambda: opened.read('flag'), shards.SINGLE, "'flag'", 'BOOL')
    assert opened.read('flag', slice(0, 1)).item() is True


def test_files_that_are_none_are_refused(tmp_path):
  os.mkfifo(tmp_path / 'pipe.safetensors')  # would wait for ever
  (tmp_path / 'folder.safetensors').mkdir()
  for name in ('pipe', 'folder'):
    path = tmp_path / f'{name}.safetensors'
    refused(lambda path=path: shards.read_header(path), str(path), 'not a file')
    refused(lambda path=path: shards.digest(path), str(path), 'not a file')
  gone = tmp_path / 'gone.safetensors'
  refused(lambda: shards.read_header(gone), str(gone), 'No such file')
  refused(lambda: shards.digest(gone), str(gone), 'No such file')


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
  path = tmp_path / shards.SINGLE
  put(path, {'v': np.ones(4, 'f4'), 'w': np.ones(4, 'f4')})
  with shards.Folder(tmp_path) as opened:
    os.truncate(path, path.stat().st_size - 1)
    opened.read('v')
    refused(lambda: opened.read('w'), str(path), "'w'", 'shorter')
    opened.read('w', slice(0, 3))
  with pytest.raises(AssertionError, match='closed'):
    opened.read('v')
  put(path, {'v': np.ones(4, 'f4')})
  with shards.Folder(tmp_path) as opened:
    path.unlink()
    refused(lambda: opened.read('v'), str(path), 'No such file')


# Folders.


@pytest.fixture(name='pair')
def _pair(tmp_path):
  """A folder of two files: a and b in the first, c in the second."""
  folder = tmp_path / 'pair'
  folder.mkdir()
  specs = [Spec(name, 'F32', (2, 3)) for name in 'abc']
  planned = shard_writer.plan(specs, 2 * specs[0].nbytes)
  for file, some in zip((ONE, TWO), planned, strict=True):
    put(folder / file, {spec.name: filled(spec) for spec in some})
  shard_writer.write_index(folder, planned)
  return folder


def remap(folder, change):
  """Changes the weight_map by hand."""
  path = folder / shards.INDEX
  index = json.loads(path.read_text())
  change(index['weight_map'])
  path.write_text(json.dumps(index))


def test_an_index_joins_the_files(pair):
  (pair / 'consolidated.safetensors').write_bytes(b'not of this model')
  with shards.Folder(pair) as opened:
    assert sorted(opened.entries) == ['a', 'b', 'c']
    assert opened.directory == pair
    assert opened.entries['c'].path == pair / TWO
    assert opened.entries['c'].nbytes == 24
    np.testing.assert_array_equal(
      opened.read('b'), safetensors.numpy.load_file(pair / ONE)['b']
    )


INDEXES = {
  'not JSON': ('{', 'not JSON'),
  'not UTF-8': (b'{"\xff": 1}', 'not UTF-8'),
  'array': ('[]', "'{'"),
  'empty': ('', "'{'"),
  'no map': ('{"metadata": {}}', 'weight_map'),
  'map no object': ('{"weight_map": ["a"]}', 'weight_map'),
  'map twice': ('{"weight_map": {}, "weight_map": {}}', "'weight_map' twice"),
  'metadata no object': ('{"metadata": 1, "weight_map": {}}', 'metadata'),
  'metadata key twice': (
    '{"metadata": {"k": 1, "k": 2}, "weight_map": {}}',
    "'k' twice",
  ),
  'tensor twice': (
    f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}',
    "'a' twice",
  ),
  'file no string': ('{"weight_map": {"a": 1}}', "'a'", 'plain name'),
  'file a list': (f'{{"weight_map": {{"a": ["{ONE}"]}}}}', "'a'", 'plain'),
  'deep': ('{"weight_map":' * 100_000, 'nested too deeply'),
}


@pytest.mark.parametrize('case', INDEXES)
def test_an_index_is_refused(pair, case):
  raw, *said = INDEXES[case]
  raw = raw.encode() if isinstance(raw, str) else raw
  (pair / shards.INDEX).write_bytes(raw)
  refused(lambda: shards.Folder(pair), shards.INDEX, *said)


@pytest.mark.parametrize(
  'name',
  [
    f'../{ONE}', f'/etc/{ONE}', f'sub/{ONE}', f'./{ONE}', f'sub\\{ONE}',
    '..safetensors', 'a..safetensors', 'nul\0.safetensors', 'model.bin',
    'line\n.safetensors', '\ud800.safetensors', '', 'model.safetensors/',
  ],
)  # fmt: skip
def test_an_unsafe_file_name_is_refused(pair, name):
  (pair / 'sub').mkdir()
  (pair / 'sub' / ONE).write_bytes((pair / ONE).read_bytes())
  remap(pair, lambda shard_of: shard_of.update(a=name))
  refused(lambda: shards.Folder(pair), shards.INDEX, "'a'", 'plain name')


def test_a_name_longer_than_the_system_takes_is_refused(pair):
  remap(pair, lambda s: s.update(a='x' * 244 + '.safetensors'))
  refused(lambda: shards.Folder(pair), 'plain name')
  long = '\xe9' * 200 + '.safetensors'  # in bytes
  remap(pair, lambda s: s.update(dict.fromkeys(s, long)))
  refused(lambda: shards.Folder(pair), 'cannot be read')


def test_index_and_files_must_agree(pair):
  remap(pair, lambda s: s.update(d=TWO))
  refused(lambda: shards.Folder(pair), shards.INDEX, "'d' is not in", TWO)
  remap(pair, lambda s: [s.pop('d'), s.pop('a')])
  refused(
    lambda: shards.Folder(pair), str(pair / ONE), "'a' is not in the index"
  )
  remap(pair, lambda s: s.update(a=TWO))
  refused(lambda: shards.Folder(pair), str(pair / ONE), "'a' is in", TWO)
  remap(pair, lambda s: s.update(a=ONE))
  ours(pair)
  extra = {'c': np.ones(2, 'f4'), 'a': np.ones(2, 'f4')}  # a in two files
  put(pair / TWO, extra)
  refused(lambda: shards.Folder(pair), str(pair / TWO), "'a' is in", ONE)
  (pair / TWO).unlink()
  refused(lambda: shards.Folder(pair), str(pair / TWO), 'No such file')


def test_links_are_followed_as_the_hub_s_cache_has_them(pair, tmp_path):
  outside = tmp_path / 'blob'
  (pair / ONE).rename(outside)
  (pair / ONE).symlink_to(outside)
  assert len(ours(pair)) == 3
  (pair / ONE).unlink()
  (pair / ONE).symlink_to(ONE)
  refused(lambda: shards.Folder(pair), str(pair / ONE), 'cannot be read')


def test_a_folder_without_an_index_has_one_file(tmp_path):
  refused(lambda: shards.Folder(tmp_path / 'gone'), 'gone', 'not a folder')
  refused(
    lambda: shards.Folder(tmp_path), str(tmp_path), '0 .safetensors files'
  )
  put(tmp_path / 'x.safetensors', {'x': np.ones(2, 'f4')})
  refused(lambda: shards.Folder(tmp_path / 'x.safetensors'), 'not a folder')
  assert list(ours(tmp_path)) == ['x']
  put(tmp_path / 'y.safetensors', {'y': np.ones(2, 'f4')})
  refused(
    lambda: shards.Folder(tmp_path), str(tmp_path), '2 .safetensors files'
  )
  put(tmp_path / shards.SINGLE, {'z': np.ones(2, 'f4')})
  assert list(ours(tmp_path)) == ['z']


def test_a_single_file_s_name_is_one_line(tmp_path):
  put(tmp_path / 'two\nlines.safetensors', {'x': np.ones(2, 'f4')})
  refused(lambda: shards.Folder(tmp_path), str(tmp_path), 'plain name')


def test_an_index_beside_a_single_file_is_refused(pair):
  put(pair / shards.SINGLE, {'x': np.ones(2, 'f4')})
  refused(lambda: shards.Folder(pair), str(pair), shards.SINGLE, 'remove one')


# SHA256SUMS.


def sums(folder):
  files = folder.glob('*.safetensors')
  found = {path.name: shards.digest(path) for path in files}
  shard_writer.write_sums(folder, found)
  return folder / shards.SUMS


def verify(folder):
  with shards.Folder(folder) as opened:
    return opened.verify()


def test_sums_are_those_of_sha256sum(pair):
  assert verify(pair) is False
  path = sums(pair)
  assert verify(pair) is True
  subprocess.run(['sha256sum', '-c', path.name], cwd=pair, check=True)
  for flag in ('--text', '--binary'):
    call = ['sha256sum', flag, './' + ONE, TWO, shards.INDEX]
    told = subprocess.run(call, cwd=pair, check=True, capture_output=True)
    path.write_bytes(told.stdout)
    assert verify(pair) is True
  path.write_text(path.read_text().upper().replace('MODEL', 'model').replace(
    'OF', 'of').replace('SAFETENSORS', 'safetensors').replace(
    'INDEX.JSON', 'index.json'))  # fmt: skip
  assert verify(pair) is True


def test_digests_are_streamed(tmp_path):
  path = tmp_path / 'x'
  raw = np.random.default_rng(0).bytes((9 << 20) + 1)
  path.write_bytes(raw)
  tracemalloc.start()
  try:
    assert shards.digest(path) == hashlib.sha256(raw).hexdigest()
    assert tracemalloc.get_traced_memory()[1] < 6 << 20
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('at', [0, 40, -1])
def test_a_flipped_bit_is_found(pair, at):
  sums(pair)
  with shards.Folder(pair) as opened:
    raw = bytearray((pair / TWO).read_bytes())
    raw[at] ^= 1
    (pair / TWO).write_bytes(raw)
    refused(opened.verify, str(pair / TWO), 'does not match', shards.SUMS)


HEX = 'a' * 64
LINES = {
  'empty file': ('', ':1 must be'),
  'empty line': ('\n\n', ':1 must be'),
  'short digest': ('abc  x', ':1 must be'),
  'no hex': ('g' * 64 + '  x', ':1 must be'),
  'one space': (f'{HEX} x', ':1 must be'),
  'no name': (f'{HEX}  ', ':1 must be'),
  'NUL': (f'{HEX}  a\0b', ':1 must be'),
  'carriage return': (f'{HEX}  x\r', ':1 must be'),
  'escaped': (f'\\{HEX}  a\\nb', ':1 must be'),
  'not UTF-8': (HEX.encode() + b'  \xff', 'not UTF-8'),
  'above': (f'{HEX}  ../x', ':1:', "'../x' is outside"),
  'above, deeper': (f'{HEX}  sub/../../x', 'is outside'),
  'absolute': (f'{HEX}  /etc/passwd', "'/etc/passwd' is outside"),
  'missing': (f'{HEX}  gone', 'gone', 'No such file'),
  'folder': (f'{HEX}  .', 'not a file'),
  'long': (f'{HEX}  {"x" * 300}', 'cannot be read'),
  'longer': (f'{HEX}  {"x" * 5000}', ':1 must be'),
  'twice': (f'{HEX}  x\n{HEX}  ./x', ':2:', 'twice'),
}


@pytest.mark.parametrize('case', LINES)
def test_a_list_of_sums_is_refused(pair, case):
  raw, *said = LINES[case]
  path = sums(pair)
  if case in ('missing', 'folder', 'long'):
    raw = path.read_text() + raw
  path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
  refused(lambda: verify(pair), str(pair), *said)


def test_a_file_that_is_not_listed_is_refused(pair):
  sums(pair)
  (pair / 'new.safetensors').write_bytes(b'')
  refused(lambda: verify(pair), str(pair), "'new.safetensors' is not listed")


# Planning and writing.


@hypothesis.given(tensors, st.integers(1, 300))
def test_a_plan_is_greedy_and_in_order(tensors, most):
  specs = [Spec(*tensor) for tensor in tensors]
  planned = shard_writer.plan(iter(specs), most)
  assert [spec for shard in planned for spec in shard] == specs
  size = lambda shard: sum(spec.nbytes for spec in shard)
  for shard in planned:
    assert shard
    assert size(shard) <= most or len(shard) == 1
  for shard, after in itertools.pairwise(planned):
    assert size(shard) + after[0].nbytes > most


@pytest.mark.parametrize('most', [0, -1])
def test_a_plan_needs_room(most):
  refused(lambda: shard_writer.plan([], most), f'shard_bytes={most}')


def test_names_are_the_published_ones():
  assert shard_writer.shard_names(1) == ['model.safetensors']
  found = shard_writer.shard_names(163)
  assert found[0] == 'model-00001-of-00163.safetensors'
  assert found[-1] == 'model-00163-of-00163.safetensors'
  assert len(set(found)) == 163 and found == sorted(found)


def test_an_index_is_the_published_one(pair):
  text = (pair / shards.INDEX).read_text()
  body = {
    'metadata': {'total_size': 72},
    'weight_map': {'a': ONE, 'b': ONE, 'c': TWO},
  }
  assert text == json.dumps(body, indent=2) + '\n'
  assert not list(pair.glob('.*'))


def test_one_file_has_no_index(tmp_path):
  shard_writer.write_index(tmp_path, [[Spec('a', 'F32', (2,))]])
  shard_writer.write_index(tmp_path, [])
  assert not list(tmp_path.iterdir())


def test_a_file_has_its_size_from_the_start(tmp_path):
  path = tmp_path / shards.SINGLE
  path.write_bytes(b'x' * 10_000)  # of an export that was interrupted
  specs = [
    Spec('a', 'U8', (3,)),
    Spec('b', 'F64', (5, 2)),
    Spec('c', 'BF16', ()),
  ]
  writer = shard_writer.ShardWriter(path, specs)
  with writer:
    size, entries = path.stat().st_size, shards.read_header(path)
    start = int.from_bytes(path.read_bytes()[:8], 'little') + 8
    assert start % 8 == 0 and size == start + 3 + 80 + 2
    for spec in specs:
      found = entries[spec.name]
      assert (found.dtype, found.shape) == (spec.dtype, spec.shape)
      assert found.offset % shards.DTYPES[spec.dtype].itemsize == 0
      writer.write(spec.name, 0, filled(spec))
  assert path.stat().st_size == size
  writer.close()  # again: nothing to do
  with pytest.raises(AssertionError, match='closed'):
    writer.write('a', 0, np.zeros(3, np.uint8))


@hypothesis.given(st.data())
def test_blocks_may_come_in_any_order(data):
  specs = [Spec(*tensor) for tensor in data.draw(tensors)]
  arrays = {spec.name: filled(spec, i) for i, spec in enumerate(specs)}
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
    assert theirs(path) == bits(arrays)


SPEC = Spec('w', 'F32', (4, 3))


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
  assert ours(tmp_path) == bits({'w': np.ones((4, 3), 'f4')})


def test_specs_that_no_file_can_hold_are_our_bug(tmp_path):
  for specs in ([SPEC, SPEC], [Spec('__metadata__', 'F32', ())],
                [Spec('', 'F32', ())]):  # fmt: skip
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


def test_a_tensor_beyond_4_gb_has_its_place(tmp_path):
  """The file is a hole but for its ends: it takes no room on the disk."""
  spec = Spec('w', 'U8', (5, 2**30))
  path = tmp_path / shards.SINGLE
  writer = shard_writer.ShardWriter(path, [spec, Spec('z', 'U8', (3,))])
  writer.write('z', 0, np.array([1, 2, 3], np.uint8))
  with pytest.raises(AssertionError, match='w: 0 of 5'):
    writer.close()
  with shards.Folder(tmp_path) as opened:
    assert opened.entries['w'].nbytes == 5 * 2**30 == math.prod(spec.shape)
    assert opened.read('z').tolist() == [1, 2, 3]
    assert opened.read('w', slice(5, None)).shape == (0, 2**30)


def test_fuzz(tmp_path):
  """Headers, indexes and configs; it looks on both sides of the line."""
  for accepted, refused in fuzz.run(tmp_path, 2000).values():
    assert 0.1 < accepted / (accepted + refused) < 0.6


@pytest.mark.parametrize('kind', [fuzz_config, fuzz_shards])
def test_fuzz_cases_can_be_made_again(kind):
  cases = list(kind.cases(5, 50))
  assert cases == list(kind.cases(5, 50))
  assert cases != list(kind.cases(6, 50))
