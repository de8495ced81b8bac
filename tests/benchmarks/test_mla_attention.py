"""The benchmark of training attention: what it counts, checks and prints."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import mla_attention
from benchmarks.common import torch_rivals
from pallas_kernels import numerics
from pallas_kernels.mla_attention import cases


@pytest.fixture(scope='module')
def table(tmp_path_factory):
  """Rows of a dry run, and the file that it wrote."""
  folder = tmp_path_factory.mktemp('bench')
  flags = [f'--rows={folder}/rows', f'--output={folder}/table.md']
  assert mla_attention.main(['--dry_run', '--json', *flags]) == 0
  rows = [json.loads(x) for x in (folder / 'rows').read_text().splitlines()]
  return rows, (folder / 'table.md').read_text()


@pytest.mark.nightly
def test_both_passes_are_timed_and_right(table):
  rows, text = table
  assert [row['case'] for row in rows[:2]] == ['copy', 'bf16 dot']
  timed = [row for row in rows[2:] if 'pass' in row]
  assert [
    (row['case'], row['pass'], row['implementation']) for row in timed
  ] == [
    (name, which, implementation)
    for name in ('ragged', 'packed')
    for which in mla_attention.PASSES
    for implementation in ('reference', 'xla')
  ]
  for row in timed:
    assert 0 < row['difference'] < mla_attention.DIFFERENCE
    assert row['of_bf16_dot'] == pytest.approx(
      row['tflop_per_second'] / rows[1]['tflop_per_second']
    )
    assert f'| {row["case"]} | ' in text
  (absent,) = (row for row in rows if 'torch' in row.get('implementation', ''))
  assert 'absent' in absent['note']


def test_counts_by_hand():
  """Samples of 2 and 1 tokens, and one of padding: 3 + 1 + 1 pairs."""
  case = cases.Case(1, 4, 5, 8, 4, 6, samples=(2, 1))
  flop = mla_attention.count(case)
  assert flop['forward'] == 2 * 5 * 5 * (12 + 6)
  assert flop['backward'] == 2 * 5 * 5 * (3 * 12 + 2 * 6)
  published = mla_attention.count(cases.V3['pretrain'])
  assert published['forward'] == 128 * 4096 * 4097 * 320


def test_rivals_get_the_same_problem():
  """A rival by its arguments is the reference by ours, and so its gradient."""
  case = cases.Case(1, 20, 2, 16, 8, 12)
  *operands, _, do = mla_attention.draw(case, jax.random.key(0))

  def rival(q, k, v):
    return jax.nn.dot_product_attention(
      q, k, jnp.pad(v, ((0, 0),) * 3 + ((0, 12),)), is_causal=True
    )[..., :12]

  *_, outs = mla_attention.compile_passes(
    mla_attention.repeat_rotary_key(rival), operands, do
  )
  scale = mla_attention.default_scale(case)
  exact = mla_attention.exact_results(operands, None, do, scale)
  for got, want in zip(outs, exact, strict=True):
    assert numerics.difference(got, want) < 1e-4


def test_a_wrong_gradient_fails_the_run(monkeypatch, tmp_path):
  attention = mla_attention.api.attention

  def wrong(q, k_nope, k_rope, v, *rest, **options):
    k_rope = jax.lax.stop_gradient(k_rope)
    return attention(q, k_nope, k_rope, v, *rest, **options)

  monkeypatch.setattr(mla_attention.api, 'attention', wrong)
  flags = ['--only=ragged', f'--output={tmp_path}/table.md']
  assert mla_attention.main(['--dry_run', *flags]) == 1


@pytest.mark.nightly
def test_torch_says_why_it_is_absent():
  rivals = torch_rivals.Rivals()
  assert rivals.attend((1, 4, 1), 24, 16) == []
  assert 'torch' in rivals.absent.lower()
  rivals.close()


def test_what_a_flag_leaves_out(capsys):
  with pytest.raises(SystemExit) as error:
    mla_attention.main(['--dry_run', '--only=nothing'])
  assert error.value.code == 2
  assert 'leaves nothing' in capsys.readouterr().err
