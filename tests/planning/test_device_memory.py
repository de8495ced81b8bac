"""Bytes of a device: by hand, against the schedules, and their sums."""

import dataclasses

import jax
import pytest

from dsv3_jax import config, errors, precision
from dsv3_jax.nn import model as nn_model
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.parallel.schedules import simulate
from dsv3_jax.planning import device_layout, device_memory, flops, memory
from experiments import laptop, long_context, quickstart, v3_16b, v3_671b
from experiments.ablations import fp8
from tests import settings

EXPERIMENTS = {
  'quickstart': quickstart.get_config(),
  'laptop': laptop.get_config(),
  'fp8': fp8.get_config(),
  '16b': v3_16b.get_config(),
  '671b': v3_671b.get_config(),
  'pod': v3_671b.get_config('pod'),
  '32k': long_context.get_config('32k'),
  '128k': long_context.get_config('128k'),
}


def pod(buffer_factor=1.5):
  experiment = v3_671b.get_config('pod')
  experiment.model.moe.buffer_factor = buffer_factor
  cfg = config.from_config_dict(experiment)
  return cfg, device_layout.from_config(cfg, 2048)


def tiny(**changes):
  fields = dict.fromkeys(device_layout.AXES, 1)
  fields |= {'schedule': '1f1b', 'microbatch': 1, 'batch': 4}
  fields |= {'remat': 'report', 'vocabulary': 'sharded', 'buffer_factor': 1.5}
  return device_layout.DeviceLayout(**(fields | changes))


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_bytes_are_those_of_the_arrays(name):
  """Masters and FP8 forms of every experiment, by `eval_shape`."""
  cfg = config.from_config_dict(EXPERIMENTS[name])
  policy = precision.POLICIES[cfg.precision]
  params = nn_model.param_shapes(nn_model.build(cfg))
  biases = sum(
    part.size
    for part in (*flops.main_parts(cfg.model), *flops.mtp_parts(cfg.model))
    if part.name.endswith('router_bias')
  )
  values = sum(x.size for x in jax.tree.leaves(params))
  sizes = memory.weight_bytes(cfg.model, policy)
  assert sizes['master'] == 4 * (values + biases)
  if policy.fp8:
    forms = jax.eval_shape(lambda p: nn_model.quantize(policy, p), params)
    size = lambda tree: sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    bf16 = sum(
      2 * part.size
      for part in (*flops.main_parts(cfg.model), *flops.mtp_parts(cfg.model))
      if part.name in ('head', 'mtp.projection')
    )
    assert size(forms) + bf16 == sizes['compute']


@pytest.mark.parametrize('kind', schedules.KINDS)
@pytest.mark.parametrize('ranks', [2, 4])
def test_live_activations_are_those_of_the_simulation(kind, ranks):
  layout = tiny(pipe=ranks, schedule=kind, batch=4 * ranks)
  table = schedules.make_schedule(
    kind, stages=layout.stages, microbatches=layout.microbatches
  )
  live = [layout.live(rank) for rank in range(ranks)]
  assert live == simulate.peak_live(table)
  for rank in range(ranks):
    assert sorted(layout.held(rank)) == sorted(table.held(rank))


@pytest.mark.parametrize('vocabulary', device_layout.VOCABULARIES)
@pytest.mark.parametrize('kind', schedules.KINDS)
def test_stages_add_up_to_the_model(vocabulary, kind):
  cfg = settings.small(model__num_layers=8)
  policy = precision.POLICIES['f32']
  layout = tiny(pipe=2, schedule=kind, vocabulary=vocabulary, batch=8)
  stages = device_memory.stage_bytes(cfg.model, policy, layout)
  parts = (*flops.main_parts(cfg.model), *flops.mtp_parts(cfg.model))
  values = sum(part.size for part in parts)
  masters = sum(stage.master_values for stage in stages)
  assert masters == pytest.approx(values)
  held = sum(
    stages[stage].parameters
    for rank in range(layout.pipe)
    for stage in layout.held(rank)
  )
  vocab = 2 * cfg.model.vocab_size * cfg.model.d_model
  copies = 2 if kind == 'dualpipe' else 1
  if vocabulary == 'sharded':
    assert held == pytest.approx(copies * (values - vocab) + vocab)
  else:
    assert held == pytest.approx(copies * values)


