"""Names of implementations, and what 'auto' stands for.

A name that is given is obeyed or raises; 'auto' is decided by the backend alone
and logged once.
"""

import functools
import logging

import jax

NAMES = ('auto', 'reference', 'pallas', 'pallas_interpret')


def resolve(implementation: str) -> str:
  """One of 'reference', 'pallas_gpu', 'pallas_tpu', 'pallas_interpret'.

  Raises:
    ValueError: not one of `NAMES`.
    NotImplementedError: 'pallas' on a device that it has no kernel for.
  """
  if implementation not in NAMES:
    raise ValueError(f'implementation={implementation!r} must be in {NAMES}')
  if implementation == 'auto':
    return _automatic(jax.default_backend())
  if implementation == 'pallas':
    return _pallas(jax.default_backend())
  return implementation


@functools.cache
def _automatic(backend: str) -> str:
  try:
    chosen = _pallas(backend)
  except NotImplementedError:
    chosen = 'reference'
  logging.getLogger(__name__).info('kernels on %s: %s', backend, chosen)
  return chosen


def _pallas(backend: str) -> str:
  if backend == 'tpu':
    return 'pallas_tpu'
  if backend == 'gpu':
    capability = getattr(jax.devices()[0], 'compute_capability', '')
    if capability.startswith('9.'):
      return 'pallas_gpu'
    raise NotImplementedError(
      f'the GPU kernels are written for compute capability 9.x, this is '
      f'{capability or "unknown"}'
    )
  raise NotImplementedError(f'no Pallas kernel runs on {backend!r}')
