"""The measurement on a Hopper GPU, as far as it goes without one."""

import argparse
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hopper
from benchmarks.common import attention_checks, hopper_parts
from pallas_kernels.fp8_matmul import cases, pallas_gpu, reference


@pytest.mark.nightly
def test_dry_run_does_all_parts(tmp_path, capsys):
  flags = ['--dry_run', f'--output={tmp_path}']
  assert hopper.main([*flags, '--seconds=1400']) == 0
  text = (tmp_path / 'hopper.md').read_text()
  assert text.strip() in capsys.readouterr().out
  for part in hopper.PARTS:
    assert f'## {part}: done' in text
    rows = (tmp_path / f'{part}.jsonl').read_text().splitlines()
    assert [json.loads(row) for row in rows]
    assert not any(json.loads(row).get('wrong') for row in rows)
  for kind in ('block', 'row', 'grouped', 'grouped_k'):
    assert text.count(f'| {kind} | tiny |') >= 3  # checked, and swept
  for kind in (*hopper_parts.QUANTISERS, 'attention', 'decode'):
    assert f'| {kind} | tiny |' in text


def test_a_dry_run_starts_the_process_of_a_part(tmp_path, capsys):
  flags = ['--dry_run', f'--output={tmp_path}', '--parts=routing']
  assert hopper.main([*flags, '--seconds=40000']) == 0
  text = (tmp_path / 'hopper.md').read_text()
  assert text.strip() in capsys.readouterr().out
  rows = (tmp_path / 'routing.jsonl').read_text().splitlines()
  assert f'## routing: done, {len(rows)} rows, 0 wrong' in text
  assert '| gate |' in text and len(rows) == 5


@pytest.mark.parametrize('part', ['checks', 'sweep'])
def test_checks_and_sweep_run_in_the_process_of_their_part(
  part, monkeypatch, tmp_path
):
  case = cases.Case(64, 64, 256)
  kernels = [hopper_parts.Kernel('row', 'tiny', case, 'reference')]
  monkeypatch.setattr(hopper_parts, 'kernels', lambda *_, **__: kernels)
  monkeypatch.setattr(attention_checks, 'kernels', lambda *_: [])
  flags = [f'--output={tmp_path}', f'--part={part}', '--dry_run']
  assert hopper.main(flags) == 0
  lines = (tmp_path / f'{part}.jsonl').read_text().splitlines()
  rows = list(map(json.loads, lines))
  assert {row['kernel'] for row in rows} == {'row'}
  assert not any(row.get('wrong') for row in rows)


def test_a_part_that_hangs_is_stopped_and_keeps_its_rows(tmp_path):
  args = argparse.Namespace(output=tmp_path, dry_run=True)
  (tmp_path / 'layer.jsonl').write_text('{"what": "row"}\n{"wha')
  message = hopper.run_process('layer', args, seconds=0.0)  # which needs many
  assert message.startswith('cut off')
  text = hopper.render(tmp_path, {'layer': message}, 1.0)
  assert '## layer: cut off' in text and '| row |' in text


def test_parts_end_within_the_time():
  ends = list(hopper.PARTS.values())
  assert ends == sorted(ends) and ends[-1] < hopper.SECONDS < 480


