"""Fuzzes records of corpora: every one is read, or is a place and a reason.

  python -m tests.data.fuzz 100000 [seed]

A case is one small file: JSONL, plain or compressed, text, or Parquet. Most
start from records as others write them, of which something is changed: a value
in the tree, the spelling, some bytes.
"""

import gzip
import json
import os
import pathlib
import random
import re
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow
from pyarrow import parquet

from dsv3_jax import errors
from dsv3_jax.data import corpus, files, tokenizer
from tests import fuzzing

_TEXTS = (
  '',
  'a text',
  'gr\u00fc\u00dfe',
  '\u4f60\n',
  '\0',
  '<\uff5cUser\uff5c>',
)
_TEXTS += ('x' * 300, '\U0001f600', '\ufeff', '\u2028', 'a\r\nb')
_NUMBERS = (0, -1, 1.5, 10**30, True, False, None, float('inf'), float('nan'))
_RAW = (  # spelled in JSON as json.dumps does not
  '"\\ud800"', '"\\udc00x"', '9' * 5000, '-' + '1' * 4301, '1e999', '01', "'a'",
  '[' * 3000 + ']' * 3000, '{"a":' * 2000 + '1' + '}' * 2000, '[' * 100, '',
  '"\\x"', '"\\u12"', '"\t"', 'NaN', '-', 'nul', '"a', '\ufeff"a"',
)  # fmt: skip
_KEYS = (
  'text',
  'messages',
  'role',
  'content',
  'tool_calls',
  'function',
  'name',
)
_KEYS += ('arguments', 'type', 'body', '', '\n', '\u00fc', '\x00')
_ROLES = ('system', 'user', 'assistant', 'tool', 'function', '', None, 'User')
_MARK = 'spelled-otherwise-'  # stands for one of _RAW until all is JSON


def _text(rng: random.Random) -> str:
  return ''.join(rng.choices(_TEXTS, k=rng.randint(1, 3)))


def _call(rng: random.Random) -> dict:
  arguments = rng.choice([_text(rng), {'a': rng.choice(_NUMBERS)}, {}])
  call = {'function': {'name': _text(rng), 'arguments': arguments}}
  return call | ({'type': 'function', 'id': '1'} if rng.random() < 0.5 else {})


def _turn(rng: random.Random) -> dict:
  role = rng.choice(_ROLES[:4])
  turn = {'role': role, 'content': _text(rng)}
  if role == 'assistant' and rng.random() < 0.4:
    turn['tool_calls'] = [_call(rng) for _ in range(rng.randint(0, 3))]
    turn['content'] = rng.choice([None, turn['content']])
  return turn


def _record(rng: random.Random) -> dict:
  """As others write them: more fields than we read."""
  record = {'id': rng.randint(0, 9), 'meta': {'tags': ['a', None, 1.5]}}
  if rng.random() < 0.5:
    return record | {'text': _text(rng)}
  return record | {'messages': [_turn(rng) for _ in range(rng.randint(1, 5))]}


def _value(rng: random.Random, depth: int = 0) -> Any:
  """Any value; spellings that JSON does not have are marked."""
  kind = rng.randint(0, 6 if depth < 3 else 3)
  if kind == 0:
    return f'{_MARK}{rng.randrange(len(_RAW))}-'
  if kind == 1:
    return rng.choice(_NUMBERS)
  if kind == 2:
    return _text(rng)
  if kind == 3:
    return rng.choice(_ROLES)
  few = range(rng.randint(0, 3))
  if kind == 4:
    return [_value(rng, depth + 1) for _ in few]
  return {rng.choice(_KEYS): _value(rng, depth + 1) for _ in few}


def _changed(rng: random.Random, value: Any) -> Any:
  """The tree with one place in it changed, dropped or doubled."""
  if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
    return _value(rng)
  places = list(value) if isinstance(value, dict) else range(len(value))
  at, action = rng.choice(places), rng.random()
  value = value.copy()
  if action < 0.6:
    value[at] = _changed(rng, value[at])
  elif action < 0.8:
    del value[at]
  elif isinstance(value, dict):
    value[rng.choice(_KEYS)] = _value(rng)
  else:
    value.insert(at, value[at])
  return value


def _line(rng: random.Random) -> bytes:
  record = _record(rng)
  if rng.random() < 0.7:
    record = _changed(rng, record)
  text = json.dumps(record, ensure_ascii=rng.random() < 0.5)
  raw = lambda match: _RAW[int(match[1])]
  text = re.sub(f'"{_MARK}(\\d+)-"', raw, text)
  return _damaged(rng, text.encode(), 0.15)


