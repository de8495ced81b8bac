"""PyTorch's FP8 product (cuBLASLt) and attention as rivals, in a process.

The parent asks for one measurement at a time, between its own, so that both
sides see the same state of the device:

  rivals = Rivals()                starts this module as a process
  rivals.time(m, n, k, block)      rows: name, samples in seconds, difference
  rivals.attend(shape, x, u)       rows: name, pass, samples in seconds

`rivals.absent` is the reason if PyTorch cannot run. A recipe that this PyTorch
or cuBLASLt refuses gives a row with the reason.
"""

import functools
import json
import subprocess
import sys
import time
from typing import Any

from pallas_kernels import numerics

_SAMPLES, _SECONDS = (10, 50), 0.7
_SETS = 4


class Rivals:
  """The process that times PyTorch; `absent` is a reason or ''."""

  def __init__(self):
    self._child = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.common.torch_rivals'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.absent, self.versions = '', ''
    answer = self._read()
    self.absent = answer.get('absent', '')
    self.versions = answer.get('versions', '')

  def time(self, m: int, n: int, k: int, block: bool) -> list[dict[str, Any]]:
    """Rows of [m, k] x [n, k]^T; block: b has 128 x 128 scales, BF16 out."""
    return self._request({'m': m, 'n': n, 'k': k, 'block': block})

  def attend(
    self, shape: tuple[int, int, int], x: int, u: int
  ) -> list[dict[str, Any]]:
    """Rows of causal attention. shape: sequences, tokens, heads; u: values."""
    return self._request({'shape': shape, 'x': x, 'u': u})

  def _request(self, request: dict[str, Any]) -> list[dict[str, Any]]:
    if self.absent:
      return []
    print(json.dumps(request), file=self._child.stdin, flush=True)
    answer = self._read()
    self.absent = answer.get('absent', '')
    return answer.get('rows', [])

  def close(self) -> None:
    self._child.stdin.close()
    self._child.wait()
    self._child.stdout.close()

  def _read(self) -> dict[str, Any]:
    for line in self._child.stdout:
      if line.startswith('{'):  # a library may print too
        return json.loads(line)
    return {'absent': 'the PyTorch process ended'}


def serve() -> int:
  """Answers requests of the standard input until it ends."""
  try:
    import torch
  except ImportError as error:
    return _answer({'absent': f'no PyTorch: {error}'})
  if not torch.cuda.is_available():
    return _answer({'absent': f'torch {torch.__version__} sees no CUDA device'})
  cublas = torch.backends.cuda.preferred_blas_library()
  versions = f'torch {torch.__version__}, CUDA {torch.version.cuda}, {cublas}'
  _answer({'versions': versions})
  for line in sys.stdin:
    request = json.loads(line)
    measure = _attend if 'shape' in request else _measure
    _answer({'rows': measure(torch, **request)})
  return 0


def _answer(message: dict[str, Any]) -> int:
  print(json.dumps(message), flush=True)
  return 0


def _attend(torch, shape: list[int], x: int, u: int) -> list[dict]:
  """Both passes of each backend that PyTorch has for it."""
  batch, length, heads = shape
  normal = lambda width: torch.randn(
    (batch, heads, length, width), device='cuda', dtype=torch.bfloat16
  )
  q, k, v = (normal(width).requires_grad_() for width in (x, x, u))
  do = normal(u)
  rows = []
  for backend in ('CUDNN_ATTENTION', 'FLASH_ATTENTION'):
    rows += _attend_by(torch, backend, (q, k, v), do)
  return rows


def _attend_by(torch, backend: str, inputs: tuple, do) -> list[dict]:
  head = {'name': f'torch sdpa {backend.split("_")[0].lower()}'}
  run = functools.partial(
    torch.nn.functional.scaled_dot_product_attention, *inputs, is_causal=True
  )
  try:
    attention = torch.nn.attention
    kind = getattr(attention.SDPBackend, backend)
    with attention.sdpa_kernel(kind):
      out = run()
      pull = lambda: torch.autograd.grad(out, inputs, do, retain_graph=True)
      passes = {'forward': run, 'backward': pull}
      return [
        head | {'pass': name} | _timed(torch, [call])
        for name, call in passes.items()
      ]
  except (RuntimeError, ValueError, TypeError, AttributeError) as error:
    # What a version lacks differs by version; the reason goes in the table.
    why = ' '.join(str(error).split())[:300]
    return [head | {'pass': 'forward', 'absent': why}]