def test_unknown_part_is_bad_input(tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    hopper.main([f'--output={tmp_path}', '--parts=checks,dance'])
  assert ended.value.code == 2
  assert "--parts='dance' must be of: checks" in capsys.readouterr().err


def one_kernel(monkeypatch, change):
  """The product as on a GPU, where `change(out)` is what comes out."""

  def matmul(a, b, out_dtype, **_):
    return change(reference.matmul(a, b, out_dtype))

  monkeypatch.setattr(pallas_gpu, 'matmul', matmul)
  case = cases.Case(64, 64, 256)
  return hopper_parts.Kernel('block', 'tiny', case, 'gpu')


@pytest.mark.parametrize(
  ('change', 'wrong'),
  [
    (lambda out: out, False),
    (lambda out: out * 1.02, True),
    (lambda out: out.at[-1, -1].set(jnp.nan), True),
  ],
)
def test_checks_find_what_is_wrong(monkeypatch, change, wrong):
  kernel = one_kernel(monkeypatch, change)
  row = hopper_parts.check_kernel(kernel, jax.random.key(0), repeats=1)
  assert row['wrong'] is wrong


def test_a_quantiser_must_give_the_bits_of_the_reference(monkeypatch):
  kernel = hopper_parts.Kernel('both', 'x', cases.Case(65, 64, 200), 'gpu')
  for floor, wrong in ((0.0, False), (1e3, True)):
    run = lambda x, interpret, floor=floor: reference.quantize_both(
      x, floor=floor
    )
    monkeypatch.setattr(hopper_parts.quantize_gpu, 'quantize_both', run)
    row = hopper_parts.check_kernel(kernel, jax.random.key(0), repeats=1)
    assert row['bound'] == 0 and row['wrong'] is wrong


@pytest.mark.parametrize('at', [None, 0, 1, 2, 4])
def test_checks_find_a_wrong_result_of_attention(monkeypatch, at):
  """Output, log-sum-exp, and gradients of queries and the rotary key."""
  reference = attention_checks.attention_reference

  def like(run, first):
    def call(*args, interpret):
      outs = list(run(*args))
      if at is not None and 0 <= at - first < len(outs):
        outs[at - first] = outs[at - first].at[..., 0].mul(1.02)
      return tuple(outs)

    return call

  forward, backward = (reference.forward, 0), (reference.backward, 2)
  for module, name, run in (
    (attention_checks.attention_gpu, 'forward', forward),
    (attention_checks.backward_gpu, 'backward', backward),
  ):
    monkeypatch.setattr(module, name, like(*run))
  case = attention_checks.attention_cases.SMALL['tiny']
  kernel = attention_checks.Kernel('attention', 'tiny', case, 'gpu')
  row = hopper_parts.check_kernel(kernel, jax.random.key(0), repeats=1)
  assert row['wrong'] is (at is not None), row


def test_checks_find_a_wrong_decoding(monkeypatch):
  reference = attention_checks.decode_reference.decode
  case = attention_checks.decode_cases.SMALL['tiny']
  kernel = attention_checks.Kernel('decode', 'tiny', case, 'gpu')
  for factor, wrong in ((1.0, False), (1.02, True)):

    def decode(*args, interpret, factor=factor, **options):
      o_BTNC, lse_BNT = reference(*args, **options)
      return o_BTNC.at[0].mul(factor), lse_BNT

    monkeypatch.setattr(attention_checks.decode_gpu, 'decode', decode)
    row = hopper_parts.check_kernel(kernel, jax.random.key(0), repeats=1)
    assert row['wrong'] is wrong


def test_checks_find_bits_that_change(monkeypatch):
  calls = itertools.count()

  def noise(out):
    tiny = jax.pure_callback(
      lambda: jnp.float32(next(calls) % 2) * 0.01,
      jax.ShapeDtypeStruct((), jnp.float32),
    )
    return (out.astype(jnp.float32) + tiny).astype(out.dtype)

  kernel = one_kernel(monkeypatch, noise)
  row = hopper_parts.check_kernel(kernel, jax.random.key(0), repeats=2)
  assert row['runs_with_other_bits'] > 0 and row['wrong']


def test_a_kernel_that_raises_is_a_row(monkeypatch):
  def fail(out):
    raise RuntimeError('no such instruction')

  kernel = one_kernel(monkeypatch, fail)
  monkeypatch.setattr(hopper_parts, 'kernels', lambda *_, **__: [kernel])
  monkeypatch.setattr(attention_checks, 'kernels', lambda *_: [])
  (row,) = hopper_parts.checks('gpu', dry_run=True, seconds=60.0)
  assert row['wrong'] and 'no such instruction' in row['note']
  rows = list(hopper_parts.sweep('gpu', dry_run=True, seconds=60.0))
  assert rows and all('refused' in row['note'] for row in rows)
  late = list(hopper_parts.checks('gpu', dry_run=True, seconds=-1.0))
  assert [row['note'] for row in late] == ['no time']


def test_sweep_finds_the_fastest_with_the_same_bits():
  case = cases.Case(64, 64, 256)
  kernel = hopper_parts.Kernel('row', 'tiny', case, 'reference')
  rows = list(
    hopper_parts.sweep_kernel(kernel, jax.random.key(0), dry_run=True)
  )
  assert len(rows) == 6 and all(row['same_bits'] for row in rows)
  assert sum(row['best'] for row in rows) == 2  # of columns, then of strips
  best = next(row for row in rows if row['best'])
  assert rows[-2]['columns'] == rows[-1]['columns'] == best['columns']
  assert rows[-1]['strip'] != rows[-2]['strip']


@pytest.mark.parametrize('kind', ['block', 'row', 'grouped', 'grouped_k'])
def test_block_sizes_fit_into_shared_memory(kind):
  kernel = hopper_parts.Kernel(kind, 'x', None, 'gpu')
  sizes = hopper_parts.block_sizes(kernel)
  assert len(sizes) == len(set(sizes)) >= 5
  for blocks in sizes:
    stage = 128 * (128 + blocks.columns) + 4 * 128
    stage += 4 * blocks.columns if kind in ('row', 'grouped_k') else 0
    out = 2 * 2 * 64 * 64 * jnp.dtype(kernel.out_dtype).itemsize
    assert blocks.stages * stage + out <= 227 * 1024 - 1024
    assert blocks.columns < 192 or kind in ('block', 'grouped')


def test_layout_gives_each_block_one_expert():
  experts, used = hopper_parts.layout((5, 0, 260))
  assert experts.tolist() == [0, 2, 2, 2, 2]
  assert used.shape == (5 * 128,)
  assert used[:128].sum() == 5 and used[128:512].sum() == 260
  assert not used[512:].any()


def test_aims_stand_beside_what_was_measured():
  row = {
    'op': 'forward',
    'case': 'attention_out 4096x7168x16384',
    'implementation': 'pallas',
    'tflop_per_second': 1200.0,
    'of_bf16_dot': 1.6,
  }
  rival = row | {'implementation': 'torch _scaled_mm, block scales'}
  rival['pallas_speed_over_this'] = 0.9
  share = {'what': 'all', 'share_percent': 7.0}
  aims = hopper.aims({'benchmark': [row, rival], 'layer': [share]})
  assert [line['measured'] for line in aims[:3]] == [1200.0, 1.6, 0.9]
  assert [line['measured'] for line in aims[3:-1]] == [None] * 4
  assert aims[-1]['measured'] == 7.0
  assert hopper.aims({})[-1]['measured'] is None
