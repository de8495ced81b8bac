"""Times: the trace they come from, sums by hand, and what must grow or fall."""

import dataclasses

import pytest

from dsv3_jax import config, precision
from dsv3_jax.parallel.schedules import make as schedules
from dsv3_jax.planning import (
  all_to_all,
  chips,
  device_layout,
  flops,
  kernels,
  run_cost,
  step_time,
)
from experiments import v3_671b
from tests import settings

H800 = chips.CHIPS['h800']


@pytest.fixture(scope='module')
def pod():
  cfg = config.from_config_dict(v3_671b.get_config('pod'))
  return cfg, device_layout.from_config(cfg, 2048)


def times(cfg, layout, chip=H800, **rates):
  return kernels.KernelTimes(
    model=cfg.model,
    policy=precision.POLICIES[cfg.precision],
    chip=chip,
    layout=layout,
    seq_len=cfg.data.seq_len,
    rates=kernels.Rates(**rates),
  )


def test_the_trace_comes_out_again(pod):
  """The rates are the trace's, and give its pair of chunks."""
  cfg, layout = pod
  kernel = times(cfg, layout)
  assert kernel.tokens == 4096
  product = 2 * 4096 * 16384 * 7168
  assert kernel.matmul(product) == pytest.approx(0.895e-3)
  assert product / 0.895e-3 == pytest.approx(1075e12, rel=1e-3)
  rows = 2 * 8 * 4096 * 7168 * 4096
  assert kernel.matmul(rows, 'grouped') == pytest.approx(1.74e-3)
  layer = kernel.layer(True)
  assert layer.dispatch == pytest.approx((4.4e-3, 3.45e-3))
  assert layer.combine == pytest.approx((6.3e-3, 6.3e-3))
  chunk = layer * 4
  assert chunk.beside(chunk, kernel.rates.overlap) == pytest.approx(
    129.0e-3, rel=1e-3
  )


def test_rates_are_below_their_peaks():
  rates = dataclasses.asdict(kernels.Rates())
  assert set(kernels.RANGES) == set(rates)
  assert pytest.approx(rates['attention_forward'] * 989e12, rel=1e-2) == 550e12
  relative = {'overlap', 'wgrad', 'alone'}
  assert all(0 < rates[name] < 1 for name in set(rates) - relative)


def test_a_matmul_layer_by_hand():
  """A SwiGLU of one device: 6 FLOP a weight and token, and its bytes."""
  cfg = settings.small(precision='bf16', model__num_dense_layers=3)
  layout = device_layout.from_config(cfg, 1)
  kernel = times(cfg, layout, dense=0.5, hbm=0.25)
  tokens, dim, width = kernel.tokens, 16, 20
  forward, _, weight = kernel.layer(False).ffn
  flop = 6 * tokens * dim * width / (H800.bf16 * 0.5)
  moved = tokens * (dim * (4 * 2 + 2) + width * (2 * 2 + 3 * 2))
  assert forward == pytest.approx(flop + moved / (0.25 * 3.35e12))
  assert weight == pytest.approx(flop + 24 * dim * width / (0.25 * 3.35e12))


def test_one_device_is_a_sum(pod):
  cfg = settings.small()
  layout = device_layout.from_config(cfg, 1)
  result = step_time.step_time(cfg, H800, layout)
  (stage,) = step_time.stage_times(times(cfg, layout))
  count = layout.microbatches
  once = stage.forward + stage.backward
  assert result.parts['bubble'] == result.parts['overlapped'] == 0
  assert result.seconds == pytest.approx(
    count * once + result.parts['optimizer']
  )
  assert result.with_microbatches(count + 3) == pytest.approx(
    result.seconds + 3 * once
  )
  assert result.seconds_in_ticks is None


@pytest.mark.parametrize('kind', schedules.KINDS)
def test_even_stages_have_the_bubble_of_the_formula(kind):
  """Without sending, and with stages that cost the same."""
  cfg = settings.small(model__num_layers=8, model__mtp__depth=0,
                       model__num_dense_layers=0)  # fmt: skip
  layout = device_layout.DeviceLayout(
    pipe=4, data=1, context=1, node=1, expert=1, schedule=kind, microbatch=1,
    batch=16, remat='report', vocabulary='sharded', buffer_factor=1.5,
  )  # fmt: skip
  chip = dataclasses.replace(H800, intra=1e30, inter=1e30)
  kernel = times(cfg, layout, chip)
  stages = step_time.stage_times(kernel)
  assert len({stage.forward for stage in stages}) == 1
  stage = stages[0]
  result = step_time.step_time(cfg, chip, layout)
  formula = schedules.closed_form_bubble(
    kind, ranks=4, f=stage.forward, b=stage.backward, w=stage.weight,
    fb=stage.beside(stage, kernel.rates.overlap),
  )  # fmt: skip
  work = 16 * step_time.per_microbatch(kernel, stages)
  total = result.seconds - result.parts['optimizer']
  if kind in schedules.UNIDIRECTIONAL:
    assert total == pytest.approx(work + formula)
  else:  # the formula is exact for other times only
    assert total == pytest.approx(work + formula, rel=0.12)
  assert sum(result.parts.values()) == pytest.approx(result.seconds)


def test_an_overlapped_pair_is_between_its_bounds(pod):
  cfg, layout = pod
  kernel = times(cfg, layout)
  for stage in step_time.stage_times(kernel):
    alone = stage.forward + stage.backward
    for overlap in (1.0, 1.3168, 10.0):
      pair = stage.beside(stage, overlap)
      assert max(stage.forward, stage.backward) / 2 < pair <= alone
    assert stage.beside(stage, 10.0) == pytest.approx(alone)


