"""The commands that make text: generate, chat, serve."""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from absl import flags

from dsv3_jax import errors

_TOKENS = 128
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


def _engine_flags(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], '', **add)
  flags.DEFINE_integer(
    'num_drafts', 0, 'Tokens that the MTP module drafts a step.', **add
  )
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


def _sharing_flags(values: flags.FlagValues) -> None:
  about = 'The same bits whatever requests share a step; slow.'
  flags.DEFINE_boolean('invariant', False, about, flag_values=values)


def _engine_options(values: flags.FlagValues) -> dict[str, Any]:
  """What `load` takes for generation, of `_engine_flags`.

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
  from dsv3_jax.inference import balancer, layout

  how: dict[str, Any] = {'num_drafts': values.num_drafts}
  how['dtype'] = values.dtype
  if any(size > 1 for size in sizes.values()):
    how['mesh'] = layout.make_mesh(**sizes)
  if redundant or every:
    how['plan'] = balancer.Plan(redundant=redundant, every=every)
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


def _described(values: flags.FlagValues) -> tuple[Any, Any]:
  """Config and tokenizer of the model; its weights are not read.

  Raises:
    InputError: there is no such model, or it has no tokenizer.
  """
  check_checkpoint(values)
  from dsv3_jax.inference import loaded, steps
  from experiments import base

  settings = base.get_config().to_dict()
  cfg, tokenizer = loaded.described(values.checkpoint, settings)
  steps.check_drafts(cfg.model, values.num_drafts)
  if tokenizer is None:
    raise errors.InputError(
      f'there is no tokenizer.json in {values.checkpoint}'
    )
  return cfg, tokenizer


def _draw_flags(values: flags.FlagValues) -> None:
  add = {'flag_values': values}
  checkpoint_flags(values)
  about = f'Tokens to add at most; default: {_TOKENS}, if they fit.'
  flags.DEFINE_integer('max_new_tokens', None, about, **add)
  flags.DEFINE_float('temperature', 0.7, '0 is greedy.', **add)
  flags.DEFINE_float('top_p', 0.95, 'Mass of the nucleus; 1 is all.', **add)
  flags.DEFINE_integer('top_k', 0, 'Of the k likeliest; 0 is all.', **add)
  flags.DEFINE_integer('seed', 0, 'Of the draws.', **add)
  _engine_flags(values)


def _draws(values: flags.FlagValues) -> dict[str, Any]:
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


def define_generate(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  _draw_flags(values)
  _sharing_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_multi_string('prompt', [], 'Text; may be repeated.', **add)
  flags.DEFINE_string(
    'prompts', None, 'File of JSON lines with a "prompt" each.', **add
  )
  flags.DEFINE_boolean('json', False, 'One JSON object a prompt.', **add)


def generate(values: flags.FlagValues) -> None:
  """Continues prompts with the latent cache; prints tokens per second."""
  draws = _draws(values)
  prompts = list(values.prompt)
  if values.prompts:
    prompts += _read_prompts(pathlib.Path(values.prompts))
  prompts = prompts or ['']
  options = _engine_options(values)
  cfg, tokenizer = _described(values)
  encode = lambda prompt: tokenizer.encode(prompt, add_bos=True).tolist()
  ids = list(map(encode, prompts))
  from dsv3_jax.inference import engine

  room = cfg.model.max_seq_len - max(map(len, ids))
  count = values.max_new_tokens or max(min(_TOKENS, room), 1)
  engine.check_prompts(cfg.model, ids, count)
  loaded = load(values, **options)
  made = loaded.engine.generate(
    ids,
    count,
    stop_id=loaded.tokenizer.eos_id,
    invariant=values.invariant,
    **draws,
  )
  speed = {
    'prefill_seconds': made.prefill_seconds,
    'decode_seconds': made.decode_seconds,
    'tokens_per_second': made.tokens_per_second,
  }
  if values.num_drafts:
    speed['acceptance'] = made.counts.acceptance
    speed['tokens_per_step'] = made.counts.tokens_per_step
  balancer = loaded.engine.steps.balancer
  if balancer is not None and balancer.balancedness is not None:
    speed['balancedness'] = balancer.balancedness[0]
  as_json = values.json or values.prompts
  for prompt, row in zip(prompts, made.tokens, strict=True):
    text = loaded.tokenizer.decode(row, skip_special=True)
    if as_json:
      print(json.dumps({'prompt': prompt, 'text': text} | speed))
    else:
      print(f'{prompt}{text}\n')
  if not as_json:
    said = f'{made.tokens_per_second:.1f} tokens/s'
    if values.num_drafts:
      said += (
        f', {made.counts.acceptance:.0%} of drafts accepted, '
        f'{made.counts.tokens_per_step:.2f} tokens a step'
      )
    print(said)


def _read_prompts(path: pathlib.Path) -> list[str]:
  try:
    # Not `splitlines`: JSON strings may hold what else ends a line.
    lines = path.read_text(encoding='utf-8').split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise errors.InputError(f'prompts={path}: {error}') from error
  found = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise errors.InputError(f'{path}:{number} is no JSON') from error
    if not isinstance(row, dict) or not isinstance(row.get('prompt'), str):
      raise errors.InputError(
        f'{path}:{number} must be an object with a string "prompt"'
      )
    found.append(row['prompt'])
  if not found:
    raise errors.InputError(f'prompts={path} has no prompt')
  return found


def define_chat(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  _draw_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_string('system', '', 'What the model is told first.', **add)


def chat(values: flags.FlagValues) -> None:
  """Talks in the terminal; an empty line or end of input ends it."""
  with contextlib.suppress(KeyboardInterrupt):  # a way to leave it
    _chat(values)


def _chat(values: flags.FlagValues) -> None:
  draws = _draws(values)
  options = _engine_options(values)
  cfg, tokenizer = _described(values)
  from dsv3_jax.inference import batching, talk

  asked = [*talk.opening(values.system), {'role': 'user', 'content': ''}]
  first = talk.encode(tokenizer, asked)
  name = 'the prompt, before a word is said,'
  batching.check_prompt(cfg.model, first, values.max_new_tokens or 1, name)
  loaded = load(values, **options)
  draw = batching.Draw(**draws)
  conversation = talk.Conversation(
    loaded, draw, values.max_new_tokens or _TOKENS, values.system
  )
  is_terminal = sys.stdin.isatty()
  while True:
    if is_terminal:
      print('> ', end='', flush=True)
    try:
      line = sys.stdin.readline().strip()
    except UnicodeDecodeError as error:
      raise errors.InputError(f'what was said is no text: {error}') from error
    if not line:
      return
    for piece in _shown(conversation.say(line), sys.stdout.isatty()):
      print(piece, end='', flush=True)
    print(flush=True)


def _shown(
  pieces: Iterable[tuple[bool, str]], is_terminal: bool
) -> Iterator[str]:
  """Thoughts are dim on a terminal, and in their tags elsewhere."""
  inside = False
  for is_thought, piece in pieces:
    if is_terminal:
      yield f'\x1b[2m{piece}\x1b[0m' if is_thought else piece
      continue
    if is_thought != inside:
      yield '<think>' if is_thought else '</think>'
    inside = is_thought
    yield piece
  if inside:
    yield '</think>'


def define_serve(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  checkpoint_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.', **add)
  flags.DEFINE_integer('port', 8000, 'Port to listen on; 0: any.', **add)
  flags.DEFINE_string('name', '', 'Of the model; default: its folder.', **add)
  flags.DEFINE_integer(
    'max_rows', 16, 'Requests that run at a time, on each rank.', **add
  )
  flags.DEFINE_integer('max_waiting', 256, 'Requests that wait.', **add)
  flags.DEFINE_integer('max_tokens', 4096, 'Of an answer at most.', **add)
  flags.DEFINE_integer(
    'cache_tokens',
    0,
    'Places of the cache of each rank; 0: two full rows.',
    **add,
  )
  flags.DEFINE_boolean('warm_up', True, 'Compile before it is ready.', **add)
  _engine_flags(values)
  _sharing_flags(values)


def serve(values: flags.FlagValues) -> None:
  """An OpenAI-compatible server; DSV3_API_KEY is the key, if it is set."""
  for name in ('max_rows', 'max_waiting', 'max_tokens'):
    if values[name].value < 1:
      raise errors.InputError(f'{name}={values[name].value} must be >= 1')
  if not 0 <= values.port < 2**16:
    raise errors.InputError(f'port={values.port} must be in [0, 65536)')
  if values.cache_tokens < 0:
    raise errors.InputError(f'cache_tokens={values.cache_tokens} must be >= 0')
  key = os.environ.get('DSV3_API_KEY')
  if key == '':
    raise errors.InputError('DSV3_API_KEY is empty: unset it to ask for no key')
  for named, text in (('DSV3_API_KEY', key), ('name', values.name)):
    if not (text or '').isprintable():  # as are bytes that are no UTF-8
      raise errors.InputError(f'{named} must have printable characters only')
  if not values.host:
    raise errors.InputError('--host=ADDRESS is empty: 0.0.0.0 or :: are all')
  options = _engine_options(values)
  _described(values)
  from dsv3_jax.inference import serving

  with serving.bind(values.host, values.port) as bound:
    serving.run(
      load(values, **options),
      bound,
      name=values.name or pathlib.Path(values.checkpoint).resolve().name,
      cache_tokens=values.cache_tokens,
      max_rows=values.max_rows,
      max_waiting=values.max_waiting,
      max_tokens=values.max_tokens,
      api_key=key or '',
      warm_up=values.warm_up,
      invariant=values.invariant,
    )
