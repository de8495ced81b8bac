"""Files that others wrote: checked once, faults by place, packed or not."""

import dataclasses
import datetime
import errno
import gzip
import hashlib
import json
import os
import re
import resource
import sys

import pyarrow
import pytest
from pyarrow import parquet

from dsv3_jax import errors
from dsv3_jax.data import corpus, files, scan
from tests import settings
from tests.data import fuzz

DEEP = b'{"text": "x", "a": ' + b'[' * 5000 + b']' * 5000 + b'}'
BAD = (
  (b'{"text": "ab\\ud800"}', 'text has a lone surrogate at character 2'),
  (b'{"text": "x", "n": ' + b'9' * 5000 + b'}', 'of more than 4,300 digits'),
  (DEEP, 'more than 64 levels'),
  (DEEP.replace(b'[' * 5000 + b']' * 5000, b'[' * 65 + b']' * 65), '64 levels'),
  (b'{"text": null, "\\ud800\\n": 1}', "record has: 'text', '\\ud800\\n'"),
  (b'{"messages": []}', 'messages=[] must hold'),
)  # fmt: skip


def data_config(folder, source, **changes):
  cfg = settings.small(data__valid_fraction=0.3).data
  cache = str(folder / 'cache')
  return dataclasses.replace(
    cfg, source=str(folder / source), cache_dir=cache, **changes
  )


def open_files(folder, pattern):
  return files.open_glob(str(folder / pattern), 'text', folder / 'cache')


def lines(count=40):
  return [json.dumps({'text': f'text {i}'}).encode() for i in range(count)]


def names(part):
  return [part[i]['name'] for i in range(len(part))]


@pytest.mark.parametrize(('bad', 'expected'), BAD)
def test_a_bad_line_has_its_place_and_reason(tmp_path, bad, expected):
  good = lines()
  body = [*good[:7], b'', bad, *good[7:]]
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(body))
  opened = open_files(tmp_path, '*.jsonl')
  assert len(list(opened)) == len(good) and opened.num_bad == 1
  (fault,) = opened.faults()
  assert fault.startswith(f'{tmp_path}/a.jsonl:9: ') and expected in fault
  assert fault.isprintable() and fault.isascii()


def test_a_shallow_value_and_any_other_field_is_none_of_ours(tmp_path):
  shallow = b'[' * 63 + b'NaN' + b']' * 63
  line = b'{"a": %b, "text": "x", "messages": null}' % shallow
  (tmp_path / 'a.jsonl').write_bytes(line)
  assert open_files(tmp_path, '*.jsonl')[0]['text'] == 'x'


def test_refused_by_default_or_left_out_when_asked(tmp_path):
  body = lines()
  for i, (bad, _) in enumerate(BAD):
    body[3 * i] = bad
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(body))
  with pytest.raises(errors.InputError) as caught:
    corpus.open_corpus(data_config(tmp_path, '*.jsonl'))
  message = str(caught.value)
  assert 'has 6 bad records: ' in message and '; and 3 more: ' in message
  assert re.findall(r'a\.jsonl:(\d+): ', message) == ['1', '4', '7']
  assert message.endswith("data.bad_records='skip'") and message.isprintable()
  skip = data_config(tmp_path, '*.jsonl', bad_records='skip')
  opened = corpus.open_corpus(skip)
  assert opened.num_skipped == len(opened.faults) == 6
  assert len(opened.train) + len(opened.valid) == 34
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(bad for bad, _ in BAD))
  with pytest.raises(
    errors.InputError, match=r'no train .* 6 bad records left'
  ):
    corpus.open_corpus(skip)


def test_a_bad_record_moves_no_other_to_the_other_part(tmp_path):
  opened = {}
  for kind in ('whole', 'broken'):
    body = lines()
    if kind == 'broken':
      body[0] = body[5] = body[20] = b'{'
    (tmp_path / kind).mkdir()
    (tmp_path / kind / 'a.jsonl').write_bytes(b'\n'.join(body))
    cfg = data_config(tmp_path, f'{kind}/*.jsonl', bad_records='skip')
    opened[kind] = corpus.open_corpus(cfg)
  gone = {'a.jsonl#0', 'a.jsonl#5', 'a.jsonl#20'}
  for part in ('train', 'valid'):
    whole = getattr(opened['whole'], part)
    text_of = {whole[i]['name']: whole[i] for i in range(len(whole))}
    left = {n: x for n, x in text_of.items() if n not in gone}
    broken = getattr(opened['broken'], part)
    assert {broken[i]['name']: broken[i] for i in range(len(broken))} == left
  assert opened['broken'].fingerprint != opened['whole'].fingerprint


