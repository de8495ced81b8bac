"""Layouts train as one device does; a subset that covers every feature.

The whole table is `dsv3 bench layouts`.
"""

import pytest

from benchmarks import layouts

FOUR_LAYERS = {'model.num_layers': 4}
CASES = {
  'flat': layouts.Case('', {'data': 2, 'node': 2, 'expert': 2}),
  'FSDP': layouts.Case(
    '',
    {'data': 2, 'node': 2, 'expert': 2},
    FOUR_LAYERS | layouts.FEATURES['FSDP'],
  ),
  'dualpipe, dense over two stages': layouts.Case(
    '',
    {'pipe': 4, 'data': 2, 'schedule': 'dualpipe'},
    {'model.num_dense_layers': 3},
  ),
  'zb1p': layouts.Case(
    '',
    {'pipe': 2, 'expert': 2, 'data': 2, 'schedule': 'zb1p'},
    FOUR_LAYERS | layouts.FEATURES['batch balance'] | layouts.FEATURES['FSDP'],
  ),
  'dualpipev': layouts.Case(
    '',
    {'pipe': 2, 'context': 2, 'expert': 2, 'schedule': 'dualpipev'},
    FOUR_LAYERS | layouts.FEATURES['V2 balance'],
  ),
  '1f1b, no dense': layouts.Case(
    '',
    {'pipe': 2, 'context': 2, 'schedule': '1f1b'},
    FOUR_LAYERS
    | layouts.FEATURES['isolated']
    | layouts.FEATURES['unrolled']
    | {'model.num_dense_layers': 0},
  ),
  'interleaved': layouts.Case(
    '',
    {'pipe': 2, 'schedule': 'interleaved'},
    FOUR_LAYERS | layouts.FEATURES['no MTP'],
  ),
  'gpipe': layouts.Case(
    '',
    {'pipe': 2, 'context': 2, 'schedule': 'gpipe'},
    FOUR_LAYERS | layouts.FEATURES['MTP 2, pre-norm, valid'],
  ),
  'context': layouts.Case(
    '',
    {'context': 2, 'expert': 2, 'data': 2},
    {
      'model.num_layers': 2,
      'model.remat': 'report',
      'parallel.fsdp': ('data', 'context'),
    },
  ),
  'fp8': layouts.Case(
    '',
    {'pipe': 2, 'expert': 2, 'schedule': 'zb1p'},
    layouts.FEATURES['fp8']
    | {'model.remat': 'full', 'parallel.fsdp': ('expert',)},
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_layout_is_one_device(name):
  cfg = layouts.make_config(*CASES[name][1:])
  row = layouts.compare(cfg, num_steps=5 if cfg.precision == 'f32' else 1)
  assert not layouts.is_wrong(row, cfg.precision), row


def test_a_wrong_gradient_is_seen():
  row = {
    'metrics': 0.0,
    'gradients': 1e-7,
    'weights': 3e-6,
    'biases_equal': True,
  }
  assert layouts.is_wrong(row, 'f32')
  row['weights'] = 1e-6
  assert not layouts.is_wrong(row, 'f32')
  assert layouts.is_wrong(row | {'biases_equal': False}, 'f32')
  assert layouts.is_wrong(row | {'gradients': float('nan')}, 'f32')
  for name in ('gradients_scale', 'weights_scale'):
    row |= {'gradients_scale': 0.01, 'weights_scale': 1e-5}
    assert not layouts.is_wrong(row, 'fp8')
    assert layouts.is_wrong(row | {name: 0.06}, 'fp8')


def test_the_table_covers_meshes_times_schedules():
  names = [case.name for case in layouts.table()]
  assert len(names) == len(set(names)) > 80
  for kind in layouts.KINDS:
    assert f'{kind} pipe4 data2' in names
    assert f'{kind} pipe2 expert2 node2' in names
    assert f'{kind} pipe2 expert2 context2' in names
