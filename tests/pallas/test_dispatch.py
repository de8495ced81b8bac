"""The choice of an implementation: names are obeyed, 'auto' falls back."""

import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.mla_attention import blocks_gpu

NARROW = 'too narrow'


@pytest.fixture
def on_gpu(monkeypatch):
  monkeypatch.setattr(dispatch, 'backend_kernel', lambda: 'pallas_gpu')


def refuse(kernel):
  assert kernel == 'pallas_gpu'
  return NARROW


def test_without_a_kernel_auto_is_the_fallback_and_pallas_raises():
  assert dispatch.resolve('auto', 'op') == 'reference'
  assert dispatch.resolve('auto', 'op', fallback='xla') == 'xla'
  with pytest.raises(NotImplementedError, match=r"no Pallas kernel .* 'cpu'"):
    dispatch.resolve('pallas', 'op')


@pytest.mark.parametrize('name', ['auto', 'pallas'])
def test_a_kernel_that_takes_the_arguments_is_chosen(name, on_gpu):
  take = lambda kernel: None
  assert dispatch.resolve(name, 'op', take) == 'pallas_gpu'


def test_arguments_that_the_kernel_does_not_take(on_gpu, caplog):
  dispatch.log_choice.cache_clear()
  with caplog.at_level('INFO', logger=dispatch.__name__):
    for _ in range(2):
      assert dispatch.resolve('auto', 'op', refuse, 'xla') == 'xla'
  assert caplog.messages == [f'op: xla, as {NARROW}']
  with pytest.raises(NotImplementedError, match=NARROW):
    dispatch.resolve('pallas', 'op', refuse, 'xla')


@pytest.mark.parametrize('name', ['reference', 'pallas_interpret', 'xla'])
def test_names_are_obeyed(name, on_gpu):
  assert dispatch.resolve(name, 'op', refuse, 'xla') == name


def test_names_that_an_op_does_not_have():
  with pytest.raises(NotImplementedError, match=r"op has no .* 'xla'"):
    dispatch.resolve('xla', 'op')
  with pytest.raises(ValueError, match="implementation='fast' must be in"):
    dispatch.resolve('fast', 'op')


@pytest.mark.parametrize(
  ('capability', 'expected'),
  [('9.0', 'pallas_gpu'), ('8.0', '9.x, this is 8.0'), ('', 'unknown')],
)
def test_gpu_kernels_are_of_one_generation(monkeypatch, capability, expected):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(dispatch.jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(dispatch.jax, 'devices', lambda: [device])
  if expected == 'pallas_gpu':
    assert dispatch.backend_kernel() == expected
    return
  with pytest.raises(NotImplementedError, match=expected):
    dispatch.backend_kernel()


def test_a_kernel_says_which_jax_it_needs(monkeypatch):
  monkeypatch.setattr(compat, 'RELEASE', (0, 10))
  compat.require((0, 10), 'a kernel')
  assert compat.gpu_interpreter(interpret=False) is False
  with pytest.raises(NotImplementedError, match=r'needs jax 0\.11 or later'):
    compat.gpu_interpreter(interpret=True)


@pytest.mark.parametrize(
  ('width', 'dtype', 'expected'),
  [(16, jnp.float32, 'q is float32'), (256, jnp.bfloat16, 'widths 256 \\+ 64')],
)
def test_attention_on_gpu_says_what_it_does_not_take(width, dtype, expected):
  shapes = (1, 8, 2, width + 64), (1, 8, 2, width), (1, 8, 64), (1, 8, 2, 64)
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  with pytest.raises(NotImplementedError, match=expected):
    blocks_gpu.plan([*args, None], scale=1.0, interpret=True)
