"""The benchmark of paged decoding: what it counts, checks and prints."""

import json

import jax
import pytest

from benchmarks import mla_decode
from pallas_kernels.mla_decode import cases


@pytest.fixture(scope='module')
def table(tmp_path_factory):
  """Rows of a dry run, and the file that it wrote."""
  folder = tmp_path_factory.mktemp('bench')
  flags = [f'--rows={folder}/rows', f'--output={folder}/table.md']
  assert mla_decode.main(['--dry_run', '--json', *flags]) == 0
  rows = [json.loads(x) for x in (folder / 'rows').read_text().splitlines()]
  return rows, (folder / 'table.md').read_text()


@pytest.mark.nightly
def test_every_cache_is_timed_and_right(table):
  rows, text = table
  assert [row['case'] for row in rows[:2]] == ['copy', 'bf16 dot']
  ours = [(row['case'], row['cache']) for row in rows[2:]]
  assert ours == [
    (name, kind)
    for name in ('ragged', 'speculative')
    for kind in mla_decode.CACHES
  ]
  for row in rows[2:]:
    assert 0 < row['difference'] < mla_decode.DIFFERENCE
    assert row['of_copy'] == pytest.approx(
      row['gigabyte_per_second'] / rows[0]['gigabyte_per_second']
    )
    assert row['of_bf16_dot'] == pytest.approx(
      row['tflop_per_second'] / rows[1]['tflop_per_second']
    )
    assert f'| {row["case"]} | ' in text


def test_counts_by_hand():
  """Two queries of a row of three tokens see 2 and 3 of them."""
  case = cases.Case((3, 1), 5, queries=2)
  args = mla_decode.draw(case, 'fp8', jax.random.key(0))
  flop, moved = mla_decode.count(case, args)
  assert flop == 2 * 5 * (2 + 3 + 0 + 1) * (576 + 512)
  assert moved == 4 * 656 + 20 * (2 * 576 + 2 * 512 + 4)


def test_a_wrong_output_fails_the_run(monkeypatch, tmp_path):
  decode = mla_decode.api.decode

  def wrong(*args, **kwargs):
    o_BTNC, lse_BNT = decode(*args, **kwargs)
    return o_BTNC.at[-1].set(0), lse_BNT

  monkeypatch.setattr(mla_decode.api, 'decode', wrong)
  flags = ['--only=ragged bf16', f'--output={tmp_path}/table.md']
  assert mla_decode.main(['--dry_run', *flags]) == 1


def test_what_a_flag_leaves_out(capsys):
  with pytest.raises(SystemExit) as error:
    mla_decode.main(['--dry_run', '--only=nothing'])
  assert error.value.code == 2
  assert 'leaves nothing' in capsys.readouterr().err
