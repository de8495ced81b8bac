"""Rules that every experiment keeps, each with the message of its failure.

A rule is `(holds, message)`; the message names the dotted key, its value and
the values that are allowed. Rules are checked in order, so that a later rule
may rely on an earlier one.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_jax import errors, precision

Rule = tuple[bool, str]

MAX_POSITIONS = 1 << 20  # a position times 12 bits fits 32 bits (`ops.rope`)
_SCHEDULES = ('gpipe', '1f1b', 'interleaved', 'zb1p', 'dualpipe', 'dualpipev')
_CHOICES = {
  'precision': tuple(precision.POLICIES),
  'model.remat': ('none', 'report', 'full'),
  'model.moe.score_func': ('sigmoid', 'softmax'),
  'model.moe.product': ('auto', 'blocks', 'dense', 'ragged'),
  'model.mtp.hidden': ('post_norm', 'pre_norm'),
  'model.mtp.normalizer': ('T', 'valid'),
  'balance.kind': ('sequence', 'batch', 'v2', 'none'),
  'data.bad_records': ('refuse', 'skip'),
  'data.on_change': ('refuse', 'continue'),
  'optim.moments_dtype': ('bfloat16', 'float32'),
  'parallel.schedule': _SCHEDULES,
}
# Numbers that may be 0; every other number must be positive.
_MAY_BE_ZERO = {
  'seed',
  'model.num_dense_layers',
  'model.mla.q_lora_rank',
  'model.moe.num_shared_experts',
  'model.mtp.depth',
  'model.rope.mscale_all_dim',
  'data.fim_rate',
  'data.max_epochs',
  'data.split_rate',
  'optim.lr.warmup_steps',
  'optim.lr.constant_tokens',
  'optim.lr.decay_tokens',
  'optim.lr.decay_lr',
  'optim.lr.hold_tokens',
  'optim.lr.final_lr',
  'optim.beta1',
  'optim.beta2',
  'optim.weight_decay',
  'optim.ema_decay',
  'train.batch_ramp_tokens',
  'train.spike_sigmas',
  'train.probe_every',
  'train.watchdog_seconds',
  'train.peak_flops',
  'eval.every_steps',
  'sample.temperature',
}
_GROUPS_MAY_BE_ZERO = ('balance.', 'data.filters.', 'data.dedup.near')
_GROUPS_MAY_BE_ZERO += ('optim.mtp_weight.', 'optim.bias_rate.')
_FSDP_AXES = ('data', 'context', 'node', 'expert')
_BELOW_ONE = ('data.valid_fraction', 'optim.beta1', 'optim.beta2')
_BELOW_ONE += ('optim.ema_decay',)
_AT_MOST_ONE = ('data.fim_rate', 'data.split_rate', 'sample.top_p')
_AT_MOST_ONE += ('data.dedup.near',)


def check(config: Any) -> None:
  """Raises InputError with the first rule of `config` that does not hold."""
  for rules in (_ranges, _model, _run, _batch, _parallel):
    for holds, message in rules(config):
      if not holds:
        raise errors.InputError(message)


def check_inference(model: Any, sizes: Mapping[str, int]) -> None:
  """Raises InputError with the first rule that a model breaks on a mesh.

  Args:
    model: a `ModelConfig`.
    sizes: devices along each mesh axis.
  """
  for holds, message in _inference(model, sizes):
    if not holds:
      raise errors.InputError(message)


def _inference(model: Any, sizes: Mapping[str, int]) -> Iterator[Rule]:
  """Rules of inference on a mesh."""
  for axis in ('pipe', 'context'):
    size = sizes[axis]
    yield size == 1, f'parallel.{axis}={size} must be 1: inference has none'
  moe, tensor = model.moe, sizes['model']
  widths = {
    'model.mla.num_heads': model.mla.num_heads,
    'model.d_ff': model.d_ff,
    'model.moe.d_ff': moe.d_ff,
  }
  for name, width in widths.items():
    yield (
      width % tensor == 0,
      f'parallel.model={tensor} must divide {name}={width}, which it shards: '
      f'{_divisors(tensor, width)}',
    )
  yield from _experts(moe, sizes['node'], sizes['expert'])


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  for field in dataclasses.fields(node):
    value = getattr(node, field.name)
    if dataclasses.is_dataclass(value):
      yield from _flatten(value, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, value


def _ranges(config: Any) -> Iterator[Rule]:
  """Rules of single values: choices, signs, bounds."""
  values = dict(_flatten(config, ''))
  for path, value in values.items():
    if path in _CHOICES:
      names = ', '.join(_CHOICES[path])
      yield value in _CHOICES[path], f'{path}={value!r} must be one of: {names}'
    if type(value) not in (int, float) or path == 'checkpoint.restore_step':
      continue
    yield math.isfinite(value), f'{path}={value} must be finite'
    if path in _MAY_BE_ZERO or path.startswith(_GROUPS_MAY_BE_ZERO):
      yield value >= 0, f'{path}={value} must be >= 0'
    else:
      yield value > 0, f'{path}={value} must be > 0'
    if path in _BELOW_ONE:
      yield value < 1, f'{path}={value} must be < 1'
    if path in _AT_MOST_ONE:
      yield value <= 1, f'{path}={value} must be <= 1'
  yield values['seed'] < 2**32, f'seed={values["seed"]} must be < 2**32'
  step = values['checkpoint.restore_step']
  yield step >= -1, f'checkpoint.restore_step={step} must be a step or -1'


def _model(config: Any) -> Iterator[Rule]:
  """Rules of the network's shape."""
  model, moe, rope = config.model, config.model.moe, config.model.rope
  dense, layers = model.num_dense_layers, model.num_layers
  yield (
    dense <= layers,
    f'model.num_dense_layers={dense} must be <= model.num_layers={layers}',
  )
  rotary = model.mla.qk_rope_head_dim
  yield (
    rotary % 2 == 0,
    f'model.mla.qk_rope_head_dim={rotary} must be even: RoPE rotates pairs',
  )
  factor = moe.buffer_factor
  yield factor >= 1, f'model.moe.buffer_factor={factor} must be >= 1'
  yield (
    moe.top_k <= moe.num_experts,
    f'model.moe.top_k={moe.top_k} must be <= '
    f'model.moe.num_experts={moe.num_experts}',
  )
  yield (
    moe.num_experts % moe.num_groups == 0,
    f'model.moe.num_groups={moe.num_groups} must divide '
    f'model.moe.num_experts={moe.num_experts}',
  )
  yield (
    moe.top_groups <= moe.num_groups,
    f'model.moe.top_groups={moe.top_groups} must be <= '
    f'model.moe.num_groups={moe.num_groups}',
  )
  per_group = moe.num_experts // moe.num_groups
  covered = moe.top_groups * per_group
  yield (
    moe.top_k <= covered,
    f'model.moe.top_k={moe.top_k} must be <= {covered}: '
    f'model.moe.top_groups={moe.top_groups} groups of {per_group} experts',
  )
  sigmoid = moe.score_func == 'sigmoid' and moe.num_groups > 1
  yield (
    not sigmoid or per_group >= 2,
    f'model.moe.num_groups={moe.num_groups} leaves {per_group} expert a '
    'group, but a group is scored by its best two (TR 2.1.2)',
  )
  yield (
    moe.product == 'auto' or 'fp8' not in config.precision,
    f'model.moe.product={moe.product!r} must be auto with '
    f'precision={config.precision!r}, which has its own grouped matmul',
  )
  longest = min(int(rope.original_seq_len * max(rope.factor, 1)), MAX_POSITIONS)
  yield (
    model.max_seq_len <= longest,
    f'model.max_seq_len={model.max_seq_len} must be <= {longest} = '
    'model.rope.original_seq_len * model.rope.factor (YaRN), at most 2^20',
  )
  yield rope.theta > 1, f'model.rope.theta={rope.theta} must be > 1'
  yield (
    rope.beta_fast >= rope.beta_slow,
    f'model.rope.beta_fast={rope.beta_fast} must be >= '
    f'model.rope.beta_slow={rope.beta_slow}',
  )


