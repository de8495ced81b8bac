"""Rows cut over `context` in evaluation, and where masters are then."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layouts
from dsv3_jax.distributed import sharding
from dsv3_jax.parallel import sharding_report
from dsv3_jax.training import evaluate
from dsv3_jax.training import step as steps


@pytest.mark.slow
def test_evaluation_is_that_of_one_device():
  changes = {'model.num_layers': 2, 'data.isolate_samples': True}
  changes |= {'model.mtp.depth': 0}
  cfg = layouts.make_config({'context': 2, 'expert': 2}, changes)
  state = jax.tree.map(jnp.asarray, layouts.start(cfg))
  rows = jax.tree.map(lambda x: np.asarray(x[0]), layouts.batch(cfg, 3))
  windows = rows._asdict()
  trainer = steps.Trainer(cfg, sharding.make_mesh(cfg.parallel))
  want = evaluate.score(
    layouts.alone(cfg), state['params'], state['router'], windows
  )
  places = trainer.model_shardings()
  args = [jax.device_put(state[k], places[k]) for k in ('params', 'router')]
  got = evaluate.score(cfg, *args, windows, mesh=trainer.model_mesh)
  assert got[1] == want[1] > 0
  assert got[0] == pytest.approx(want[0], rel=2e-6)


def test_masters_are_cut_over_context():
  """Nothing of the compute form is: `context` holds tokens, not weights."""
  cfg = layouts.make_config({'context': 2, 'expert': 2}, {})
  metrics = json.loads(sharding_report.render(cfg, as_json=True))
  assert not any('context' in row['compute'] for row in metrics['arrays'])
  cut = [row for row in metrics['arrays'] if 'context' in row['master']]
  elements = sum(row['elements'] for row in cut)
  assert elements > 0.9 * metrics['total']['elements']
