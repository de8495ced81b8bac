"""The reader of scheduled programs, and the branch that is compiled."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import overlap
from dsv3_jax.distributed import sharding

TEXT = """HloModule m, is_scheduled=true

%other (p: f32[8]) -> f32[8] {
  %all-to-all-start.9 = (f32[8]) all-to-all-start(%p), channel_id=1
  %gemm.0 = f32[8] custom-call(%p), custom_call_target="__cublas$gemm"
}

ENTRY %main (a: f32[8], b: f32[8]) -> f32[8] {
  %ragged-all-to-all-start.1 = ((f32[8], f32[8]), f32[8]) ragged-all-to-all-start(%a, %b)
  %gemm_fusion_dot.1 = f32[8] fusion(%b), kind=kCustom, calls=%gemm
  %while.2 = (s32[], f32[8]) while(%tuple), condition=%c, body=%d
  %ragged-all-to-all-done.1 = f32[8] ragged-all-to-all-done(%ragged-all-to-all-start.1)
  %all-to-all-start = (f32[8], f32[8]) all-to-all-start(%gemm_fusion_dot.1)
  %loop_add_fusion = f32[8] fusion(%b), kind=kLoop, calls=%add
  %all-to-all-done = f32[8] all-to-all-done(%all-to-all-start)
  %plain = f32[8] all-to-all(%loop_add_fusion), dimensions={0}
  ROOT %sum = f32[8] add(%plain, %all-to-all-done)
}
"""  # noqa: E501


def test_products_between_start_and_done_are_counted():
  assert overlap.count(TEXT) == (2, 1, 2, 1)
  without = TEXT.replace('gemm', 'sum').replace('while', 'add')
  assert overlap.count(without) == (2, 0, 0, 1)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None,
  reason='no jax[cuda13], whose compiler needs no GPU',
)
@pytest.mark.usefixtures('optimized')
def test_most_all_to_alls_of_a_fused_pair_hide_behind_products():
  pair = overlap.measure('h100', 'latency hiding', 'F&B')
  assert pair['hidden'] * 2 >= pair['started'] + pair['blocking']


def test_every_branch_has_a_row(monkeypatch, tmp_path):
  def measure(target, scheduler, halves):
    row = {'target': target, 'scheduler': scheduler, 'branch': halves}
    return row | overlap.count(TEXT)._asdict()

  monkeypatch.setattr(overlap, 'measure', measure)
  args = ['--target=h100', f'--output={tmp_path / "table.md"}']
  assert overlap.main([*args, f'--rows={tmp_path / "rows"}']) == 0
  text = (tmp_path / 'rows').read_text().splitlines()
  rows = {(r['scheduler'], r['branch']) for r in map(json.loads, text)}
  names = ('default', 'latency hiding')
  assert rows == {(name, half) for name in names for half in ('F&B', 'F', 'B')}


@pytest.mark.nightly
def test_the_branch_is_the_pipeline_s(monkeypatch):
  """Traced on fake devices, with the sizes of a test."""
  small = {'model.d_model': 32, 'model.moe.d_ff': 16, 'data.seq_len': 64}
  small |= {'model.mla.num_heads': 2, 'eval.stride': 32, 'parallel.expert': 4}
  small |= {'model.vocab_size': 64, 'eval.batch_size': 8}
  monkeypatch.setattr(overlap, 'SETTINGS', overlap.SETTINGS | small)
  cfg = overlap.make_config()
  shape = [getattr(cfg.parallel, axis) for axis in sharding.AXES]
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()).reshape(shape), sharding.AXES
  )
  sent = {
    halves: overlap.lower(cfg, mesh, halves).as_text().count('all_to_all')
    for halves in ('F&B', 'F', 'B')
  }
  assert sent['F&B'] == sent['F'] + sent['B'] > sent['F'] > sent['B'] > 0
