"""Differences between the releases of JAX that the kernels run on.

Names in Pallas' Mosaic GPU change between releases. Kernels use what JAX 0.10
to 0.12 share, and the functions of this module for the rest.
"""

import jax

try:
  from jax.experimental.pallas import mosaic_gpu
except ImportError:  # of a jaxlib without it: the references need none
  mosaic_gpu = None

RELEASE = tuple(int(part) for part in jax.__version__.split('.')[:2])


def require(release: tuple[int, int], what: str) -> None:
  """Raises NotImplementedError if jax is older than `release`."""
  if release > RELEASE:
    wanted = '.'.join(map(str, release))
    raise NotImplementedError(
      f'{what} needs jax {wanted} or later, this is {jax.__version__}'
    )


def gpu_interpreter(interpret: bool):
  """The `interpret` argument of a Mosaic GPU kernel; it reports races.

  Raises:
    NotImplementedError: jax before 0.11, whose interpreter lacks FP8.
  """
  if not interpret:
    return False
  require((0, 11), 'the interpreter of Mosaic GPU kernels')
  return mosaic_gpu.InterpretGPUParams(detect_races=True)
