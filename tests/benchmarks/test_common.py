"""Clock, rows, tables and flags that the benchmarks share."""

import argparse
import json

import pytest

from benchmarks.common import clock, report


def test_variants_take_turns_and_each_comes_first():
  order = []
  variants = {name: lambda name=name: order.append(name) for name in 'abc'}
  timer = clock.Clock(seconds=0.0, sample_seconds=0.0, rounds=(3, 9))
  times = timer.time(variants, dict.fromkeys('abc', 1))
  assert order == list('abcbcacab')
  assert {summary.samples for summary in times.values()} == {3}


def test_time_is_that_of_one_piece_of_work(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(clock.time, 'perf_counter', lambda: now[0])

  def work(seconds):
    now[0] += seconds

  timer = clock.Clock(seconds=100.0, sample_seconds=1.0, rounds=(5, 5))
  variants = {'one': lambda: work(0.25), 'four': lambda: work(2.0)}
  times = timer.time(variants, {'one': 1, 'four': 4})
  assert times['one'].median == times['one'].minimum == 0.25
  assert times['four'].median == 0.5


def test_summary_has_median_and_spread():
  summary = clock.summary([5.0, 1.0, 2.0, 3.0, 4.0])
  assert summary[:2] == (3.0, 1.0)
  row = summary.row()
  assert row['milliseconds_median'] == 3000.0
  assert row['spread_percent'] == pytest.approx(100 * 3.2 / 3.0)


def test_table_has_a_column_for_every_key_that_has_a_value():
  rows = [{'a': 1, 'b': None}, {'a': None, 'c': 0.00012345}, {'c': 'x|y'}]
  assert report.table(rows).splitlines() == [
    '| a | c |',
    '| --- | --- |',
    '| 1 |  |',
    '|  | 0.000123 |',
    '|  | x/y |',
  ]


def test_rows_are_kept_as_they_come(tmp_path, capsys):
  path = tmp_path / 'rows.jsonl'
  rows = report.Rows(argparse.Namespace(json=True, rows=path))
  rows.append({'milliseconds': 1.5})
  assert json.loads(capsys.readouterr().out) == {'milliseconds': 1.5}
  rows.append({'milliseconds': 2.5})
  text = path.read_text()
  assert report.read_rows(text.splitlines()) == rows
  truncated = text[:-5].splitlines()
  assert report.read_rows(truncated) == rows[:1]


def test_results_are_appended_with_device_and_commit(tmp_path, capsys):
  output = tmp_path / 'new' / 'results.md'
  args = argparse.Namespace(json=False, output=output)
  for value in (1, 2):
    report.publish('name', 'About it.', [{'value': value}], args)
    assert f'| {value} |' in capsys.readouterr().out
  text = output.read_text()
  assert text.count('# name\n') == 1
  assert '| 1 |' in text and '| 2 |' in text
  for part in ('date', 'device', 'jax', 'commit', 'source'):
    assert text.count(f'{part} ') >= 2
  args.json = True
  report.publish('name', 'About it.', [{'value': 3}], args)
  assert not capsys.readouterr().out


def test_bad_flag_is_one_line(capsys):
  with pytest.raises(SystemExit) as ended:
    report.parser('fp8_matmul', 'About').parse_args(['--fast'])
  assert ended.value.code == 2
  message = capsys.readouterr().err
  assert message == 'dsv3: unrecognized arguments: --fast\n'
