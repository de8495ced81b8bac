"""Flags of the commands that load a model, and options made from them."""

import pathlib
import sys
from typing import Any

from absl import flags

from dsv3_jax import errors

DEFAULT_TOKENS = 128
# Of `generate` and `chat`; `generation_config.json` goes before these, and
# flags before both.
_SAMPLING = {
  'temperature': 0.7,
  'top_p': 0.95,
  'top_k': 0,
  'min_p': 0.0,
  'repetition_penalty': 1.0,
}
SAMPLING_FLAGS = (*_SAMPLING, 'seed')
_AXES = {  # of a mesh
  'data': 'requests',
  'node': 'requests and whole groups of experts',
  'expert': 'requests and experts',
  'model': 'attention heads and the width of FFNs',
}
# Old flags, accepted until the next release.
_RENAMED = {
  'num_drafts': 'num_speculative_tokens',
  'invariant': 'batch_invariant',
}


def checkpoint_flags(values: flags.FlagValues) -> None:
  """Flags that choose the weights."""
  add = {'flag_values': values}
  flags.DEFINE_string('checkpoint', None, 'Workdir of a training run.', **add)
  flags.DEFINE_integer('step', -1, 'Committed step; -1: the newest.', **add)
  flags.DEFINE_boolean('ema', False, 'Load the average of the weights.', **add)


def load(
  values: flags.FlagValues, dtype: str = 'float32', **options: Any
) -> Any:
  """The model that `checkpoint_flags` name; see `dsv3_jax.load`."""
  check_checkpoint(values)
  import dsv3_jax

  options |= {'step': values.step, 'ema': values.ema}
  return dsv3_jax.load(values.checkpoint, dtype, **options)


def engine_flags(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], '', **add)
  about = 'Tokens that the MTP module drafts a step.'
  flags.DEFINE_integer('num_speculative_tokens', 0, about, **add)
  about = 'Old name of --num_speculative_tokens.'
  flags.DEFINE_integer('num_drafts', None, about, **add)
  about = 'Store latents in FP8: less memory, other roundings.'
  flags.DEFINE_boolean('fp8_cache', False, about, **add)
  for axis, dims in _AXES.items():
    about = f'Devices over which {dims} are sharded.'
    flags.DEFINE_integer(f'parallel.{axis}', 1, about, **add)
  flags.DEFINE_integer(
    'redundant_experts', 0, 'Redundant experts: slots for replicas.', **add
  )
  about = 'Steps from one rebalance of experts to the next; 0: never.'
  flags.DEFINE_integer('rebalance_every', 0, about, **add)


