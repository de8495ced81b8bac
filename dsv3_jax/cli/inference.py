"""The commands that make text: generate, chat, serve."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator

from absl import flags

from dsv3_jax import errors
from dsv3_jax.cli import engine_flags

_SAY_SECONDS = 10.0  # between two words of how far a long list is
# What a line of a file of prompts may not have: it is one for all, or made.
_OF_ALL = ('max_new_tokens', 'temperature', 'top_k', 'top_p', 'seed')
_MADE = ('text', 'tokens')


def define_generate(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  engine_flags.draw_flags(values)
  engine_flags.sharing_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_multi_string('prompt', [], 'Text; may be repeated.', **add)
  flags.DEFINE_string(
    'prompts', None, 'File of JSON lines with a "prompt" each.', **add
  )
  about = 'One JSON object a prompt, as with --prompts.'
  flags.DEFINE_boolean('json', False, about, **add)


def generate(values: flags.FlagValues) -> None:
  """Continues prompts with the latent cache; prints tokens per second."""
  draws = engine_flags.draws(values)
  rows = [{'prompt': prompt} for prompt in values.prompt]
  if values.prompts:
    rows += _read_prompts(pathlib.Path(values.prompts))
  rows = rows or [{'prompt': ''}]
  options = engine_flags.engine_options(values)
  cfg, tokenizer = engine_flags.described(values)
  encode = lambda row: tokenizer.encode(row['prompt'], add_bos=True).tolist()
  ids = list(map(encode, rows))
  from dsv3_jax.inference import generate

  room = cfg.model.max_seq_len - max(map(len, ids))
  count = values.max_new_tokens or max(
    min(engine_flags.DEFAULT_TOKENS, room), 1
  )
  generate.check_prompts(cfg.model, ids, count)
  loaded = engine_flags.load(values, **options)
  as_json = values.json or bool(values.prompts)
  made = loaded.engine.generate(
    ids,
    count,
    stop_id=loaded.tokenizer.eos_id,
    invariant=values.invariant,
    tell=_printer(rows, loaded.tokenizer, as_json),
    **draws,
  )
  speed = _speed(values, loaded, made)
  print(json.dumps(speed) if as_json else _in_words(speed), file=sys.stderr)


def _printer(rows: list[dict], tokenizer, as_json: bool):
  """Prints each continuation, and now and then how many there are."""
  said = begun = time.monotonic()

  def tell(number: int, tokens: list[int]) -> None:
    nonlocal said
    text = tokenizer.decode(tokens, skip_special=True)
    if as_json:
      made = rows[number] | {'text': text, 'tokens': len(tokens)}
      print(json.dumps(made), flush=True)
    else:
      print(f'{rows[number]["prompt"]}{text}\n', flush=True)
    now, left = time.monotonic(), len(rows) - number - 1
    if left and now - said > _SAY_SECONDS:
      said = now
      about = f'{number + 1} of {len(rows)} prompts in {now - begun:.0f} s'
      print(about, file=sys.stderr, flush=True)

  return tell


def _speed(values: flags.FlagValues, loaded, made) -> dict[str, float]:
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
  return speed


def _in_words(speed: dict[str, float]) -> str:
  said = f'{speed["tokens_per_second"]:.1f} tokens/s'
  if 'acceptance' in speed:
    said += (
      f', {speed["acceptance"]:.0%} of drafts accepted, '
      f'{speed["tokens_per_step"]:.2f} tokens a step'
    )
  return said


def _read_prompts(path: pathlib.Path) -> list[dict]:
  """The objects of a file, each with a "prompt", and with what else it has."""
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
    for name in (*_OF_ALL, *_MADE):
      if name in row:
        rule = f'--{name} sets it for all prompts'
        rule = 'what is made has that name' if name in _MADE else rule
        raise errors.InputError(f'{path}:{number} has "{name}": {rule}')
    found.append(row)
  if not found:
    raise errors.InputError(f'prompts={path} has no prompt')
  return found


def define_chat(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  engine_flags.draw_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_string('system', '', 'What the model is told first.', **add)


def chat(values: flags.FlagValues) -> None:
  """Talks in the terminal; an empty line or end of input ends it."""
  with contextlib.suppress(KeyboardInterrupt):  # a way to leave it
    _chat(values)


def _chat(values: flags.FlagValues) -> None:
  draws = engine_flags.draws(values)
  options = engine_flags.engine_options(values)
  cfg, tokenizer = engine_flags.described(values)
  from dsv3_jax.inference import chat, engine

  asked = [*chat.opening(values.system), {'role': 'user', 'content': ''}]
  first = chat.encode(tokenizer, asked)
  name = 'the prompt, before a word is said,'
  engine.check_prompt(cfg.model, first, values.max_new_tokens or 1, name)
  loaded = engine_flags.load(values, **options)
  draw = engine.Draw(**draws)
  conversation = chat.Conversation(
    loaded,
    draw,
    values.max_new_tokens or engine_flags.DEFAULT_TOKENS,
    values.system,
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
  engine_flags.checkpoint_flags(values)
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
  engine_flags.engine_flags(values)
  engine_flags.sharing_flags(values)


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
  options = engine_flags.engine_options(values)
  engine_flags.described(values)
  from dsv3_jax.server import main as server_main

  with server_main.bind(values.host, values.port) as bound:
    server_main.run(
      engine_flags.load(values, **options),
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