def test_one_device_by_hand():
  cfg = settings.small(model__remat='full', model__mtp__depth=0)
  values = sum(part.size for part in flops.main_parts(cfg.model))
  layout = tiny(remat='full', microbatch=2)
  result = device_memory.device_memory(cfg, layout)
  tokens = 2 * cfg.data.seq_len
  assert result.parts['gradients'] == 4 * values
  assert result.parts['master weights'] == 4 * values
  assert result.parts['moments'] == 2 * 2 * values
  assert result.parts['live activations'] == tokens * 3 * 16 * 4
  assert result.parts['logits'] == 2 * 4 * tokens * 23
  assert result.parts['exchange buffers'] == 0
  assert result.total == sum(result.parts.values())
  assert result.phases['pipeline'] == result.total
  assert result.host['ema'] == 4 * values


def test_fsdp_by_hand():
  """Each of two devices has half of the f32 weights and gradients."""
  cfg = settings.small(model__mtp__depth=0, model__num_dense_layers=3)
  values = sum(part.size for part in flops.main_parts(cfg.model))
  layer = sum(part.size for part in flops.layer_parts(cfg.model, False))
  layout = tiny(data=2, microbatch=2, fsdp=('data',))
  parts = device_memory.device_memory(cfg, layout).parts
  assert parts['compute forms'] == parts['gradients'] == 4 * values / 2
  assert parts['master weights'] == 4 * values / 2
  assert parts['gathered layer'] == 2 * 4 * layer  # and the f32 forms of it


def test_the_report_s_mesh():
  """TR 3.2 fits 80 GB without spare rows, and not with 1.5 times the room."""
  cfg, layout = pod(buffer_factor=1.0)
  even = device_memory.device_memory(cfg, layout)
  cfg, layout = pod()
  roomy = device_memory.device_memory(cfg, layout)
  assert even.fits(80e9) and not roomy.fits(80e9)
  # Rank 1 of 2 stages of 4 MoE layers, 17 live, and by hand per token and
  # layer: 12 rows of FP8 and scales, and both SwiGLU inputs of each.
  rows = 12 * (7168 + 4 * 56 + 2 * (2048 + 4 * 16))
  rest = 2 * 7168 * 2 + (1536 + 576) * 2 + 3 * 8192 + 4 * 128 + 128 * 4
  shared = 2 * (2048 + 4 * 16)
  assert roomy.parts['live activations'] == (
    17 * 4 * 4096 * (rows + rest + shared)
  )
  assert roomy.live == [17] * 16


def test_memory_falls_with_more_devices_and_less_room():
  cfg, layout = pod()
  total = lambda **changes: (
    device_memory.device_memory(
      cfg, dataclasses.replace(layout, **changes)
    ).total
  )
  assert total(buffer_factor=2.0) > total() > total(buffer_factor=1.0)
  assert total(remat='full') < total() < total(remat='none')
  assert total(data=4, microbatch=256) < total()
  assert total(data=4, microbatch=256, fsdp=('data',)) < total(
    data=4, microbatch=256
  )
  assert total(vocabulary='last', schedule='1f1b') < total(
    vocabulary='last', schedule='gpipe'
  )


@pytest.mark.parametrize(
  ('chips', 'message'),
  [
    (1000, 'chips=1000 must be a multiple of 2048'),
    (3000, 'use 2048 or 4096'),
    (0, 'chips=0 must be'),
    (12288, 'micro-batch of 12288 chips|micro-batches'),
    (16384, 'microbatches=15 must be even and >= 2'),
  ],
)
def test_refusals(chips, message):
  cfg = config.from_config_dict(v3_671b.get_config('pod'))
  with pytest.raises(errors.InputError, match=message):
    device_layout.from_config(cfg, chips)