def _measure(torch, m: int, n: int, k: int, block: bool) -> list[dict]:
  out = torch.bfloat16 if block else torch.float32
  generator = torch.Generator('cuda').manual_seed(0)
  normal = lambda *shape: torch.randn(
    shape, generator=generator, device='cuda', dtype=torch.float32
  ).bfloat16()
  sets = [(normal(m, k), normal(n, k)) for _ in range(_SETS)]
  wanted = sets[0][0][:256].double() @ sets[0][1].double().T
  recipes = {
    'torch bf16': _bf16,
    'torch _scaled_mm, one scale a tensor': _per_tensor,
    'torch _scaled_mm, block scales': block_scaled,
  }
  rows = []
  for name, prepare in recipes.items():
    row = {'name': name}
    try:
      runs = [prepare(torch, a, b, block, out) for a, b in sets]
      got = runs[0]()[:256].double()
      row |= _timed(torch, runs)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
      # What a version lacks differs by version; the reason goes in the table.
      row['absent'] = ' '.join(str(error).split())[:300]
    else:
      pair = (x.cpu().numpy() for x in (got, wanted))
      row['difference'] = numerics.difference(*pair)
    rows.append(row)
  return rows


def _bf16(torch, a, b, block, out):
  del block
  if out == torch.bfloat16:
    return lambda: a @ b.T
  return lambda: torch.mm(a, b.T, out_dtype=out)


def _per_tensor(torch, a, b, block, out):
  del block
  (a8, scale_a), (b8, scale_b) = (_tiles(torch, x, *x.shape) for x in (a, b))
  scales = (scale_a.reshape(()), scale_b.reshape(()))
  return lambda: torch._scaled_mm(a8, b8.T, *scales, out_dtype=out)


def block_scaled(torch, a, b, block, out):
  """Scales as cuBLASLt wants them.

  1 x 128: [rows, K / 128], rows contiguous. 128 x 128: [K / 128, rows / 128],
  K contiguous and padded to a multiple of 4.
  """
  a8, scale_a = _tiles(torch, a, 1, 128)
  b8, scale_b = _tiles(torch, b, 128 if block else 1, 128)
  outer_major = lambda scale: scale.T.contiguous().T
  scale_a = outer_major(scale_a)
  if block:
    pad = -scale_b.shape[1] % 4
    scale_b = torch.nn.functional.pad(scale_b, (0, pad)).T
  else:
    scale_b = outer_major(scale_b)
  functional = torch.nn.functional
  if hasattr(functional, 'scaled_mm'):
    kinds = functional.ScalingType
    kind = kinds.BlockWise128x128 if block else kinds.BlockWise1x128
    return lambda: functional.scaled_mm(
      a8, b8.T, scale_a, kinds.BlockWise1x128, scale_b, kind, output_dtype=out
    )
  if not block:
    scale_b = scale_b.T
  return lambda: torch._scaled_mm(a8, b8.T, scale_a, scale_b, out_dtype=out)


def _tiles(torch, x, rows: int, columns: int):
  """e4m3 values and f32 scales of tiles; edges may be partial."""
  (height, width), pad = x.shape, torch.nn.functional.pad
  tall, wide = -(-height // rows), -(-width // columns)
  x = pad(x.float(), (0, wide * columns - width, 0, tall * rows - height))
  x = x.reshape(tall, rows, wide, columns)
  scales = x.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448.0
  values = (x / scales).to(torch.float8_e4m3fn)
  values = values.reshape(tall * rows, wide * columns)[:height, :width]
  return values.contiguous(), scales.reshape(tall, wide)


def _timed(torch, runs) -> dict[str, Any]:
  """Seconds of one product, by device events; a sample runs all sets."""
  for run in runs:
    run()
  torch.cuda.synchronize()
  samples, end = [], time.monotonic() + _SECONDS
  while len(samples) < _SAMPLES[0] or (
    len(samples) < _SAMPLES[1] and time.monotonic() < end
  ):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(4):
      for run in runs:
        run()
    stop.record()
    torch.cuda.synchronize()
    samples.append(start.elapsed_time(stop) * 1e-3 / (4 * len(runs)))
  return {'samples': samples}


if __name__ == '__main__':
  sys.exit(serve())
