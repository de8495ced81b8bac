"""The choice of an implementation: names are obeyed, 'auto' falls back."""

import pytest

from pallas_kernels import dispatch

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
