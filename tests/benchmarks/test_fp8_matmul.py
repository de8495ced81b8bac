"""The benchmark of the FP8 products: what it counts, checks and prints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fp8_matmul
from benchmarks.common import clock, fp8_work, torch_rivals
from pallas_kernels import numerics
from pallas_kernels.fp8_matmul import cases
from pallas_kernels.grouped_matmul import cases as grouped_cases

_NAMES = ('reference',)


@pytest.fixture(scope='module')
def table(tmp_path_factory):
  """Rows of a dry run, and the file that it wrote."""
  folder = tmp_path_factory.mktemp('bench')
  flags = [f'--rows={folder}/rows', f'--output={folder}/table.md']
  assert fp8_matmul.main(['--dry_run', '--json', *flags]) == 0
  rows = [json.loads(x) for x in (folder / 'rows').read_text().splitlines()]
  return rows, (folder / 'table.md').read_text()


@pytest.mark.nightly
def test_every_kind_of_work_is_timed_and_right(table):
  rows, text = table
  ours = [row for row in rows if row.get('implementation') == 'reference']
  assert [row['op'] for row in ours] == [
    'forward',
    'grouped forward',
    'grouped weight gradient',
    'weight gradient',
    'quantise rows',
    'quantise both',
    'quantise transposed',
  ]
  for row in ours:
    assert 0 < row['difference'] < numerics.FP8_DIFFERENCE
    assert row['milliseconds_median'] > 0 and row['gigabyte_per_second'] > 0
    assert row['of_copy'] == pytest.approx(
      row['gigabyte_per_second'] / rows[0]['gigabyte_per_second']
    )
    assert f'| {row["op"]} | {row["case"]} |' in text


@pytest.mark.nightly
def test_shares_are_of_the_ceilings_beside(table):
  rows = {
    row['implementation']: row
    for row in table[0]
    if row['op'] == 'forward' and 'milliseconds_median' in row
  }
  ours = rows['reference']
  for name, key in (
    (fp8_work.BF16_DOT, 'of_bf16_dot'),
    (fp8_work.FP8_DOT, 'of_fp8_dot'),
  ):
    other = rows[name]['milliseconds_median']
    assert ours[key] == pytest.approx(other / ours['milliseconds_median'])
  flop = 2 * 200 * 136 * 272
  assert ours['tflop_per_second'] == pytest.approx(
    flop / ours['milliseconds_median'] / 1e9
  )


@pytest.mark.nightly
def test_an_absent_rival_says_why(table):
  (row,) = [r for r in table[0] if 'torch' in r.get('implementation', '')]
  assert 'NVIDIA' in row['note'] and 'milliseconds_median' not in row


@pytest.mark.parametrize(
  ('factor', 'wrong'), [(1.0, None), (1.1, True), (jnp.nan, True)]
)
def test_a_wrong_kernel_is_called_wrong(factor, wrong):
  work = fp8_work.product('forward', 'x', cases.Case(64, 64, 256), _NAMES)
  right = work.variants['reference']
  bad = dataclasses.replace(
    right, run=lambda *x: right.run(*x) * factor, implementation='pallas'
  )
  variants = work.variants | {'pallas': bad}
  work = dataclasses.replace(work, variants=variants)
  rows = list(fp8_matmul.one_work(work, clock.DRY, 2, 1.0, jax.random.key(0)))
  (row,) = [row for row in rows if row['implementation'] == 'pallas']
  assert row.get('wrong') is wrong


def test_work_and_bytes_are_counted():
  work = fp8_work.product('forward', 'x', cases.Case(64, 130, 256), _NAMES)
  assert work.flop == 2 * 64 * 130 * 256
  values = 64 * 256 + 130 * 256
  assert work.bytes == values + 4 * (64 * 2 + 2 * 2) + 2 * 64 * 130
  grad = fp8_work.product('weight gradient', 'x', (64, 130, 256), _NAMES)
  assert grad.case == 'x 256x130x64' and grad.flop == work.flop
  experts = grouped_cases.Case((256, 256, 256), 72, 200)
  flop = 2 * 768 * 72 * 200
  assert fp8_work.grouped('x', experts, _NAMES).flop == flop
  assert fp8_work.grouped_k('x', experts, _NAMES).flop == flop


def test_inputs_are_random_and_differ_between_sets():
  work = fp8_work.product('forward', 'x', cases.Case(64, 64, 256), _NAMES)
  a, b = (np.float32(x) for x in work.draw(jax.random.key(0)))
  assert abs(a.std() - 1) < 0.05 and abs(b.std() - 1) < 0.05
  assert np.mean(a == 0) < 0.01
  other, _ = work.draw(jax.random.key(1))
  assert np.mean(np.float32(other) == a) < 0.1


def test_nothing_to_do_is_bad_input(capsys):
  with pytest.raises(SystemExit) as ended:
    fp8_matmul.main(['--dry_run', '--only=nothing'])
  assert ended.value.code == 2
  assert "--only='nothing' leaves nothing" in capsys.readouterr().err


@pytest.mark.parametrize('block', [True, False])
def test_pytorch_gets_scales_in_the_layout_of_cublaslt(monkeypatch, block):
  """1 x 128: rows contiguous; 128 x 128: K contiguous, padded to four."""
  torch = pytest.importorskip('torch')
  m, n, k = 192, 256, 384

  def scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
    kinds = torch.nn.functional.ScalingType
    assert kind_a == kinds.BlockWise1x128
    assert kind_b == (kinds.BlockWise128x128 if block else kind_a)
    assert a.stride() == (k, 1) and b.stride() == (1, k)
    assert scale_a.shape == (m, 3) and scale_a.stride() == (1, m)
    if block:
      assert scale_b.shape == (4, 2) and scale_b.stride() == (1, 4)
      scale_b = scale_b[:3].T.repeat_interleave(128, 0)
    else:
      assert scale_b.shape == (n, 3) and scale_b.stride() == (1, n)
    wide = lambda x, scale: x.float() * scale.repeat_interleave(128, 1)
    return (wide(a, scale_a) @ wide(b.T, scale_b).T).to(output_dtype)

  monkeypatch.setattr(torch.nn.functional, 'scaled_mm', scaled_mm)
  generator = torch.Generator().manual_seed(0)
  a, b = (torch.randn(rows, k, generator=generator) for rows in (m, n))
  run = torch_rivals.block_scaled(torch, a, b, block, torch.float32)
  assert numerics.difference(run(), a @ b.T) < numerics.FP8_DIFFERENCE


@pytest.mark.nightly
def test_pytorch_without_a_gpu_is_absent():
  pytest.importorskip('torch')
  rivals = torch_rivals.Rivals()
  assert 'sees no CUDA device' in rivals.absent
  assert rivals.time(64, 64, 128, block=True) == []
  rivals.close()
