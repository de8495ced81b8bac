"""The benchmark of the gate and the permutation."""

import json

import pytest

from benchmarks import routing


def test_parts_beside_floors_and_products(tmp_path, capsys):
  path = tmp_path / 'results.md'
  args = ['--dry_run', '--json', f'--output={path}']
  assert routing.main(args) == 0
  rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
  parts = {row['part']: row for row in rows}
  assert list(parts) == ['gate', 'logits', 'layout', 'permute', 'unpermute']
  for row in rows:
    assert row['of_experts'] > row['to_save'] >= 0 and row['floor_ms'] > 0
  floor = {name: row['floor_ms'] for name, row in parts.items()}
  # 16 tokens read, and 8 times as many written; or the other way round.
  assert floor['permute'] == floor['unpermute']
  weights = 7168 * 256 * 4 / (16 * 7168 * 2)
  want = (1 + weights) / 9
  assert floor['gate'] / floor['permute'] == pytest.approx(want)
  assert '16 tokens' in path.read_text()


def test_bad_flags_are_one_line(capsys):
  with pytest.raises(SystemExit) as ended:
    routing.main(['--tokens=0'])
  assert ended.value.code == 2
  assert '--tokens=0 must be at least 1' in capsys.readouterr().err