def _run(config: Any) -> Iterator[Rule]:
  """Rules between the model and data, evaluation and samples."""
  model, data = config.model, config.data
  yield (
    data.seq_len <= model.max_seq_len,
    f'data.seq_len={data.seq_len} must be <= '
    f'model.max_seq_len={model.max_seq_len}',
  )
  yield (
    model.mtp.depth < data.seq_len,
    f'model.mtp.depth={model.mtp.depth} must be < data.seq_len={data.seq_len}',
  )
  yield (
    bool(data.tokenizer) or data.tokenizer_vocab <= model.vocab_size,
    f'data.tokenizer_vocab={data.tokenizer_vocab} must be <= '
    f'model.vocab_size={model.vocab_size}',
  )
  yield (
    bool(data.tokenizer) or data.tokenizer_vocab >= 512,
    f'data.tokenizer_vocab={data.tokenizer_vocab} must be >= 512: 256 bytes, '
    'the special tokens and some merges',
  )
  least, most = data.filters.min_chars, data.filters.max_chars
  yield (
    not most or least <= most,
    f'data.filters.min_chars={least} must be <= data.filters.max_chars={most}',
  )
  stride = config.eval.stride
  yield (
    stride <= data.seq_len,
    f'eval.stride={stride} must be <= data.seq_len={data.seq_len}',
  )
  most = config.sample.max_new_tokens
  yield (
    most < model.max_seq_len,
    f'sample.max_new_tokens={most} must be < '
    f'model.max_seq_len={model.max_seq_len}, to leave room for the prompt',
  )


