"""A checkpoint knows no mesh: it goes on under any other layout."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import layouts
from dsv3_jax import errors
from dsv3_jax.distributed import sharding
from dsv3_jax.parallel import state_layout
from dsv3_jax.training import loop, metrics
from dsv3_jax.training import step as steps
from tests import tiny_run

MESHES = (
  {'pipe': 4, 'data': 2, 'schedule': 'dualpipe'},
  {'data': 2, 'node': 2, 'expert': 2},
  {'pipe': 2, 'expert': 4, 'schedule': 'dualpipev'},
  {'pipe': 2, 'schedule': 'interleaved'},
)


@pytest.mark.nightly
@pytest.mark.parametrize('scan', [True, False])
def test_states_go_from_layout_to_layout_to_the_bit(scan):
  changes = {'model.scan_layers': scan, 'model.num_layers': 4}
  want = state = layouts.start(layouts.make_config({}, changes))
  for axes in MESHES:
    cfg = layouts.make_config(axes, changes)
    trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
    placed = jax.device_put(jax.device_get(state), trainer.model_shardings())
    spread = trainer.from_model(placed)
    stack = 'moe' if 'moe' in spread['params'] else 'moe_layers'
    w_up = spread['params'][stack]
    size = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(w_up))
    whole = sum(x.size for x in jax.tree.leaves(w_up))
    assert size * trainer.mesh.size <= 1.3 * whole  # masters exist once
    state = trainer.to_model(spread)
  assert steps.same_bits(jax.device_get(state), jax.device_get(want))


@pytest.mark.nightly
def test_a_run_goes_on_on_another_mesh(tmp_path):
  """Pipeline with experts over devices, then one device."""
  cfg = tiny_run.make(tmp_path, optim__eps=1e-3)
  loop.run(tiny_run.until(cfg, 12), tmp_path / 'one')
  path = tmp_path / 'many'
  loop.run(tiny_run.until(cfg, 8, pipe=2, expert=2, schedule='gpipe'), path)
  # The same steps in other micro-batches: another mesh may need them.
  last = tiny_run.until(cfg, 12)
  halves = dataclasses.replace(last.train, microbatch_size=1)
  loop.run(dataclasses.replace(last, train=halves), path)
  lines = [
    [x for x in metrics.read_metrics(folder) if x['kind'] == 'train']
    for folder in (tmp_path / 'one', path)
  ]
  for want, got in zip(*lines, strict=True):
    assert got['step'] == want['step'] and got['tokens'] == want['tokens']
    for name in ('loss', 'mtp_loss', 'balance', 'grad_norm', 'max_violation'):
      np.testing.assert_allclose(got[name], want[name], rtol=1e-4, err_msg=name)


def test_what_no_pipeline_can_do_is_one_line():
  changes = {'train.microbatch_size': 16, 'eval.batch_size': 16}
  axes = {'pipe': 4, 'schedule': 'dualpipe'}
  cfg = layouts.make_config(axes, changes)
  message = (
    'parallel.pipe=4 with parallel.schedule=.dualpipe. and 4 micro-batches '
    'of train.microbatch_size=16: .*microbatches=4 must be even and >= 2'
  )
  with pytest.raises(errors.InputError, match=message) as caught:
    state_layout.make(cfg, dataclasses.asdict(cfg.parallel))
  assert '\n' not in str(caught.value)
  with pytest.raises(
    errors.InputError, match=r'most parallel\.pipe=4'
  ) as caught:
    layouts.make_config({'pipe': 8, 'schedule': 'interleaved'}, {})
  assert '16 stages, but model.num_layers=8' in str(caught.value)
