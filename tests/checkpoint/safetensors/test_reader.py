"""Folders of safetensors files: reading them, their index, their hashes."""

import hashlib
import json
import os
import subprocess
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dsv3_jax.checkpoint.safetensors import header as shard_header
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.checkpoint.safetensors import writer as shard_writer
from tests.checkpoint.safetensors import fuzz, fuzz_config, fuzz_shards
from tests.checkpoint.safetensors import shard_files as files

TensorSpec = shard_writer.TensorSpec


@pytest.fixture(name='pair')
def _pair(tmp_path):
  return files.make_pair(tmp_path / 'pair')


def test_files_that_are_none_are_refused(tmp_path):
  os.mkfifo(tmp_path / 'pipe.safetensors')  # would wait for ever
  (tmp_path / 'folder.safetensors').mkdir()
  for name in ('pipe', 'folder'):
    path = tmp_path / f'{name}.safetensors'
    files.refused(
      lambda path=path: shards.read_header(path), str(path), 'not a file'
    )
    files.refused(
      lambda path=path: shards.digest(path), str(path), 'not a file'
    )
  gone = tmp_path / 'gone.safetensors'
  files.refused(lambda: shards.read_header(gone), str(gone), 'No such file')
  files.refused(lambda: shards.digest(gone), str(gone), 'No such file')


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
  path = tmp_path / shards.SINGLE
  files.put(path, {'v': np.ones(4, 'f4'), 'w': np.ones(4, 'f4')})
  with shards.Folder(tmp_path) as opened:
    os.truncate(path, path.stat().st_size - 1)
    opened.read('v')
    files.refused(lambda: opened.read('w'), str(path), "'w'", 'shorter')
    opened.read('w', slice(0, 3))
  with pytest.raises(AssertionError, match='closed'):
    opened.read('v')
  files.put(path, {'v': np.ones(4, 'f4')})
  with shards.Folder(tmp_path) as opened:
    path.unlink()
    files.refused(lambda: opened.read('v'), str(path), 'No such file')


def test_a_header_that_is_cut_while_it_is_read_is_refused(
  tmp_path, monkeypatch
):
  path, fstat = tmp_path / shards.SINGLE, os.fstat
  files.put(path, {'v': np.ones(4, 'f4')})

  def cut_after(handle):
    status = fstat(handle)
    os.truncate(path, 20)
    return status

  monkeypatch.setattr(shard_header.os, 'fstat', cut_after)
  files.refused(
    lambda: shard_header.read_header(path), str(path), 'cut while it was read'
  )


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
    assert opened.entries['c'].path == pair / files.TWO
    assert opened.entries['c'].nbytes == 24
    np.testing.assert_array_equal(
      opened.read('b'), safetensors.numpy.load_file(pair / files.ONE)['b']
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
    f'{{"weight_map": {{"a": "{files.ONE}", "a": "{files.TWO}"}}}}',
    "'a' twice",
  ),
  'file no string': ('{"weight_map": {"a": 1}}', "'a'", 'plain name'),
  'file a list': (
    f'{{"weight_map": {{"a": ["{files.ONE}"]}}}}',
    "'a'",
    'plain',
  ),
  'deep': ('{"weight_map":' * 100_000, 'nested too deeply'),
}


@pytest.mark.parametrize('case', INDEXES)
def test_an_index_is_refused(pair, case):
  raw, *expected = INDEXES[case]
  raw = raw.encode() if isinstance(raw, str) else raw
  (pair / shards.INDEX).write_bytes(raw)
  files.refused(lambda: shards.Folder(pair), shards.INDEX, *expected)


@pytest.mark.parametrize(
  'name',
  [
    f'../{files.ONE}', f'/etc/{files.ONE}', f'sub/{files.ONE}',
    f'./{files.ONE}', f'sub\\{files.ONE}',
    '..safetensors', 'a..safetensors', 'nul\0.safetensors', 'model.bin',
    'line\n.safetensors', '\ud800.safetensors', '', 'model.safetensors/',
  ],
)  # fmt: skip
def test_an_unsafe_file_name_is_refused(pair, name):
  (pair / 'sub').mkdir()
  (pair / 'sub' / files.ONE).write_bytes((pair / files.ONE).read_bytes())
  remap(pair, lambda shard_of: shard_of.update(a=name))
  files.refused(lambda: shards.Folder(pair), shards.INDEX, "'a'", 'plain name')


def test_a_name_longer_than_the_system_takes_is_refused(pair):
  remap(pair, lambda s: s.update(a='x' * 244 + '.safetensors'))
  files.refused(lambda: shards.Folder(pair), 'plain name')
  long = '\xe9' * 200 + '.safetensors'  # in bytes
  remap(pair, lambda s: s.update(dict.fromkeys(s, long)))
  files.refused(lambda: shards.Folder(pair), 'cannot be read')


