"""`dsv3 export`, `import` and `manifest`: exchange with PyTorch."""

import functools
import pathlib

from absl import flags

from dsv3_jax import errors
from dsv3_jax.cli import engine_flags, experiment_flags

_DTYPES = ['float32', 'bfloat16', 'fp8']
_GGUF_DTYPES = ['float32', 'bfloat16', 'q8_0']


def define_export(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  engine_flags.checkpoint_flags(values)
  add = {'flag_values': values}
  about = "'hf': for PyTorch; 'gguf': for llama.cpp."
  flags.DEFINE_enum('format', 'hf', ['hf', 'gguf'], about, **add)
  about = 'Folder (hf) or file (gguf) to write; it must not exist.'
  flags.DEFINE_string('output', None, about, **add)
  about = 'Dtype of matrices; fp8 is for hf, q8_0 for gguf.'
  flags.DEFINE_enum('dtype', 'bfloat16', [*_DTYPES, 'q8_0'], about, **add)
  about = (
    'With the MTP modules; --no-mtp for readers that refuse their tensors. A '
    'gguf file has none.'
  )
  flags.DEFINE_boolean('mtp', True, about, **add)
  about = 'Maximum size of a file [GB, 1e9 bytes]; hf only.'
  flags.DEFINE_float('shard_gb', 5.0, about, **add)


def export(values: flags.FlagValues) -> None:
  """Writes a checkpoint for PyTorch or llama.cpp, tensor by tensor."""
  for name in ('checkpoint', 'output'):
    if not values[name].value:
      raise errors.InputError(f'--{name}=DIR is missing')
  known = _GGUF_DTYPES if values.format == 'gguf' else _DTYPES
  if values.dtype not in known:
    raise errors.InputError(
      f'--dtype={values.dtype} with --format={values.format} must be one of: '
      f'{", ".join(known)}'
    )
  if not values.shard_gb > 0:
    raise errors.InputError(f'shard_gb={values.shard_gb} must be > 0')
  if values.format == 'gguf' and values['shard_gb'].present:
    raise errors.InputError('--shard_gb is for --format=hf: GGUF is one file')
  write = _export_gguf if values.format == 'gguf' else _export_hf
  write(values, pathlib.Path(values.checkpoint))


def _export_hf(values: flags.FlagValues, directory: pathlib.Path) -> None:
  from dsv3_jax.checkpoint import source
  from dsv3_jax.checkpoint.hf import exporter, kept_files
  from experiments import base

  options = {'step': values.step, 'ema': values.ema, 'keep_fp8': True}
  settings = base.get_config().to_dict()
  with source.open_source(directory, settings, **options) as (cfg, leaves):
    tokenizer = source.read_tokenizer(directory)
    length = cfg.model.max_seq_len
    if not values.mtp:
      cfg, leaves = exporter.without_mtp(cfg, leaves)
    exporter.export(
      cfg,
      leaves,
      values.output,
      dtype=values.dtype,
      shard_bytes=int(values.shard_gb * 1e9),
      documents=kept_files.documents(directory, tokenizer, length),
      source=source.mark(directory, values.step, values.ema),
      progress=functools.partial(print, flush=True),
    )


def _export_gguf(values: flags.FlagValues, directory: pathlib.Path) -> None:
  from dsv3_jax.checkpoint import source
  from experiments import base

  try:
    from dsv3_jax.checkpoint.gguf import exporter
  except ModuleNotFoundError as error:
    raise errors.InputError(
      f'--format=gguf needs the package {error.name}: pip install '
      "'dsv3-jax[gguf]'"
    ) from error
  settings = base.get_config().to_dict()
  options = {'step': values.step, 'ema': values.ema}
  with source.open_source(directory, settings, **options) as (cfg, leaves):
    if (tokenizer := source.read_tokenizer(directory)) is None:
      raise errors.InputError(
        f'{directory} has no tokenizer.json, which a GGUF file holds as well'
      )
    exporter.export(
      cfg,
      leaves,
      values.output,
      tokenizer=tokenizer,
      dtype=values.dtype,
      progress=functools.partial(print, flush=True),
    )


def define_import(values: flags.FlagValues, argv: list[str]) -> None:
  experiment_flags.define(values, argv)
  add = {'flag_values': values}
  flags.DEFINE_string('hf', None, 'Hugging Face folder to read.', **add)
  flags.DEFINE_string(
    'output', None, 'Workdir to write; it must not exist.', **add
  )
  about = "Dtype of stored matrices; 'fp8' keeps FP8 tensors as they are."
  flags.DEFINE_enum('dtype', 'float32', _DTYPES, about, **add)


def import_(values: flags.FlagValues) -> None:
  """Makes a workdir from a Hugging Face folder; --config has the rest."""
  for name in ('hf', 'output'):
    if not values[name].value:
      raise errors.InputError(f'--{name}=DIR is missing')
  from dsv3_jax.checkpoint.hf import importer
  from experiments import base

  source = base.get_config() if values.config is None else values.config
  settings = source.to_dict()
  importer.to_workdir(values.hf, values.output, settings, values.dtype)
  print(f'{values.output} holds step 0')


def define_manifest(values: flags.FlagValues, argv: list[str]) -> None:
  experiment_flags.define(values, argv)
  experiment_flags.define_hf(values)
  add = {'flag_values': values}
  about = 'Dtype of matrices.'
  flags.DEFINE_enum('dtype', 'bfloat16', _DTYPES, about, **add)


def manifest(values: flags.FlagValues) -> None:
  """Prints name, dtype and shape of every tensor of an export."""
  from dsv3_jax.checkpoint.hf import exporter

  cfg = experiment_flags.read_any(values)
  for spec in exporter.manifest(cfg, values.dtype):
    shape = 'x'.join(map(str, spec.shape))
    print(f'{spec.name}\t{spec.dtype}\t{shape}')