def packed(kind, data):
  if kind == '.gz':  # of two members, as written by parallel compressors
    return gzip.compress(data[:99]) + gzip.compress(data[99:])
  if kind == '.zst':
    pack = lambda part: pyarrow.Codec('zstd').compress(part, asbytes=True)
    return pack(data[:99]) + pack(data[99:])
  return data


@pytest.mark.parametrize('bom', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('kind', ['', '.gz', '.zst'])
def test_packed_or_not_and_with_a_byte_order_mark(tmp_path, kind, bom):
  """The same records by the same names; only a mark changes the content."""
  body = b'\n'.join(lines())
  for folder, pack, start in (('a', '', b''), ('b', kind, bom)):
    (tmp_path / folder).mkdir()
    for name, data in (('x.jsonl', body), ('y.txt', b'one\r\ntwo\rthree')):
      path = tmp_path / folder / f'{name}{pack}'
      path.write_bytes(packed(pack, start + data))
  plain = open_files(tmp_path, 'a/*')
  other = open_files(tmp_path, 'b/*')
  assert list(plain) == list(other)
  assert plain[40] == {'name': 'y.txt#0', 'text': 'one\ntwo\nthree'}
  assert (plain.fingerprint() == other.fingerprint()) == (not bom)
  assert not other.num_bad


@pytest.mark.parametrize('kind', ['.gz', '.zst'])
def test_a_damaged_archive_is_one_fault(tmp_path, kind):
  whole = packed(kind, os.urandom(5000))
  (tmp_path / 'good.jsonl').write_bytes(b'\n'.join(lines()))
  for name, data in (
    ('cut', whole[:-20]),
    ('none', b'no archive'),
    ('tail', whole + b'more'),
  ):
    (tmp_path / f'{name}.jsonl{kind}').write_bytes(data)
  opened = open_files(tmp_path, '*.jsonl*')
  assert len(opened) == 40 and opened.num_bad == 3
  for fault, name in zip(opened.faults(), ('cut', 'none', 'tail'), strict=True):
    place = re.escape(f'{tmp_path}/{name}.jsonl{kind}: cannot be unpacked: ')
    assert re.match(place + '.+', fault)
  # And none is left: only the scans of four files.
  assert not list((tmp_path / 'cache' / 'unpacked').iterdir())
  first = opened.fingerprint()
  again = open_files(tmp_path, '*.jsonl*')
  assert (again.num_bad, again.fingerprint()) == (3, first)


def test_conversations_in_parquet(tmp_path):
  """Structs have all fields, null where a turn has none."""
  call = {'type': None, 'function': {'name': 'f', 'arguments': '{}'}}
  good = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': None, 'tool_calls': [call]},
    {'role': 'tool', 'content': 'b'},
  ]
  rows = [
    good[:1],
    good,
    [{'role': 'user', 'content': None}],
    None,
    [{'role': 'cat', 'content': 'a'}],
    [{'role': 'user', 'content': 'again'}, None],
    good[:1],
  ]
  table = pyarrow.table({'messages': rows, 'id': list(range(7))})
  assert str(table.schema.field('messages').type).startswith('list<')
  parquet.write_table(table, tmp_path / 'x.parquet', row_group_size=2)
  opened = open_files(tmp_path, '*.parquet')
  where = f'{tmp_path}/x.parquet'
  assert opened.faults() == [
    f'{where}#2: messages[0].content must be a string',
    f'{where}#3: messages must be a list of turns',
    f"{where}#4: messages[0].role='cat' must be one of: system, user, "
    'assistant, tool',
    f'{where}#5: messages[1] must be an object',
  ]
  assert names(opened) == ['x.parquet#0', 'x.parquet#1', 'x.parquet#6']
  assert opened.tool_turns() == f'{where}#1'
  assert opened[0]['messages'][0]['content'] == 'a'
  assert opened[1]['messages'][1]['tool_calls'] == [call]
  assert corpus.document_text(opened[1]) == 'a\n\nf\n{}\nb'


