"""Flags of the commands that load a model, and what they say of it."""

from typing import Any

from absl import flags

from dsv3_jax import errors

DEFAULT_TOKENS = 128
_AXES = {  # of a mesh
  'data': 'requests alone',
  'node': 'requests and experts, by whole groups of experts',
  'expert': 'requests and experts',
  'model': 'heads and the width of FFNs',
}


def checkpoint_flags(values: flags.FlagValues) -> None:
  """Which weights."""
  add = {'flag_values': values}
  flags.DEFINE_string('checkpoint', None, 'Workdir of a training run.', **add)
  flags.DEFINE_integer('step', -1, 'Committed step; -1: the newest.', **add)
  flags.DEFINE_boolean('ema', False, 'The average of the weights.', **add)


def load(values: flags.FlagValues, dtype: str = 'float32', **how: Any) -> Any:
  """The model that `checkpoint_flags` name; see `dsv3_jax.load`."""
  check_checkpoint(values)
  import dsv3_jax

  how |= {'step': values.step, 'ema': values.ema}
  return dsv3_jax.load(values.checkpoint, dtype, **how)


def engine_flags(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], '', **add)
  flags.DEFINE_integer(
    'num_drafts', 0, 'Tokens that the MTP module drafts a step.', **add
  )
  about = 'Keep latents in FP8: less memory, other roundings.'
  flags.DEFINE_boolean('fp8_cache', False, about, **add)
  for axis, cut in _AXES.items():
    name, about = f'parallel.{axis}', f'Devices over which it cuts {cut}.'
    flags.DEFINE_integer(name, 1, about, **add)
  flags.DEFINE_integer(
    'redundant_experts', 0, 'Slots for copies of busy experts.', **add
  )
  flags.DEFINE_integer(
    'rebalance_every',
    0,
    'Steps until experts are placed anew; 0: never.',
    **add,
  )


def sharing_flags(values: flags.FlagValues) -> None:
  about = 'The same bits whatever requests share a step; slow.'
  flags.DEFINE_boolean('invariant', False, about, flag_values=values)


def engine_options(values: flags.FlagValues) -> dict[str, Any]:
  """What `load` takes for generation, of `engine_flags`.

  Raises:
    InputError: one is out of range, or more devices are asked for than are.
  """
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

  how: dict[str, Any] = {'num_drafts': values.num_drafts}
  how |= {'dtype': values.dtype, 'fp8_cache': values.fp8_cache}
  if any(size > 1 for size in sizes.values()):
    how['mesh'] = inference_mesh.make_mesh(**sizes)
  if redundant or every:
    how['plan'] = redundant_experts.RedundancyConfig(
      redundant=redundant, every=every
    )
  return how


def check_checkpoint(values: flags.FlagValues) -> None:
  """What can be known of `checkpoint_flags` without a look at the disk.

  Raises:
    InputError: one is missing or out of range.
  """
  if not values.checkpoint:
    raise errors.InputError('--checkpoint=DIR is missing')
  if values.step < -1:
    raise errors.InputError(f'step={values.step} must be >= -1')


def described(values: flags.FlagValues) -> tuple[Any, Any]:
  """Config and tokenizer of the model; its weights are not read.

  Raises:
    InputError: there is no such model, or it has no tokenizer.
  """
  check_checkpoint(values)
  from dsv3_jax.checkpoint import source
  from dsv3_jax.inference import model_runner
  from experiments import base

  settings = base.get_config().to_dict()
  cfg, tokenizer = source.describe(values.checkpoint, settings)
  model_runner.check_drafts(cfg.model, values.num_drafts)
  if tokenizer is None:
    raise errors.InputError(
      f'there is no tokenizer.json in {values.checkpoint}'
    )
  return cfg, tokenizer


def draw_flags(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  checkpoint_flags(values)
  about = f'Tokens to add at most; default: {DEFAULT_TOKENS}, if they fit.'
  flags.DEFINE_integer('max_new_tokens', None, about, **add)
  flags.DEFINE_float('temperature', 0.7, '0 is greedy.', **add)
  flags.DEFINE_float('top_p', 0.95, 'Mass of the nucleus; 1 is all.', **add)
  flags.DEFINE_integer('top_k', 0, 'Of the k likeliest; 0 is all.', **add)
  flags.DEFINE_integer('seed', 0, 'Of the draws.', **add)
  engine_flags(values)


def draws(values: flags.FlagValues) -> dict[str, Any]:
  """Checked fields of a `batching.Draw`."""
  if values.max_new_tokens is not None and values.max_new_tokens < 1:
    raise errors.InputError(
      f'max_new_tokens={values.max_new_tokens} must be >= 1'
    )
  if not 0 <= values.temperature < float('inf'):
    raise errors.InputError(
      f'temperature={values.temperature} must be >= 0 and finite'
    )
  if not 0 <= values.seed < 2**32:
    raise errors.InputError(f'seed={values.seed} must be in [0, 2**32)')
  if not 0 < values.top_p <= 1:
    raise errors.InputError(f'top_p={values.top_p} must be in (0, 1]')
  if not 0 <= values.top_k < 2**31:
    raise errors.InputError(f'top_k={values.top_k} must be in [0, 2**31)')
  return {k: values[k].value for k in ('temperature', 'top_k', 'top_p', 'seed')}