def _batch(config: Any) -> Iterator[Rule]:
  """Rules of the batch ramp."""
  train, p = config.train, config.parallel
  micro, size = train.microbatch_size, train.batch_size
  yield (
    size % micro == 0,
    f'train.batch_size={size} must be a multiple of '
    f'train.microbatch_size={micro}: {_multiples(size, micro)}',
  )
  if not train.batch_ramp_tokens:
    return
  # The number of micro-batches must be a multiple of this in some schedules.
  growth = {'dualpipe': 2, 'interleaved': p.pipe}.get(p.schedule, 1)
  growth = micro * (growth if p.pipe > 1 else 1)
  step = train.batch_size_step
  yield (
    step % growth == 0,
    f'train.batch_size_step={step} must be a multiple of {growth}, for '
    f'parallel.schedule={p.schedule!r} and train.microbatch_size={micro}: '
    f'{_multiples(step, growth)}',
  )
  for name in ('batch_size', 'batch_size_start'):
    size = getattr(train, name)
    yield (
      size % step == 0,
      f'train.{name}={size} must be a multiple of '
      f'train.batch_size_step={step}: {_multiples(size, step)}',
    )
  yield (
    train.batch_size_start <= train.batch_size,
    f'train.batch_size_start={train.batch_size_start} must be <= '
    f'train.batch_size={train.batch_size}',
  )


def _parallel(config: Any) -> Iterator[Rule]:
  """Rules between the model, its batches and the mesh."""
  p, moe = config.parallel, config.model.moe
  yield p.model == 1, f'parallel.model={p.model} must be 1: it is not built yet'
  for rules in (_context, _fsdp, _deterministic):
    yield from rules(config)
  shards = p.data * p.node * p.expert
  micro, windows = config.train.microbatch_size, config.eval.batch_size
  yield (
    micro % shards == 0,
    f'train.microbatch_size={micro} must be a multiple of {shards} = '
    'parallel.data * parallel.node * parallel.expert: '
    f'{_multiples(micro, shards)}',
  )
  devices = shards * p.pipe
  yield (
    windows % devices == 0,
    f'eval.batch_size={windows} must be a multiple of {devices} = '
    'parallel.pipe * parallel.data * parallel.node * parallel.expert: '
    f'{_multiples(windows, devices)}',
  )
  stages_per_rank = 2 if p.schedule in ('interleaved', 'dualpipev') else 1
  stages, layers = p.pipe * stages_per_rank, config.model.num_layers
  yield (
    p.pipe == 1 or stages <= layers,
    f'parallel.pipe={p.pipe} with parallel.schedule={p.schedule!r} makes '
    f'{stages} stages, but model.num_layers={layers} and a stage needs a '
    f'layer: use at most parallel.pipe={layers // stages_per_rank}',
  )
  vocab = config.model.vocab_size
  yield (
    vocab % p.pipe == 0,
    f'parallel.pipe={p.pipe} must divide model.vocab_size={vocab}, which it '
    f'shards: {_divisors(p.pipe, vocab)}',
  )
  yield from _experts(moe, p.node, p.expert)


