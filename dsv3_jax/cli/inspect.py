"""`dsv3 inspect` and `dsv3 eval`: the size of a model, and its quality."""

import json

from absl import flags

from dsv3_jax import errors
from dsv3_jax.cli import engine_flags, experiment_flags


def define_inspect(values: flags.FlagValues, argv: list[str]) -> None:
  experiment_flags.define(values, argv)
  experiment_flags.define_hf(values)
  flags.DEFINE_boolean('json', False, 'Print JSON.', flag_values=values)
  about = 'Print the sharding of each array on the mesh of config.parallel.'
  flags.DEFINE_boolean('sharding', False, about, flag_values=values)


def inspect(values: flags.FlagValues) -> None:
  """Counts parameters, bytes and FLOP per token; allocates nothing."""
  from dsv3_jax import precision
  from dsv3_jax.planning import flops, memory

  cfg = experiment_flags.read_any(values)
  if values.sharding:
    from dsv3_jax.parallel import sharding_report

    print(sharding_report.render(cfg, as_json=values.json))
    return
  shape = (cfg.model, cfg.data.seq_len)
  kept = (cfg.model, precision.POLICIES[cfg.precision])
  if values.json:
    print(json.dumps(flops.inspect_dict(*shape) | memory.inspect_dict(*kept)))
  else:
    print(f'{flops.render(*shape)}\n\n{memory.render(*kept)}')


def define_eval(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  engine_flags.checkpoint_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_multi_string(
    'task',
    ['heldout', 'baselines'],
    'heldout or baselines; repeat for both.',
    **add,
  )
  flags.DEFINE_boolean(
    'json', False, 'Print one JSON object for each task.', **add
  )


def evaluate(values: flags.FlagValues) -> None:
  """Prints held-out loss and bits per byte in f32, and those of baselines."""
  from dsv3_jax.data import corpus
  from dsv3_jax.training import evaluate

  for task in values.task:
    if task not in evaluate.EVALUATORS:
      known = ', '.join(evaluate.EVALUATORS)
      raise errors.InputError(f'task={task!r} must be one of: {known}')
  loaded = engine_flags.load(values)
  text = corpus.open_corpus(loaded.config.data)
  about = evaluate.Evaluation(
    cfg=loaded.config,
    params=loaded.params,
    router_biases=loaded.router_biases,
    corpus=text,
    tokenizer=loaded.tokenizer,
    windows=evaluate.open_windows(loaded.config, text, loaded.tokenizer),
  )
  for task in values.task:
    metrics = evaluate.EVALUATORS[task](about)
    if values.json:
      print(json.dumps({'task': task} | metrics), flush=True)
    else:
      for name, value in metrics.items():
        print(f'{task:10} {name:24} {value:12.4f}', flush=True)
