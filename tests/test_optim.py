"""AdamW, schedules and EMA against the float64 oracle."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax import config, optim
from experiments import base
from tests import settings, tolerances
from tests.oracles import optim as oracle

_REPORT = config.from_config_dict(base.get_config())


def adam_run(dtype, steps):
  """Our and the oracle's parameters and moments after so many steps."""
  cfg = settings.small(optim__moments_dtype=dtype).optim
  rng = np.random.default_rng(0)
  shapes = {'w': (6, 5), 'q_norm': (5,), 'norm': (4,)}
  params = {name: rng.normal(size=s) for name, s in shapes.items()}
  ours = {name: jnp.asarray(w, jnp.float32) for name, w in params.items()}
  optimizer = optim.adamw(cfg)
  state, update = optimizer.init(ours), jax.jit(optimizer.update)
  zeros = {name: np.zeros(s) for name, s in shapes.items()}
  mean, square = zeros, dict(zeros)
  decayed = {'w': True, 'q_norm': False, 'norm': False}
  how = (cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, decayed)
  for count in range(1, steps + 1):
    grads = {n: rng.normal(size=s) * 10.0**-count for n, s in shapes.items()}
    g32 = {n: jnp.asarray(g, jnp.float32) for n, g in grads.items()}
    lr = 0.1 / count
    ours, state = update(g32, state, ours, jnp.float32(lr))
    params, mean, square = oracle.adamw_step(
      params, grads, mean, square, count, lr, *how
    )
  return ours, state, params, mean, square


def test_adamw_is_the_oracles():
  ours, state, params, mean, square = adam_run('float32', steps=5)
  tolerances.assert_trees_close(ours, params)
  tolerances.assert_trees_close(state.mean, mean)
  tolerances.assert_trees_close(state.square, square)
  assert int(state.count) == 5


def test_bf16_moments_are_rounded_f32_moments():
  """After one step the weights are exact: rounding comes after use."""
  ours, state, params, mean, square = adam_run('bfloat16', steps=1)
  tolerances.assert_trees_close(ours, params)
  for got, want in ((state.mean, mean), (state.square, square)):
    for name in want:
      assert got[name].dtype == jnp.bfloat16
      error = np.abs(np.float64(got[name]) - want[name])
      assert (error <= 2.0**-8 * np.abs(want[name]) + 1e-30).all()


def test_norm_weights_do_not_decay():
  """With no gradient, matrices shrink by lr * decay and norms stay."""
  cfg = settings.small().optim
  params = {'w': jnp.ones((2, 2)), 'kv_norm': jnp.ones(2)}
  optimizer = optim.adamw(cfg)
  zeros = jax.tree.map(jnp.zeros_like, params)
  new, _ = optimizer.update(
    zeros, optimizer.init(params), params, jnp.float32(0.5)
  )
  np.testing.assert_allclose(new['w'], 1.0 - 0.5 * cfg.weight_decay)
  np.testing.assert_array_equal(new['kv_norm'], 1.0)


_LR = _REPORT.optim.lr
_ARGS = (
  _LR.peak,
  _LR.warmup_steps,
  _LR.constant_tokens,
  _LR.decay_tokens,
  _LR.decay_lr,
  _LR.hold_tokens,
  _LR.final_lr,
)


@hypothesis.given(
  step=st.integers(0, 10**6), tokens=st.integers(0, 15 * 10**12)
)
@hypothesis.example(step=1999, tokens=0)
@hypothesis.example(step=2000, tokens=10**13)
@hypothesis.example(step=10**6, tokens=14_300_000_000_000)
@hypothesis.example(step=10**6, tokens=14_632_999_999_999)
@hypothesis.example(step=10**6, tokens=14_633_000_000_000)
def test_learning_rate(step, tokens):
  want = oracle.learning_rate(step, tokens, *_ARGS)
  assert optim.lr_at(_LR, step, tokens) == pytest.approx(want, rel=1e-12)


def test_report_learning_rates():
  at = lambda tokens: optim.lr_at(_LR, 10**6, tokens)
  assert optim.lr_at(_LR, 1000, 10**9) == 1.1e-4
  assert at(9_999_999_999_999) == 2.2e-4
  assert at(12_150_000_000_000) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
  assert at(14_300_000_000_001) == 2.2e-5
  assert at(14_700_000_000_000) == 7.3e-6


@hypothesis.given(
  tokens=st.integers(0, 10**12),
  micro=st.integers(1, 64),
  start=st.integers(1, 20),
  more=st.integers(0, 100),
  ramp=st.integers(1, 10**12),
)
def test_batch_ramp(tokens, micro, start, more, ramp):
  cfg = settings.small(
    train__microbatch_size=micro,
    train__batch_size_start=start * micro,
    train__batch_size=(start + more) * micro,
    train__batch_ramp_tokens=ramp,
    mesh__data=1,
  ).train
  got = optim.batch_size_at(cfg, tokens)
  want = oracle.batch_size(
    tokens, cfg.batch_size_start, cfg.batch_size, ramp, micro
  )
  assert got == want
  assert got % micro == 0
  assert cfg.batch_size_start <= got <= cfg.batch_size
  assert got <= optim.batch_size_at(cfg, tokens + 10**6)


def test_step_schedules_of_the_report():
  """lambda 0.3 then 0.1 from 10T; gamma 0.001 then 0 from 14.3T (TR 4.2)."""
  cfg = _REPORT.optim
  for schedule, edge, values in (
    (cfg.mtp_weight, 10_000_000_000_000, (0.3, 0.1)),
    (cfg.bias_rate, 14_300_000_000_000, (0.001, 0.0)),
  ):
    assert optim.value_at(schedule, edge - 1) == values[0]
    assert optim.value_at(schedule, edge) == values[1]


def test_ema_is_the_oracles_and_survives_donation():
  rng = np.random.default_rng(0)
  params = {'a': {'w': rng.normal(size=(4, 3))}}
  on_device = lambda tree: jax.tree.map(jnp.float32, tree)
  bump = jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)
  ema = optim.HostEma(0.9, on_device(params))
  average = {'w': params['a']['w']}
  for _ in range(6):
    params = {'a': {'w': rng.normal(size=(4, 3))}}
    given = on_device(params)
    ema.update(given)
    bump(given)
    average = oracle.ema(average, params['a'], 0.9)
  tolerances.assert_trees_close(ema.tree(), {'a': average})
  kept = ema.tree()
  again = optim.HostEma(0.9, on_device(params))
  again.load(kept)
  for e in (ema, again):
    e.update(on_device(params))
  np.testing.assert_array_equal(ema.tree()['a']['w'], again.tree()['a']['w'])
  with pytest.raises(ValueError, match='shapes of the parameters'):
    again.load({'a': {'w': np.zeros(2)}})
  ema.close()
  again.close()


def test_ema_of_decay_zero_is_off():
  ema = optim.HostEma(0.0, {'w': jnp.ones(2)})
  ema.update({'w': jnp.zeros(2)})
  assert ema.tree() == {}
  ema.close()
