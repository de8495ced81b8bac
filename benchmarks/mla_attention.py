"""Training attention of MLA beside the ceilings of the same device and run.

Question: which share of a plain BF16 product's speed do forward and backward
pass of causal attention reach at V3's widths, and how fast are cuDNN, tokamax
and PyTorch there?

  dsv3 bench mla_attention [--json] [--only=TEXT] [--output=FILE]

Random normal data. Beside each time stands the largest difference of a result
from the reference in f32 on the same operands (bound 1e-5), for two heads.
Variants of a pass take turns. On a CPU there are fewer tokens and heads, as the
shapes in the table show.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator

# PyTorch needs memory of the same device.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import mla_decode
from benchmarks.common import clock, report, torch_rivals
from pallas_kernels import numerics
from pallas_kernels.mla_attention import api, cases, reference

BF16_DOT = mla_decode.BF16_DOT
DIFFERENCE = 1e-5
PASSES = ('forward', 'backward')
ABOUT = """Times are those of one layer's attention, from queries, keys and
values to the output, and from its gradient to theirs. `of_bf16_dot`: FLOPs a
second over those of a square BF16 product. FLOPs count the pairs that meet, two
products of them forward and five backward, among which are the scores once
more; what an implementation does beyond that counts for nothing. Rivals get
keys with the rotary part repeated for each head, cuDNN also values with 64
zeros (it takes one width); `pallas_speed_over_this` is our speed over theirs.
`difference` is 1 - 2 <x, y> / (|x|^2 + |y|^2) from the reference in f32, of the
first and the last head; the rotary key's gradient is the sum of all.
"""


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('mla_attention', __doc__)
  parser.add_argument('--only', default='', help='part of "case"')
  parser.add_argument('--dry_run', action='store_true', help='tiny shapes')
  args = parser.parse_args(argv)
  works = {k: v for k, v in shapes(args.dry_run).items() if args.only in k}
  if not works:
    parser.error(f'--only={args.only!r} leaves nothing')
  rows = report.Rows(args)
  timer = clock.DRY if args.dry_run else clock.default()
  ceilings = mla_decode.measure_ceilings(timer, rows, args.dry_run)
  for name, case in works.items():
    for row in one_case(name, case, timer, ceilings[BF16_DOT]):
      rows.append(row)
    if case.samples is None:
      for row in torch_rows(name, case, rows):
        rows.append(row)
  report.publish('mla_attention', ABOUT, rows, args)
  return int(any(row.get('wrong') for row in rows))


def shapes(dry_run: bool) -> dict[str, cases.Case]:
  """V3's cases, on a CPU with fewer tokens and heads."""
  if dry_run:
    return {name: cases.SMALL[name] for name in ('ragged', 'packed')}
  if jax.default_backend() != 'cpu':
    return cases.V3
  small = {'length': 512, 'heads': 4}
  packed = cases.V3['packed']._replace(samples=(125, 3, 250, 75), **small)
  return {'pretrain': cases.V3['pretrain']._replace(**small), 'packed': packed}


def draw(case: cases.Case, key: jax.Array) -> tuple:
  """q, k_nope, k_rope, v, segments (or None) and the output's gradient."""
  b, t, n = case.batch, case.length, case.heads
  widths = (case.nope + case.rope, case.nope, case.rope, case.value, case.value)
  shapes = [(b, t, n, width) for width in widths]
  shapes[2] = (b, t, case.rope)
  *operands, do = (
    jax.random.normal(subkey, shape, jnp.bfloat16)
    for subkey, shape in zip(jax.random.split(key, 5), shapes, strict=True)
  )
  if case.samples is None:
    return *operands, None, do
  ids = np.repeat(np.arange(len(case.samples)) + 1, case.samples)
  row = np.pad(ids.astype(np.int32), (0, t - len(ids)))
  return *operands, jnp.asarray(np.tile(row, (b, 1))), do


