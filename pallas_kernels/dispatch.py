"""Names of implementations, and the choice between them, for every op.

A name that is given is obeyed or raises. 'auto' is the kernel of this backend
where there is one that takes the arguments, and otherwise the op's fallback;
the choice is logged once.
"""

import functools
import logging
from collections.abc import Callable

import jax

NAMES = ('auto', 'reference', 'xla', 'pallas', 'pallas_interpret')


def resolve(
  implementation: str,
  op: str = '',
  unsupported: Callable[[str], str | None] = lambda kernel: None,
  fallback: str = 'reference',
) -> str:
  """The implementation that a name stands for.

  Args:
    implementation: one of `NAMES`.
    op: its name, for messages; without, the choice is not logged, as where
      not every backend has a kernel of its own.
    unsupported: name of a kernel -> why it does not take the arguments, or
      None.
    fallback: what 'auto' is without a kernel: 'reference', or 'xla' for ops
      that have such an implementation.
  Returns:
    'reference', 'xla', 'pallas_gpu', 'pallas_tpu' or 'pallas_interpret'.
  Raises:
    ValueError: not one of `NAMES`.
    NotImplementedError: 'pallas' on a device without a kernel, or with
      arguments that the kernel does not take; 'xla' for an op without it.
  """
  if implementation not in NAMES:
    raise ValueError(f'implementation={implementation!r} must be in {NAMES}')
  if implementation == 'xla' != fallback:
    raise NotImplementedError(f'{op} has no implementation {implementation!r}')
  if implementation not in ('auto', 'pallas'):
    return implementation
  try:
    chosen = backend_kernel()
    if reason := unsupported(chosen):
      raise NotImplementedError(reason)
  except NotImplementedError as error:
    if implementation == 'pallas':
      raise
    chosen, reason = fallback, str(error)
  if implementation == 'auto' and op:
    log_choice(op, chosen, reason)
  return chosen


def backend_kernel() -> str:
  """The kernels written for this backend.

  Raises:
    NotImplementedError: there are none.
  """
  backend = jax.default_backend()
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


@functools.cache
def log_choice(op: str, chosen: str, reason: str | None) -> None:
  """Logs what 'auto' chose, once for each op and reason."""
  why = f', as {reason}' if reason else ''
  logging.getLogger(__name__).info('%s: %s%s', op, chosen, why)
