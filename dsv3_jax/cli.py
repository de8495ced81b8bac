"""The `dsv3` command: one function a subcommand, a few lines over the library.

Exit codes: 0 done; 2 bad input; 70 stuck (watchdog); 75 a signal came and the
state was saved: run again to go on; 76 non-finite loss; 77 corruption.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from dsv3_jax import config, supervise

# Heavy imports are inside the commands: `inspect` and a bad config answer
# without waiting for JAX.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand; returns the exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] not in COMMANDS:
    asked = argv[0] if argv else ''
    names = '\n'.join(
      f'  {name:9} {_first_line(run)}' for name, (run, _) in COMMANDS.items()
    )
    print(f'usage: dsv3 COMMAND [--flag=value ...]\n{names}\n')
    if asked in ('', '-h', '--help', 'help'):
      return 0 if asked else supervise.EXIT_BAD_INPUT
    return _fail(f'{asked!r} is no command of dsv3')
  run, define = COMMANDS[argv[0]]
  values = flags.FlagValues()
  flags.DEFINE_boolean('help', False, 'Show this.', flag_values=values)
  define(values)
  if '--help' in argv or '-h' in argv:
    print(f'dsv3 {argv[0]}: {run.__doc__}\n{values.get_help()}')
    return 0
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  logging.getLogger('dsv3_jax').setLevel(logging.INFO)
  try:
    rest = values([f'dsv3 {argv[0]}', *argv[1:]])[1:]
    if rest:
      raise ValueError(f'{rest[0]!r} is no flag: write --name=value')
    return run(values) or 0
  except (ValueError, flags.Error) as error:
    return _fail(str(error))
  except (AttributeError, KeyError) as error:
    # How a locked ConfigDict answers an override of a key that it lacks.
    if any(arg.startswith('--config.') for arg in argv):
      return _fail(str(error.args[0]))
    raise


def _fail(message: str) -> int:
  print('dsv3: ' + ' '.join(message.split()), file=sys.stderr)
  return supervise.EXIT_BAD_INPUT


def _first_line(run: Callable) -> str:
  return run.__doc__.splitlines()[0]


def _config_flag(values: flags.FlagValues) -> None:
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Experiment, FILE.py or FILE.py:runlocal; --config.a.b=v overrides.',
    lock_config=True,
    flag_values=values,
  )


def _read_config(values: flags.FlagValues) -> config.Config:
  if values.config is None:
    raise ValueError('--config=FILE.py is missing: see experiments/')
  try:
    return config.from_config_dict(values.config)
  except OSError as error:  # the flag tells of a file that it lacks when read
    why = str(error).splitlines()[-1].strip()
    raise ValueError(f'--config cannot be read: {why}') from error


def _define_train(values: flags.FlagValues) -> None:
  _config_flag(values)
  flags.DEFINE_string('workdir', None, 'Where all goes.', flag_values=values)


def train(values: flags.FlagValues) -> int:
  """Trains an experiment; run again, it resumes."""
  cfg = _read_config(values)
  if not values.workdir:
    raise ValueError('--workdir=DIR is missing')
  from dsv3_jax import train as loop

  try:
    loop.run(cfg, values.workdir)
  except supervise.Stopped as stopped:
    print(
      f'dsv3: stopped by a signal; step {stopped.step} is saved', flush=True
    )
    return supervise.EXIT_SAVED_ON_SIGNAL
  except FloatingPointError as error:
    step, told = error.args
    print(f'dsv3: non-finite loss at step {step}: {told}', file=sys.stderr)
    return supervise.EXIT_NON_FINITE
  except loop.CorruptionError as error:
    print(f'dsv3: {error}', file=sys.stderr)
    return supervise.EXIT_CORRUPTION
  return 0


def _define_inspect(values: flags.FlagValues) -> None:
  _config_flag(values)
  flags.DEFINE_boolean('json', False, 'One JSON object.', flag_values=values)


def inspect(values: flags.FlagValues) -> None:
  """Counts parameters, KV bytes and FLOP per token; allocates nothing."""
  from dsv3_jax.planning import flops

  cfg = _read_config(values)
  shape = (cfg.model, cfg.data.seq_len)
  told = flops.inspect_dict(*shape)
  print(json.dumps(told) if values.json else flops.render(*shape))


def _define_generate(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  flags.DEFINE_string('checkpoint', None, 'Workdir of a training run.', **add)
  flags.DEFINE_multi_string('prompt', [], 'Text; may be repeated.', **add)
  flags.DEFINE_integer('max_new_tokens', 128, 'Tokens to add at most.', **add)
  flags.DEFINE_float('temperature', 0.7, '0 is greedy.', **add)
  flags.DEFINE_float('top_p', 0.95, 'Mass of the nucleus; 1 is all.', **add)
  flags.DEFINE_integer('seed', 0, 'Of the draws.', **add)
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], '', **add)
  flags.DEFINE_boolean('json', False, 'One JSON object a prompt.', **add)


def generate(values: flags.FlagValues) -> None:
  """Continues prompts with the latent cache; prints tokens per second."""
  if not values.checkpoint:
    raise ValueError('--checkpoint=DIR is missing')
  if values.temperature < 0:
    raise ValueError(f'temperature={values.temperature} must be >= 0')
  if not 0 < values.top_p <= 1:
    raise ValueError(f'top_p={values.top_p} must be in (0, 1]')
  import dsv3_jax

  loaded = dsv3_jax.load(values.checkpoint, values.dtype)
  prompts = values.prompt or ['']
  encode = loaded.tokenizer.encode
  made = loaded.engine.generate(
    [encode(prompt, add_bos=True).tolist() for prompt in prompts],
    values.max_new_tokens,
    temperature=values.temperature,
    top_p=values.top_p,
    seed=values.seed,
    stop_id=loaded.tokenizer.eos_id,
  )
  speed = {
    'prefill_seconds': made.prefill_seconds,
    'decode_seconds': made.decode_seconds,
    'tokens_per_second': made.tokens_per_second,
  }
  for prompt, row in zip(prompts, made.tokens, strict=True):
    text = loaded.tokenizer.decode(row, skip_special=True)
    if values.json:
      print(json.dumps({'prompt': prompt, 'text': text} | speed))
    else:
      print(f'{prompt}{text}\n')
  if not values.json:
    print(f'{speed["tokens_per_second"]:.1f} tokens/s (first call: compiles)')


def _define_eval(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  flags.DEFINE_string('checkpoint', None, 'Workdir of a training run.', **add)
  flags.DEFINE_multi_string(
    'task', ['heldout', 'baselines'], 'heldout, baselines.', **add
  )
  flags.DEFINE_boolean('json', False, 'One JSON object a task.', **add)


def evaluate(values: flags.FlagValues) -> None:
  """Held-out loss and bits per byte, beside n-grams and compressors."""
  if not values.checkpoint:
    raise ValueError('--checkpoint=DIR is missing')
  import dsv3_jax
  from dsv3_jax import evaluate as evaluators
  from dsv3_jax.data import corpus

  for task in values.task:
    if task not in evaluators.EVALUATORS:
      known = ', '.join(evaluators.EVALUATORS)
      raise ValueError(f'task={task!r} must be one of: {known}')
  loaded = dsv3_jax.load(values.checkpoint)
  about = evaluators.Evaluation(
    cfg=loaded.config,
    params=loaded.params,
    router=loaded.router,
    corpus=corpus.open_corpus(loaded.config.data),
    tokenizer=loaded.tokenizer,
  )
  for task in values.task:
    told = evaluators.EVALUATORS[task](about)
    if values.json:
      print(json.dumps({'task': task} | told), flush=True)
    else:
      for name, value in told.items():
        print(f'{task:10} {name:24} {value:12.4f}', flush=True)


COMMANDS = {
  'train': (train, _define_train),
  'inspect': (inspect, _define_inspect),
  'generate': (generate, _define_generate),
  'eval': (evaluate, _define_eval),
}

if __name__ == '__main__':
  sys.exit(main())
