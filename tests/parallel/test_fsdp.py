"""FSDP: nothing is whole but while it is multiplied."""

import re

import jax
import pytest

from benchmarks import layouts
from dsv3_jax.distributed import sharding
from dsv3_jax.parallel import sharding_report
from dsv3_jax.training import step as steps

AXES = ('data', 'node', 'expert')


def make(**changes):
  axes = {'data': 2, 'node': 2, 'expert': 2}
  named = {name.replace('__', '.'): x for name, x in changes.items()}
  return layouts.make_config(
    axes, {'model.num_layers': 3, 'model.remat': 'report'} | named
  )


def test_matrices_are_cut_as_far_as_their_masters():
  rows = {
    row['array']: row for row in sharding_report.rows(make(parallel__fsdp=AXES))
  }
  plain = {row['array']: row for row in sharding_report.rows(make())}
  for name, row in rows.items():
    if name.endswith('norm') or name.startswith('router'):
      continue
    assert row['master_per_device'] <= plain[name]['master_per_device'], name
    if row['master_per_device'] < row['elements']:
      # An axis that no dim takes beside the others is left to the master.
      assert row['compute_per_device'] <= 2 * row['master_per_device'], name
  dense = 'dense_layers.layers.ffn.w_up'
  assert plain[dense]['compute_per_device'] == plain[dense]['elements']
  assert rows[dense]['compute_per_device'] * 8 == rows[dense]['elements']


@pytest.mark.parametrize(
  'remat', ['report', pytest.param('full', marks=pytest.mark.nightly)]
)
def test_no_gathered_weight_waits_for_the_backward_pass(remat):
  """What leaves the forward scan of the layers has no whole matrix in it."""
  cfg = make(parallel__fsdp=AXES, model__remat=remat)
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  state = jax.eval_shape(trainer.init, jax.random.key(0))
  batch = jax.eval_shape(lambda: layouts.batch(cfg, 0))
  hyper = {name: jax.ShapeDtypeStruct((), 'float32') for name in layouts.HYPER}
  num_microbatches = jax.ShapeDtypeStruct((), 'int32')
  text = str(
    jax.make_jaxpr(trainer.step)(state, batch, num_microbatches, hyper)
  )
  whole = 'f32[16,24]'  # W_up of the dense layer, on one device [16, 3]
  assert re.search(rf'{re.escape(whole)} = all_gather', text)
  scans = re.findall(r'\n *([^\n]*) = scan\[', text)
  assert scans
  for outputs in scans:
    assert 'f32[1,16,24]' not in outputs