def test_more_of_everything_takes_less(pod):
  cfg, layout = pod
  seconds = lambda cfg=cfg, layout=layout, **changes: (
    step_time.step_time(
      cfg, dataclasses.replace(H800, **changes), layout
    ).seconds
  )
  plain = seconds()
  assert seconds(fp8=4e15) < plain
  assert seconds(bf16=2e15) < plain
  assert seconds(hbm_bandwidth=8e12) < plain
  assert seconds(inter=100e9) < plain
  assert seconds(node_size=64) < plain
  assert seconds(layout=dataclasses.replace(layout, remat='full')) > plain
  bf16 = dataclasses.replace(cfg, precision='bf16')
  assert seconds(cfg=bf16) > 1.3 * plain
  more = dataclasses.replace(layout, data=4, microbatch=256)
  assert seconds(layout=more) < plain
  assert seconds(layout=more) > plain / 2  # the bubble stays


@pytest.mark.parametrize('node_size', [1, 2])
def test_the_optimizer_by_hand(node_size):
  """Two replicas: half of the gradients and weights, and AdamW's bytes."""
  cfg = settings.small(
    model__mtp__depth=0, parallel__data=2, eval__batch_size=8
  )
  layout = device_layout.from_config(cfg, 2)
  chip = dataclasses.replace(H800, node_size=node_size)
  values = sum(part.size for part in flops.main_parts(cfg.model))
  rates = kernels.Rates()
  link = 50e9 * rates.combine if node_size == 1 else 200e9 * rates.intra
  want = (4 + 4) * values / 2 / link
  want += values / 2 * (12 + 4 * 2) / (3.35e12 * rates.hbm)
  seconds = step_time.optimizer_seconds(cfg, chip, layout, rates)
  assert seconds == pytest.approx(want)


def test_all_to_alls_alone_may_be_faster(pod):
  cfg, layout = pod
  slow, fast = (times(cfg, layout, alone=x).layer(True) for x in (1.0, 1.25))
  saved = (slow.dispatch[0] + slow.combine[0]) * (1 - 1 / 1.25)
  assert slow.forward - fast.forward == pytest.approx(saved)
  assert slow.beside(slow, 1.0) == fast.beside(fast, 1.0)


def test_fsdp_gathers_f32_weights_by_hand(pod):
  """Attention of a dense layer over 2 data shards: half of 4 bytes each."""
  cfg, layout = pod
  sharded = dataclasses.replace(layout, fsdp=('data',))
  plain, fsdp = (times(cfg, x).layer(False).rest for x in (layout, sharded))
  size = sum(part.size for part in flops.layer_parts(cfg.model, False))
  once = 4 * size / 2 / (50e9 * kernels.Rates().combine)
  assert plain == (0, 0, 0)
  assert fsdp == pytest.approx((once, once, once))


def test_nodes_that_a_token_reaches():
  moe = config.from_config_dict(v3_671b.get_config()).model.moe
  assert all_to_all.nodes_of_a_token(moe, 1) == 1
  assert all_to_all.nodes_of_a_token(moe, 8) == 4
  # 4 of 8 groups, two a node: a node is missed with C(6,4) / C(8,4).
  assert all_to_all.nodes_of_a_token(moe, 4) == pytest.approx(4 * (1 - 15 / 70))


def test_uncertainty_is_that_of_the_ranges(pod):
  cfg, layout = pod
  layout = dataclasses.replace(layout, batch=4096)
  errors = step_time.uncertainty(cfg, H800, layout)
  assert set(errors) == {'step', *step_time.PARTS}
  assert 0.02 < errors['step'] < 0.10
  # Where the trace says nothing, the error is larger.
  assert errors['weight'] > 1.5 * errors['overlapped']
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kernels, 'RANGES', {'overlap': (0.9, 1.1)})
    alone = step_time.uncertainty(cfg, H800, layout)
  assert alone['overlapped'] == pytest.approx(0.1, rel=0.05)
  assert alone['forward'] == alone['optimizer'] == 0


def test_the_ramp_trains_all_tokens(pod):
  cfg, layout = pod
  levels = list(run_cost.ramp_levels(cfg.train))
  assert sum(tokens for _, tokens in levels) == pytest.approx(14.8e12)
  assert levels[0][0] == 4096 and levels[-1][0] == 15360
  assert sum(t for _, t in levels[:-1]) == pytest.approx(469e9)
  step = step_time.step_time(cfg, H800, layout)
  flat = 14.8e12 / step.tokens_per_second
  assert flat < run_cost.run_seconds(cfg, layout, step) < 1.02 * flat


@pytest.mark.parametrize('name', chips.CHIPS)
def test_chips_are_in_base_units_and_have_sources(name):
  chip = chips.CHIPS[name]
  assert 400e12 < chip.bf16 <= chip.fp8 < 10e15
  assert 30e9 < chip.hbm_bytes < 300e9
  assert 1e12 < chip.hbm_bandwidth < 10e12
  assert 1e9 < chip.inter < chip.intra < 1e12
  assert len(chip.sources) > 20
  fields = {field.name for field in dataclasses.fields(chip)}
  assert set(chip.unverified) <= fields


def test_the_model_s_flop_are_below_the_peak(pod):
  """No kernel is faster than its peak: MFU with FP8 stays below 2."""
  cfg, layout = pod
  for chip in chips.CHIPS.values():
    speed = step_time.step_time(cfg, chip, layout).tokens_per_second
    used = speed * flops.flops_per_token(cfg.model, 4096) / layout.devices
    assert 0.03 * chip.bf16 < used < chip.fp8
