"""One safetensors file: its header, read strictly or refused."""

import json
import os
import tracemalloc

import pytest

from dsv3_jax import errors
from dsv3_jax.checkpoint.safetensors import reader as shards
from tests.checkpoint.safetensors import shard_files as files


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


def refused_file(tmp_path, raw, *expected):
  path = tmp_path / 'some.safetensors'
  path.write_bytes(raw)
  files.refused(lambda: shards.read_header(path), str(path), *expected)
  files.refused(lambda: shards.Folder(tmp_path), str(path), *expected)


@pytest.mark.parametrize('case', HEADERS)
def test_a_header_is_refused(tmp_path, case):
  header, *expected = HEADERS[case]
  refused_file(tmp_path, raw_file(header), *expected)


@pytest.mark.parametrize('case', ENTRIES)
def test_an_entry_is_refused_by_name(tmp_path, case):
  header, *expected = ENTRIES[case]
  line = ["'w'", *expected] if case != 'empty, inside' else expected
  refused_file(tmp_path, raw_file(header), *line)


def test_a_hole_between_tensors_is_refused(tmp_path):
  header = PAIR % entry(span=(12, 20))
  expected = ("'w'", "leaves a hole after tensor 'v': 4 bytes")
  refused_file(tmp_path, raw_file(header, bytes(20)), *expected)


@pytest.mark.parametrize('name', ['', '\ud800', 'a\udc00b'])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
  refused_file(tmp_path, raw_file(one(name)), repr(name), 'name')


@pytest.mark.parametrize('name', ['a\nb', '\u2028', '\x00', 'x' * 10**6])
def test_any_name_is_reported_in_one_short_line(tmp_path, name):
  path = tmp_path / 'some.safetensors'
  path.write_bytes(raw_file(one(name, dtype='F64')))
  line = files.refused(lambda: shards.read_header(path), 'hold 8 bytes')
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
  files.refused(lambda: shards.read_header(path), str(path), '100000001')
  (tmp_path / shards.INDEX).write_bytes(b'{')
  os.truncate(tmp_path / shards.INDEX, 10**8 + 1)
  files.refused(
    lambda: shards.Folder(tmp_path), shards.INDEX, '100000001 bytes'
  )


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
  assert files.ours(tmp_path) == files.theirs(path)


def test_a_bool_of_another_byte_is_refused(tmp_path):
  header = one('flag', dtype='BOOL', shape=(2,), span=(0, 2))
  (tmp_path / shards.SINGLE).write_bytes(raw_file(header, b'\x01\x02'))
  with shards.Folder(tmp_path) as opened:
    files.refused(lambda: opened.read('flag'), shards.SINGLE, "'flag'", 'BOOL')
    assert opened.read('flag', slice(0, 1)).item() is True