def count(case: cases.Case) -> dict[str, int]:
  """FLOPs of each pass."""
  samples = case.samples or ()
  samples = (*samples, case.length - sum(samples))
  pairs = sum(x * (x + 1) // 2 for x in samples) * case.batch * case.heads
  x, u = case.nope + case.rope, case.value
  return {
    'forward': 2 * pairs * (x + u),
    'backward': 2 * pairs * (3 * x + 2 * u),
  }


def variants(case: cases.Case, segments_BT) -> dict[str, Callable]:
  """Implementations of (q, k_nope, k_rope, v) -> o."""
  ours = lambda which: (
    lambda *operands: api.attention(
      *operands, segments_BT, scale=default_scale(case), implementation=which
    )[0]
  )
  named = [name for name in mla_decode.implementations() if name != 'reference']
  if jax.default_backend() == 'cpu':  # whose arrays of pairs a GPU lacks
    named[:0] = ['reference', 'xla']
  calls = {name: ours(name) for name in named}
  if jax.default_backend() == 'gpu' and segments_BT is None:
    calls['cudnn'] = repeat_rotary_key(_cudnn)
    calls['tokamax'] = repeat_rotary_key(_tokamax)
  return calls


def default_scale(case: cases.Case) -> float:
  """The scale that rivals use by default."""
  return (case.nope + case.rope) ** -0.5


def repeat_rotary_key(run: Callable) -> Callable:
  """`run` takes q, k and v, whose keys have the rotary part in every head."""

  def call(q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU):
    shape = (*k_nope_BSNH.shape[:3], k_rope_BSR.shape[-1])
    k_rope_BSNR = jnp.broadcast_to(k_rope_BSR[:, :, None], shape)
    k_BSNX = jnp.concatenate([k_nope_BSNH, k_rope_BSNR], axis=-1)
    return run(q_BTNX, k_BSNX, v_BSNU)

  return call


def _cudnn(q_BTNX, k_BSNX, v_BSNU):
  missing = k_BSNX.shape[-1] - v_BSNU.shape[-1]
  v_BSNX = jnp.pad(v_BSNU, ((0, 0), (0, 0), (0, 0), (0, missing)))
  o_BTNX = jax.nn.dot_product_attention(
    q_BTNX, k_BSNX, v_BSNX, is_causal=True, implementation='cudnn'
  )
  return o_BTNX[..., : v_BSNU.shape[-1]]


def _tokamax(q_BTNX, k_BSNX, v_BSNU):
  try:
    tokamax = importlib.import_module('tokamax')
  except ImportError as error:
    raise NotImplementedError(f'no tokamax: {error}') from error
  try:
    return tokamax.dot_product_attention(
      q_BTNX, k_BSNX, v_BSNU, is_causal=True, implementation='mosaic'
    )
  except (TypeError, AttributeError) as error:  # releases differ
    raise NotImplementedError(f'tokamax: {error}') from error


def one_case(
  name: str, case: cases.Case, timer: clock.Clock, dot: float
) -> Iterator[report.Row]:
  """Times and checks all implementations, forward and backward."""
  *operands, segments_BT, do_BTNU = draw(case, jax.random.key(0))
  exact = exact_results(operands, segments_BT, do_BTNU, default_scale(case))
  head = {'case': name, 'shape': shape_of(case)}
  runs, checks = {which: {} for which in PASSES}, {}
  for variant, call in variants(case, segments_BT).items():
    try:  # one that fails on this device must not end the others
      forward, backward, outs = compile_passes(call, operands, do_BTNU)
    except mla_decode.REFUSALS as error:
      why = ' '.join(str(error).split())[:200]
      yield head | {'implementation': variant, 'note': f'refused: {why}'}
      continue
    runs['forward'][variant], runs['backward'][variant] = (
      forward,
      backward,
    )
    checks['forward', variant] = numerics.difference(outs[0], exact[0])
    checks['backward', variant] = max(
      map(numerics.difference, outs[1:], exact[1:])
    )
    del outs
  for which, flop in count(case).items():
    times = timer.time(runs[which], dict.fromkeys(runs[which], 1))
    for variant, timing in times.items():
      row = head | {'pass': which, 'implementation': variant} | timing.row()
      row['tflop_per_second'] = flop / timing.median / 1e12
      row['of_bf16_dot'] = flop / timing.median / dot
      row['difference'] = checks[which, variant]
      if 'pallas' in times and variant != 'pallas':
        row['pallas_speed_over_this'] = timing.median / times['pallas'].median
      if (
        variant in ('reference', 'xla', 'pallas')
        and not row['difference'] < DIFFERENCE
      ):
        row['wrong'] = True
      yield row


def shape_of(case: cases.Case) -> str:
  """Sequences x tokens x heads, widths, and samples."""
  text = f'{case.batch}x{case.length}x{case.heads}, '
  text += f'{case.nope}+{case.rope}/{case.value}'
  return text + (f', samples {case.samples}' if case.samples else '')


def compile_passes(call: Callable, operands: list, do_BTNU):
  """Both passes without arguments, and some of their results."""
  forward = jax.jit(call).lower(*operands).compile()
  _, pull = jax.jit(functools.partial(jax.vjp, call))(*operands)
  backward = jax.jit(lambda pull, do: pull(do)).lower(pull, do_BTNU).compile()
  outs = _two_heads([forward(*operands), *backward(pull, do_BTNU)])
  return lambda: forward(*operands), lambda: backward(pull, do_BTNU), outs


def exact_results(
  operands, segments_BT, do_BTNU, scale: float
) -> list[np.ndarray]:
  """o and gradients by the reference in f32, a head at a time."""
  f32 = lambda x: x.astype(jnp.float32)
  q_BTNX, k_nope_BSNH, k_rope_BSR, v_BSNU = map(f32, operands)

  def one_head(arrays):
    q, k_nope, v, do = (x[:, :, None] for x in arrays)
    args = (q, k_nope, k_rope_BSR, v, segments_BT, scale)
    o, lse = reference.forward(*args)
    delta = jnp.einsum('btnu,btnu->bnt', o, do)
    grads = reference.backward(*args, lse, delta, do)
    return o[:, :, 0], *(x[:, :, 0] if x.ndim == 4 else x for x in grads)

  @jax.jit
  def every(arrays):
    heads = tuple(jnp.moveaxis(x, 2, 0) for x in arrays)
    o, dq, dk_nope, dk_rope, dv = jax.lax.map(one_head, heads)
    o, dq, dk_nope, dv = (jnp.moveaxis(x, 0, 2) for x in (o, dq, dk_nope, dv))
    return o, dq, dk_nope, jnp.sum(dk_rope, axis=0), dv

  with jax.default_matmul_precision('highest'):
    outs = every((q_BTNX, k_nope_BSNH, v_BSNU, f32(do_BTNU)))
  return _two_heads(outs)


def _two_heads(outs) -> list[np.ndarray]:
  """The first and the last head, f32."""
  heads = [x[:, :, np.array([0, -1])] if x.ndim == 4 else x for x in outs]
  return [np.asarray(x, np.float32) for x in heads]


def torch_rows(
  name: str, case: cases.Case, rows: report.Rows
) -> Iterator[report.Row]:
  """PyTorch's rows, each with what our speed is of it."""
  head = {'case': name, 'shape': shape_of(case)}
  if jax.default_backend() != 'gpu':
    why = 'absent: PyTorch is a rival on NVIDIA GPUs only'
    yield head | {'implementation': 'torch sdpa', 'note': why}
    return
  rivals = torch_rivals.Rivals()
  shape = (case.batch, case.length, case.heads)
  answers = rivals.attend(shape, case.nope + case.rope, case.value)
  absent = rivals.absent
  rivals.close()
  if absent:
    yield head | {'implementation': 'torch', 'note': f'absent: {absent}'}
    return
  for answer in answers:
    row = head | {'pass': answer['pass'], 'implementation': answer['name']}
    if 'absent' in answer:
      yield row | {'note': f'refused: {answer["absent"]}'}
      continue
    times = clock.summary(answer['samples'])
    row |= times.row()
    row['tflop_per_second'] = count(case)[answer['pass']] / times.median / 1e12
    ours = head | {'pass': answer['pass'], 'implementation': 'pallas'}
    pallas = [x for x in rows if ours.items() <= x.items()]
    if pallas:
      seconds = pallas[0]['milliseconds_median'] * 1e-3
      row['pallas_speed_over_this'] = times.median / seconds
    yield row


if __name__ == '__main__':
  sys.exit(main())
