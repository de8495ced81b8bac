"""MLA's forward kernel for TPUs: interpreted, and lowered for the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics
from pallas_kernels.mla_attention import api, cases, pallas_tpu, reference
from tests.pallas import attention


@pytest.mark.parametrize('name', ['one', 'ragged', 'packed', 'padding'])
def test_forward_matches_the_reference(name):
  case = cases.SMALL[name]
  args = (*attention.inputs(case)[:5], attention.scale(case))
  got = pallas_tpu.forward(*args, interpret=True)
  for x, y in zip(got, reference.forward(*args), strict=True):
    assert np.isfinite(np.asarray(x, np.float32)).all()
    assert x.dtype == y.dtype and x.shape == y.shape
    assert numerics.difference(x, y) < 1e-5
  again = pallas_tpu.forward(*args, interpret=True)
  for x, y in zip(got, again, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_lowers_for_the_device(dtype):
  case = cases.SMALL['packed']
  *operands, segments, _, _ = attention.inputs(case, dtype)
  call = functools.partial(pallas_tpu.forward, scale=attention.scale(case))
  traced = jax.jit(call).trace(*operands, segments_BT=segments)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'tpu_custom_call' in text


def test_api_runs_the_kernel_and_refuses_its_gradient():
  case = cases.SMALL['tiny']
  args = attention.inputs(case)[:4]
  call = functools.partial(
    api.attention,
    scale=attention.scale(case),
    implementation='pallas_interpret',
  )
  want = pallas_tpu.forward(*args, None, attention.scale(case), interpret=True)
  for x, y in zip(call(*args), want, strict=True):
    np.testing.assert_array_equal(x, y)
  with pytest.raises(NotImplementedError, match='gradient'):
    jax.vjp(call, *args)