def sharing_flags(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  about = 'The same bits whatever requests share a step; slow.'
  flags.DEFINE_boolean('batch_invariant', False, about, **add)
  about = 'Old name of --batch_invariant.'
  flags.DEFINE_boolean('invariant', None, about, **add)


def apply_old_flags(values: flags.FlagValues) -> None:
  """Sets flags that were given by their old names; warns in one line each.

  Raises:
    InputError: a flag is given by both names.
  """
  for old, new in _RENAMED.items():
    if old not in values or values[old].value is None:
      continue
    if values[new].present:
      raise errors.InputError(f'--{old} is the old name of --{new}: give one')
    print(f'dsv3: --{old} is deprecated: use --{new}', file=sys.stderr)
    values[new].value = values[old].value
    values[old].value = None


def engine_options(values: flags.FlagValues) -> dict[str, Any]:
  """Options of `load` for generation, from `engine_flags`.

  Raises:
    InputError: a flag is out of range, or there are too few devices.
  """
  apply_old_flags(values)
  sizes = {axis: values[f'parallel.{axis}'].value for axis in _AXES}
  for axis, size in sizes.items():
    if size < 1:
      raise errors.InputError(f'parallel.{axis}={size} must be >= 1')
  redundant, every = values.redundant_experts, values.rebalance_every
  for name in ('redundant_experts', 'rebalance_every'):
    if values[name].value < 0:
      raise errors.InputError(f'{name}={values[name].value} must be >= 0')
  if redundant and not every:
    raise errors.InputError(
      f'redundant_experts={redundant} needs rebalance_every: which experts are '
      'busy is not known before they run'
    )
  from dsv3_jax.inference import mesh as inference_mesh
  from dsv3_jax.inference import redundant_experts

  options: dict[str, Any] = {
    'num_speculative_tokens': values.num_speculative_tokens,
    'dtype': values.dtype,
    'fp8_cache': values.fp8_cache,
  }
  if any(size > 1 for size in sizes.values()):
    options['mesh'] = inference_mesh.make_mesh(**sizes)
  if redundant or every:
    options['redundancy'] = redundant_experts.RedundancyConfig(
      redundant=redundant, every=every
    )
  return options


def check_checkpoint(values: flags.FlagValues) -> None:
  """Checks `checkpoint_flags`, without reading from the disk.

  Raises:
    InputError: a flag is missing or out of range.
  """
  if not values.checkpoint:
    raise errors.InputError('--checkpoint=DIR is missing')
  if values.step < -1:
    raise errors.InputError(f'step={values.step} must be >= -1')


def read_config(values: flags.FlagValues) -> tuple[Any, Any]:
  """Config and tokenizer of the model; does not read its weights.

  Raises:
    InputError: there is no such model, or it has no tokenizer.
  """
  check_checkpoint(values)
  from dsv3_jax.checkpoint import source
  from dsv3_jax.inference import model_runner
  from experiments import base

  settings = base.get_config().to_dict()
  cfg, tokenizer = source.describe(values.checkpoint, settings)
  num_tokens = values.num_speculative_tokens
  model_runner.check_num_speculative_tokens(cfg.model, num_tokens)
  if tokenizer is None:
    raise errors.InputError(
      f'there is no tokenizer.json in {values.checkpoint}'
    )
  return cfg, tokenizer


def sampling_flags(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  checkpoint_flags(values)
  about = f'Tokens to add at most; default: {DEFAULT_TOKENS}, if they fit.'
  flags.DEFINE_integer('max_new_tokens', None, about, **add)
  about = {
    'temperature': '0 is greedy.',
    'top_p': 'Probability mass of the nucleus; 1 is all.',
    'top_k': 'Sample of the k likeliest; 0 is all.',
    'min_p': 'Least probability, as a share of the likeliest; 0 is all.',
    'repetition_penalty': 'Of the tokens so far; 1 is none.',
  }
  for name, default in _SAMPLING.items():
    define = flags.DEFINE_integer if name == 'top_k' else flags.DEFINE_float
    rule = f'Default: as the model says, else {default}.'
    define(name, None, f'{about[name]} {rule}', **add)
  flags.DEFINE_integer('seed', 0, 'Of the random numbers.', **add)
  engine_flags(values)


def check_sampling(values: flags.FlagValues) -> None:
  """Checks `sampling_flags`, without reading from the disk.

  Raises:
    InputError: a flag is out of range.
  """
  rules = {
    'max_new_tokens': ('>= 1', lambda x: x >= 1),
    'temperature': ('>= 0 and finite', lambda x: 0 <= x < float('inf')),
    'top_p': ('in (0, 1]', lambda x: 0 < x <= 1),
    'top_k': ('in [0, 2**31)', lambda x: 0 <= x < 2**31),
    'min_p': ('in [0, 1]', lambda x: 0 <= x <= 1),
    'repetition_penalty': ('in [0.01, 100]', lambda x: 0.01 <= x <= 100),
    'seed': ('in [0, 2**32)', lambda x: 0 <= x < 2**32),
  }
  for name, (rule, holds) in rules.items():
    value = values[name].value
    if value is not None and not holds(value):
      raise errors.InputError(f'{name}={value} must be {rule}')


def sampling_options(values: flags.FlagValues) -> dict[str, Any]:
  """Fields of a `request.SamplingParams`: flags, else defaults of the model.

  Raises:
    InputError: `generation_config.json` is damaged.
  """
  from dsv3_jax.checkpoint.hf import generation_config

  directory = pathlib.Path(values.checkpoint)
  defaults = _SAMPLING | generation_config.read(directory).sampling
  given = {name: values[name].value for name in SAMPLING_FLAGS}
  return defaults | {k: v for k, v in given.items() if v is not None}