def _experts(moe: Any, nodes: int, devices_per_node: int) -> Iterator[Rule]:
  """Experts are sharded evenly over nodes and over the devices of a node."""
  experts, groups = moe.num_experts, moe.num_groups
  devices = nodes * devices_per_node
  yield (
    experts % devices == 0,
    f'parallel.node * parallel.expert = {devices} must divide '
    f'model.moe.num_experts={experts}: {_divisors(devices, experts)}',
  )
  yield (
    groups % nodes == 0,
    f'parallel.node={nodes} must divide model.moe.num_groups={groups}, so that '
    f'no group spans two nodes: {_divisors(nodes, groups)}',
  )


def _context(config: Any) -> Iterator[Rule]:
  """Sequences are sharded over `context` in zig-zag order, two pieces each."""
  length, pieces = config.data.seq_len, 2 * config.parallel.context
  yield (
    pieces == 2 or length % pieces == 0,
    f'data.seq_len={length} must be a multiple of {pieces} = '
    '2 * parallel.context, for each device has two pieces of a sequence: '
    f'{_multiples(length, pieces)}',
  )


def _fsdp(config: Any) -> Iterator[Rule]:
  """Rules of the axes that FSDP shards weights over."""
  p = config.parallel
  for axis in p.fsdp:
    yield (
      axis in _FSDP_AXES,
      f'parallel.fsdp={p.fsdp} must be of: {", ".join(_FSDP_AXES)}',
    )
  yield (
    len(set(p.fsdp)) == len(p.fsdp),
    f'parallel.fsdp={p.fsdp} must name each axis once',
  )
  remat = config.model.remat
  yield (
    not p.fsdp or remat != 'none',
    f'model.remat={remat!r} must be report or full with parallel.fsdp='
    f'{p.fsdp}, or every layer would save its gathered weights',
  )


def _deterministic(config: Any) -> Iterator[Rule]:
  """The deterministic mode computes each sequence on its own."""
  p, micro = config.parallel, config.train.microbatch_size
  if not p.deterministic:
    return
  for axis in ('pipe', 'context', 'model'):
    size = getattr(p, axis)
    yield size == 1, f'parallel.{axis}={size} must be 1 if deterministic'
  yield not p.fsdp, f'parallel.fsdp={p.fsdp} must be () if deterministic'
  kind = config.balance.kind
  yield (
    kind != 'batch',
    f'balance.kind={kind!r} must be another if parallel.deterministic: this '
    'loss is not a sum over sequences',
  )
  yield (
    micro & (micro - 1) == 0,
    f'train.microbatch_size={micro} must be a power of 2 if '
    'parallel.deterministic: its gradients are summed in a binary tree',
  )


def _multiples(value: int, of: int) -> str:
  """The multiples of `of` next to `value`."""
  below = value // of * of
  return ' or '.join(str(n) for n in (below, below + of) if n)


def _divisors(value: int, of: int) -> str:
  """The divisors of `of` next to `value`."""
  legal = [n for n in range(1, of + 1) if of % n == 0]
  near = [max((n for n in legal if n < value), default=0)]
  near.append(min((n for n in legal if n > value), default=0))
  return ' or '.join(str(n) for n in near if n)