def test_a_column_of_messages_is_a_text_only_if_it_is_the_text_key(tmp_path):
  table = pyarrow.table({'messages': ['a', 'b']})
  parquet.write_table(table, tmp_path / 'x.parquet')
  assert open_files(tmp_path, 'x*').num_bad == 2
  path, cache = str(tmp_path / 'x.parquet'), tmp_path / 'cache'
  opened = files.open_glob(path, 'messages', cache)
  assert [record['text'] for record in opened] == ['a', 'b']


def test_rows_of_text_in_parquet(tmp_path):
  """A null, another type, bytes that are not UTF-8, a damaged row group."""
  texts = [f'text {i} ' * 9 for i in range(30)]
  path = tmp_path / 'b.parquet'
  options = {'row_group_size': 10, 'use_dictionary': False}
  options |= {'compression': 'none'}
  parquet.write_table(pyarrow.table({'text': texts}), path, **options)
  whole = path.read_bytes()
  assert len(open_files(tmp_path, 'b*')) == 30
  # A length within the second row group, and a byte of a text in the third.
  at = whole.index(b'text 12 ') - 4
  broken = whole[:at] + b'\xff\xff\xff\x7f' + whole[at + 4 :]
  broken = broken.replace(b'text 25 text', b'text 2\xff text', 1)
  path.write_bytes(broken)
  os.utime(path, ns=(1, 1))  # the size is the same, and the time may be
  nulls = pyarrow.array(['a', None, 'b'])
  parquet.write_table(pyarrow.table({'text': nulls}), tmp_path / 'c.parquet')
  numbers = pyarrow.table({'text': [1, 2]})
  parquet.write_table(numbers, tmp_path / 'd.parquet')
  opened = open_files(tmp_path, '*.parquet')
  group, text, null, one, two = opened.faults()
  expected = r'b\.parquet#10: rows 10 to 19 cannot be read: .+'
  assert re.search(expected, group)
  assert text.endswith('b.parquet#25: not UTF-8')
  expected = "c.parquet#1: data.text_key='text' must be a string, not None"
  assert null.endswith(expected)
  assert [one[-1], two[-1]] == ['1', '2']
  assert opened.num_bad == 10 + 1 + 1 + 2
  want = [*range(10), *range(20, 25), *range(26, 30)]
  left = [f'b.parquet#{i}' for i in want]
  assert names(opened) == [*left, 'c.parquet#0', 'c.parquet#2']
  assert opened[12]['text'] == texts[22]


def test_arguments_that_json_cannot_say(tmp_path):
  """Of a struct in Parquet, which may hold dates and bytes."""
  rows = []
  for value in (b'x', datetime.date(2026, 1, 1), 1.5):
    call = {'function': {'name': 'f', 'arguments': {'at': value}}}
    rows.append([{'role': 'assistant', 'tool_calls': [call]}])
    table = pyarrow.table({'messages': rows[-1:]})
    parquet.write_table(table, tmp_path / f'{len(rows)}.parquet')
  opened = open_files(tmp_path, '*.parquet')
  where = 'parquet#0: messages[0].tool_calls[0].function.arguments: Object of '
  assert [fault.split('.', 1)[1] for fault in opened.faults()] == [
    f'{where}type bytes is not JSON serializable',
    f'{where}type date is not JSON serializable',
  ]
  (record,) = opened
  assert corpus.document_text(record) == '\nf\n{"at": 1.5}'


def test_what_cannot_be_read_now_is_not_remembered_as_damage(
  tmp_path, monkeypatch
):
  """As on a network disk: the command ends, and the next start reads all."""
  table = pyarrow.table({'text': ['a', 'b']})
  parquet.write_table(table, tmp_path / 'a.parquet')
  data = packed('.gz', b'\n'.join(lines()))
  (tmp_path / 'b.jsonl.gz').write_bytes(data)

  def fail(*args, **options):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  for name, at, method in (
    ('a.parquet', parquet.ParquetFile, 'read_row_group'),
    ('b.jsonl.gz', pyarrow.CompressedInputStream, 'read'),
  ):
    stream = type('Failing', (at,), {method: fail})
    with monkeypatch.context() as patch:
      module = parquet if at is parquet.ParquetFile else pyarrow
      patch.setattr(module, at.__name__, stream)
      expected = rf'{name}: cannot be read: Input/output error'
      with pytest.raises(errors.InputError, match=expected):
        open_files(tmp_path, name)
    opened = open_files(tmp_path, name)
    assert not opened.num_bad and len(opened) == (2 if name[0] == 'a' else 40)