def _damaged(rng: random.Random, data: bytes, share: float) -> bytes:
  """With probability `share`: cut, or with other bytes."""
  if rng.random() >= share or not data:
    return data
  at = rng.randrange(len(data))
  if rng.random() < 0.3:
    return data[:at]
  size = rng.randint(0, 4)
  return data[:at] + rng.randbytes(rng.randint(0, 4)) + data[at + size :]


def _parquet(rng: random.Random, folder: pathlib.Path) -> bytes:
  """A column of texts or conversations, as far as Arrow takes the values."""
  rows = [_record(rng) for _ in range(rng.randint(0, 5))]
  if rng.random() < 0.5:
    rows = [_changed(rng, row) for row in rows]
  key = rng.choice(['text', 'messages', 'text', 'messages', 'body'])
  rows = [row.get(key) if isinstance(row, dict) else None for row in rows]
  try:
    table = pyarrow.table({key: rows, 'id': list(range(len(rows)))})
    path = folder / 'made.parquet'
    parquet.write_table(table, path, row_group_size=rng.randint(1, 3))
  except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
    return b'PAR1'
  return path.read_bytes()


def cases(
  seed: int, count: int, folder: pathlib.Path
) -> Iterator[tuple[str, bytes]]:
  """(suffix, content) of files."""
  rng = random.Random(seed)
  for _ in range(count):
    kind = rng.random()
    if kind < 0.1:
      yield '.parquet', _damaged(rng, _parquet(rng, folder), 0.5)
      continue
    if kind < 0.2:
      yield '.txt', _damaged(rng, _text(rng).encode(), 0.5)
      continue
    lines = [_line(rng) for _ in range(rng.randint(1, 4))]
    data = rng.choice([b'\n', b'\r\n', b'\n\n', b'\r']).join(lines)
    data = rng.choice([b'', b'', b'\xef\xbb\xbf', b'\xff\xfe']) + data
    if kind > 0.3:
      yield '.jsonl', data
    elif kind > 0.25:
      yield '.jsonl.gz', _damaged(rng, gzip.compress(data), 0.5)
    else:
      data = pyarrow.Codec('zstd').compress(data, asbytes=True)
      yield '.jsonl.zst', _damaged(rng, data, 0.5)


def check(
  case: tuple[str, bytes], folder: pathlib.Path, bpe: tokenizer.Tokenizer
) -> tuple[int, int]:
  """Opens one file; how many records it has, and how many are bad.

  Raises:
    AssertionError: neither, or a record that cannot be encoded.
  """
  path = folder / f'case{case[0]}'
  stamp = path.stat().st_mtime_ns + 1 if path.exists() else 0
  path.write_bytes(case[1])
  os.utime(path, ns=(stamp, stamp))  # or the last case of its size is meant
  try:
    opened = files.open_glob(str(path), 'text', folder / 'cache')
  except errors.InputError as error:
    if case[0] == '.parquet' and 'has no column' in str(error):
      return 0, 1
    raise
  for record in opened:
    if 'messages' in record:
      ids, learned = bpe.encode_chat(record['messages'])
      assert len(ids) == len(learned)
    else:
      bpe.encode(record['text'])
    corpus.document_text(record).encode()
  assert bool(opened.num_bad) == bool(opened.faults())
  for fault in opened.faults():
    assert re.fullmatch(re.escape(str(path)) + r'([:#]\d+)?: \S.*', fault), (
      fault
    )
    assert fault.isprintable() and len(fault) < 500, fault
  return len(opened), opened.num_bad


def run(folder: pathlib.Path, count: int, seed: int = 0) -> dict[str, list]:
  """Checks `count` cases; by suffix, how many records were read and bad.

  Raises:
    AssertionError: with the case, or whatever it was that a case raised.
  """
  bpe = tokenizer.train([' '.join(_TEXTS)], 280, tools=True)
  counts = {}
  for i, case in enumerate(cases(seed, count, folder)):
    try:
      good, bad = check(case, folder, bpe)
    except BaseException as error:
      error.add_note(f'case {i} of seed {seed}: {case!r:.5000}')
      raise
    sums = counts.setdefault(case[0], [0, 0])
    sums[0], sums[1] = sums[0] + good, sums[1] + bad
    if (i + 1) % 10_000 == 0:
      print(f'{i + 1}: [read, bad] {counts}', flush=True)
  return counts


if __name__ == '__main__':
  fuzzing.main(run, sys.argv)