def test_index_and_files_must_agree(pair):
  remap(pair, lambda s: s.update(d=files.TWO))
  files.refused(
    lambda: shards.Folder(pair), shards.INDEX, "'d' is not in", files.TWO
  )
  remap(pair, lambda s: [s.pop('d'), s.pop('a')])
  files.refused(
    lambda: shards.Folder(pair),
    str(pair / files.ONE),
    "'a' is not in the index",
  )
  remap(pair, lambda s: s.update(a=files.TWO))
  files.refused(
    lambda: shards.Folder(pair), str(pair / files.ONE), "'a' is in", files.TWO
  )
  remap(pair, lambda s: s.update(a=files.ONE))
  files.ours(pair)
  extra = {'c': np.ones(2, 'f4'), 'a': np.ones(2, 'f4')}  # a in two files
  files.put(pair / files.TWO, extra)
  files.refused(
    lambda: shards.Folder(pair), str(pair / files.TWO), "'a' is in", files.ONE
  )
  (pair / files.TWO).unlink()
  files.refused(
    lambda: shards.Folder(pair), str(pair / files.TWO), 'No such file'
  )


def test_links_are_followed_as_the_hub_s_cache_has_them(pair, tmp_path):
  outside = tmp_path / 'blob'
  (pair / files.ONE).rename(outside)
  (pair / files.ONE).symlink_to(outside)
  assert len(files.ours(pair)) == 3
  (pair / files.ONE).unlink()
  (pair / files.ONE).symlink_to(files.ONE)
  files.refused(
    lambda: shards.Folder(pair), str(pair / files.ONE), 'cannot be read'
  )


def test_a_folder_without_an_index_has_one_file(tmp_path):
  files.refused(
    lambda: shards.Folder(tmp_path / 'gone'), 'gone', 'not a folder'
  )
  files.refused(
    lambda: shards.Folder(tmp_path), str(tmp_path), '0 .safetensors files'
  )
  files.put(tmp_path / 'x.safetensors', {'x': np.ones(2, 'f4')})
  files.refused(
    lambda: shards.Folder(tmp_path / 'x.safetensors'), 'not a folder'
  )
  assert list(files.ours(tmp_path)) == ['x']
  files.put(tmp_path / 'y.safetensors', {'y': np.ones(2, 'f4')})
  files.refused(
    lambda: shards.Folder(tmp_path), str(tmp_path), '2 .safetensors files'
  )
  files.put(tmp_path / shards.SINGLE, {'z': np.ones(2, 'f4')})
  assert list(files.ours(tmp_path)) == ['z']


def test_a_single_file_s_name_is_one_line(tmp_path):
  files.put(tmp_path / 'two\nlines.safetensors', {'x': np.ones(2, 'f4')})
  files.refused(lambda: shards.Folder(tmp_path), str(tmp_path), 'plain name')


def test_an_index_beside_a_single_file_is_refused(pair):
  files.put(pair / shards.SINGLE, {'x': np.ones(2, 'f4')})
  files.refused(
    lambda: shards.Folder(pair), str(pair), shards.SINGLE, 'remove one'
  )


# SHA256SUMS.


def sums(folder):
  paths = folder.glob('*.safetensors')
  digests = {path.name: shards.digest(path) for path in paths}
  shard_writer.write_sums(folder, digests)
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
    call = ['sha256sum', flag, './' + files.ONE, files.TWO, shards.INDEX]
    process = subprocess.run(call, cwd=pair, check=True, capture_output=True)
    path.write_bytes(process.stdout)
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
    raw = bytearray((pair / files.TWO).read_bytes())
    raw[at] ^= 1
    (pair / files.TWO).write_bytes(raw)
    files.refused(
      opened.verify, str(pair / files.TWO), 'does not match', shards.SUMS
    )


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
  raw, *expected = LINES[case]
  path = sums(pair)
  if case in ('missing', 'folder', 'long'):
    raw = path.read_text() + raw
  path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
  files.refused(lambda: verify(pair), str(pair), *expected)


def test_a_file_that_is_not_listed_is_refused(pair):
  sums(pair)
  (pair / 'new.safetensors').write_bytes(b'')
  files.refused(
    lambda: verify(pair), str(pair), "'new.safetensors' is not listed"
  )


@pytest.mark.parametrize(
  'cases', [500, pytest.param(2000, marks=pytest.mark.nightly)]
)
def test_fuzz(tmp_path, cases):
  """Headers, indexes and configs; it looks on both sides of the line."""
  for accepted, refused in fuzz.run(tmp_path, cases).values():
    assert 0.1 < accepted / (accepted + refused) < 0.6


@pytest.mark.parametrize('kind', [fuzz_config, fuzz_shards])
def test_fuzz_cases_can_be_made_again(kind):
  cases = list(kind.cases(5, 50))
  assert cases == list(kind.cases(5, 50))
  assert cases != list(kind.cases(6, 50))