def test_a_link_to_nothing_is_named(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "x"}')
  (tmp_path / 'b.jsonl').symlink_to(tmp_path / 'gone')
  (tmp_path / 'c.jsonl').mkdir()
  with pytest.raises(
    errors.InputError, match=r'b\.jsonl is not a file: a brok'
  ):
    open_files(tmp_path, '*')
  (tmp_path / 'b.jsonl').unlink()
  assert len(open_files(tmp_path, '*')) == 1


def test_large_row_groups_are_slow_to_shuffle(tmp_path, monkeypatch, capsys):
  """Which is said once, of the column that is read."""
  rows = [[{'role': 'user', 'content': 'x' * 40}]] * 100
  other = [os.urandom(300) for _ in range(100)]
  options = {'use_dictionary': False, 'compression': 'none'}
  for name, size in (('small', 10), ('large', 50)):
    table = pyarrow.table({'messages': rows, 'messages_2': other})
    path = tmp_path / f'{name}.parquet'
    parquet.write_table(table, path, row_group_size=size, **options)
  assert len(open_files(tmp_path, 'small*')) == 100
  assert not capsys.readouterr().err
  (tmp_path / 'cache' / 'scans').rename(tmp_path / 'other')
  monkeypatch.setattr(files, 'LARGE_GROUP', 2000)
  for expected in (1, 0):
    assert len(open_files(tmp_path, '*.parquet')) == 200
    message = capsys.readouterr().err
    assert message.count('\n') == expected
    want = (
      f'{tmp_path}/large.parquet: to read a record, a row group of up to 0 '
    )
    assert message.startswith(want if expected else '')


def test_parquet_with_a_damaged_name_of_a_column(tmp_path):
  """For which Arrow raises an error of Python, not of its own."""
  path = tmp_path / 'a.parquet'
  parquet.write_table(pyarrow.table({'text': ['a'], 'other': ['b']}), path)
  path.write_bytes(path.read_bytes().replace(b'other', b'\xbather', 1))
  (fault,) = open_files(tmp_path, '*.parquet').faults()
  assert fault.startswith(f"{path}: not a Parquet file: 'utf-8' codec can't")


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc/self/fd')
def test_few_of_many_parquet_files_are_in_memory_and_none_open(tmp_path):
  texts = [os.urandom(50_000).hex()]
  for i in range(100):
    table = pyarrow.table({'text': texts, 'i': [i]})
    parquet.write_table(table, tmp_path / f'{i:02}.parquet')
  opened = open_files(tmp_path, '*.parquet')
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  before = pyarrow.total_allocated_bytes()
  most = len(os.listdir('/proc/self/fd')) + 20
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  try:
    assert [record['text'] for record in opened] == texts * 100
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  grown = pyarrow.total_allocated_bytes() - before
  assert grown < 10 * len(texts[0])


def test_a_name_in_one_line_and_one_that_is_no_text(tmp_path):
  (tmp_path / 'a\nb.jsonl').write_bytes(b'{')
  (fault,) = open_files(tmp_path, '*.jsonl').faults()
  assert fault.isprintable() and 'a\\nb.jsonl' in fault
  with open(os.fsencode(tmp_path) + b'/\xff.jsonl', 'wb') as file:
    file.write(b'{"text": "x"}')
  with pytest.raises(errors.InputError, match='is not UTF-8: rename') as caught:
    open_files(tmp_path, '*.jsonl')
  assert str(caught.value).isprintable()


def test_the_mark_of_release_0_2(tmp_path):
  """Names and sizes; none where that release read other text, or none."""
  texts = {'a.txt': b'one', 'b.txt': b'second'}
  for name, data in texts.items():
    (tmp_path / name).write_bytes(data)
  sizes = [(name, len(data)) for name, data in texts.items()]
  want = hashlib.sha256(repr(sizes).encode()).hexdigest()
  opened = open_files(tmp_path, '*.txt')
  assert opened.size_fingerprint() == want
  for name, data in (
    ('c.txt', scan.BOM + b'x'),
    ('c.txt', b'\xff'),
    ('c.txt.gz', gzip.compress(b'x')),
  ):
    (tmp_path / name).write_bytes(data)
    assert open_files(tmp_path, '*.txt*').size_fingerprint() == ''
    (tmp_path / name).unlink()


def test_fuzzed_records_are_read_or_named(tmp_path):
  counts = fuzz.run(tmp_path, 1000, seed=1)
  assert all(good > 10 and bad > 10 for good, bad in counts.values())
  assert len(counts) == 5
