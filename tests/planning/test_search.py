"""Layouts: legal, fitting, ranked, and found in seconds."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax import config
from dsv3_jax.planning import (
  chips,
  device_layout,
  device_memory,
  search,
  step_time,
)
from experiments import v3_671b
from tests import settings

H800 = chips.CHIPS['h800']
_ROOT = pathlib.Path(__file__).resolve().parents[2]


def tiny(capacity=1e9):
  """A small model, its layout on 8 chips, and a chip of that capacity."""
  cfg = settings.small(
    model__num_layers=4,
    model__vocab_size=24,
    train__batch_size=32,
    train__batch_size_start=32,
    train__microbatch_size=8,
    eval__batch_size=8,
    parallel__data=8,
  )
  chip = dataclasses.replace(H800, hbm_bytes=capacity)
  return cfg, device_layout.from_config(cfg, 8), chip


@pytest.fixture(scope='module')
def pod():
  cfg = config.from_config_dict(v3_671b.get_config('pod'))
  return cfg, device_layout.from_config(cfg, 2048)


def test_layouts_fit_and_are_ranked():
  cfg, layout, chip = tiny()
  sizes = [
    device_memory.device_memory(cfg, other).total
    for other in search.layouts(cfg, chip, 8, layout)
  ]
  capacity = sorted(sizes)[len(sizes) // 2] / (1 - device_memory.RESERVE)
  chip = dataclasses.replace(chip, hbm_bytes=capacity)
  result = search.search(cfg, chip, 8, layout)
  assert len(result) == 10
  times = [candidate.seconds for candidate in result]
  assert times == sorted(times)
  for candidate in result:
    layout = candidate.layout
    assert layout.devices == 8
    assert device_memory.device_memory(cfg, layout) == candidate.memory
    assert candidate.memory.fits(capacity)
    assert candidate.seconds == pytest.approx(
      step_time.step_time(cfg, chip, layout).seconds
    )


@pytest.mark.parametrize('kind', ['1f1b', 'zb1p', 'dualpipe', 'dualpipev'])
def test_the_closed_form_is_near_the_simulation(pod, kind):
  cfg, layout = pod
  changes = {'schedule': kind}
  if kind == 'dualpipev':
    changes |= {'pipe': 8, 'data': 4, 'microbatch': 256}
  other = dataclasses.replace(layout, **changes)
  quick = search.quick_seconds(cfg, H800, other)
  exact = step_time.step_time(cfg, H800, other).seconds
  assert quick == pytest.approx(exact, rel=0.08)


def test_every_layout_is_one_that_trains():
  """The rules of `config_rules` accept what the search tries."""
  cfg, like, chip = tiny()
  count = 0
  for layout in search.layouts(cfg, chip, 8, like):
    count += 1
    if count % 7:
      continue
    axes = {
      f'parallel__{axis}': getattr(layout, axis) for axis in device_layout.AXES
    }
    accepted = settings.small(
      model__num_layers=4,
      model__vocab_size=24,
      model__remat=layout.remat,
      train__batch_size=32,
      train__batch_size_start=32,
      train__microbatch_size=layout.microbatch,
      eval__batch_size=8,
      parallel__schedule=layout.schedule,
      parallel__fsdp=layout.fsdp,
      **axes,
    )
    assert math.prod(axes.values()) == 8
    assert device_layout.from_config(accepted, 8) == layout
  assert count > 100


def test_the_nearest_changes_least():
  cfg, layout, chip = tiny()
  total = device_memory.device_memory(cfg, layout).total
  chip = dataclasses.replace(chip, hbm_bytes=total)  # 5 % are left free
  assert not device_memory.device_memory(cfg, layout).fits(total)
  near = search.nearest(cfg, chip, layout)
  assert near.memory.fits(total)
  changes = len(search.changed(layout, near.layout))
  assert changes >= 1
  for other in search.layouts(cfg, chip, 8, layout):
    if len(search.changed(layout, other)) < changes:
      assert not device_memory.device_memory(cfg, other).fits(total)
  assert 'it fits' in search.binding(near.memory, total)


def test_the_binding_part_is_named(pod):
  cfg, layout = pod
  text = search.binding(device_memory.device_memory(cfg, layout), 80e9)
  assert 'GB too much. Largest: live activations' in text


def test_nothing_fits_no_memory():
  cfg, layout, chip = tiny(capacity=1000.0)
  assert search.search(cfg, chip, 8, layout) == []
  assert search.nearest(cfg, chip, layout) is None


def test_fewest_chips():
  cfg, layout, chip = tiny()
  smallest = lambda count: min(
    device_memory.device_memory(cfg, other).total
    for other in search.layouts(cfg, chip, count, layout)
  )
  room = smallest(4) / (1 - device_memory.RESERVE)
  chip = dataclasses.replace(chip, hbm_bytes=1.0001 * room)
  fewest, fitting = search.fewest_chips(cfg, chip, layout)
  assert fewest == fitting.devices == 4
  assert smallest(2) > smallest(4)


@pytest.mark.nightly
def test_the_671b_is_searched_in_ten_seconds():
  """Without the type checks of this process."""
  code = (
    'import json, time\n'
    'from dsv3_jax import config\n'
    'from dsv3_jax.planning import chips, device_layout, search\n'
    'from experiments import v3_671b\n'
    "cfg = config.from_config_dict(v3_671b.get_config('pod'))\n"
    'like = device_layout.from_config(cfg, 2048)\n'
    "chip = chips.CHIPS['h800']\n"
    'begin = time.process_time()\n'
    'ranked = search.search(cfg, chip, 2048, like)\n'
    'seconds = time.process_time() - begin\n'
    'fewest = search.fewest_chips(cfg, chip, like)[0]\n'
    'print(json.dumps([len(ranked), seconds, fewest]))\n'
  )
  child = subprocess.run(
    [sys.executable, '-c', code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  found_layouts, seconds, fewest = json.loads(child.stdout)
  assert found_layouts == 10 and seconds < 10
  assert 128 <= fewest <= 512


def test_every_part_has_a_remedy(pod):
  cfg, layout = pod
  parts = device_memory.device_memory(cfg, layout).parts
  for name in parts:
    biggest = device_memory.DeviceMemory(
      parts=dict.fromkeys(parts, 1.0) | {name: 2.0},
      host={}, live=[1], phases={},
    )  # fmt: skip
    assert f'Largest: {name}' in search.binding(biggest, 80e9)
