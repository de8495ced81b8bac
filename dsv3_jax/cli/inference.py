"""The commands that generate text: generate, chat, serve."""

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

_PROGRESS_SECONDS = 10.0  # between two lines about the progress
# Keys that a line of --prompts may not have: flags set them for all prompts, or
# the output has them.
_FLAG_KEYS = ('max_new_tokens', *engine_flags.SAMPLING_FLAGS)
_OUTPUT_KEYS = ('text', 'tokens')


def define_generate(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  engine_flags.sampling_flags(values)
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
  engine_flags.check_sampling(values)
  rows = [{'prompt': prompt} for prompt in values.prompt]
  if values.prompts:
    rows += _read_prompts(pathlib.Path(values.prompts))
  rows = rows or [{'prompt': ''}]
  options = engine_flags.engine_options(values)
  cfg, tokenizer = engine_flags.read_config(values)
  sampling = engine_flags.sampling_options(values)
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
  output = generate.generate(
    loaded.runner,
    ids,
    count,
    stop_id=loaded.tokenizer.eos_ids,
    batch_invariant=values.batch_invariant,
    on_finished=_printer(rows, loaded.tokenizer, as_json),
    **sampling,
  )
  speed = _speed(values, output)
  print(json.dumps(speed) if as_json else _in_words(speed), file=sys.stderr)


def _printer(rows: list[dict], tokenizer, as_json: bool):
  """A function that prints each continuation, and now and then the progress."""
  printed = start = time.monotonic()

  def on_finished(number: int, tokens: list[int]) -> None:
    nonlocal printed
    text = tokenizer.decode_answer(tokens)
    if as_json:
      row = rows[number] | {'text': text, 'tokens': len(tokens)}
      print(json.dumps(row), flush=True)
    else:
      print(f'{rows[number]["prompt"]}{text}\n', flush=True)
    now, left = time.monotonic(), len(rows) - number - 1
    if left and now - printed > _PROGRESS_SECONDS:
      printed = now
      about = f'{number + 1} of {len(rows)} prompts in {now - start:.0f} s'
      print(about, file=sys.stderr, flush=True)

  return on_finished


def _speed(values: flags.FlagValues, output) -> dict[str, float]:
  """What the last line of stderr says, from a `generate.Generation`."""
  speed = {
    'prefill_seconds': output.prefill_seconds,
    'decode_seconds': output.decode_seconds,
    'tokens_per_second': output.tokens_per_second,
  }
  if values.num_speculative_tokens:
    speed['acceptance'] = output.stats.acceptance
    speed['tokens_per_step'] = output.stats.tokens_per_step
  if output.stats.balancedness is not None:
    speed['balancedness'] = output.stats.balancedness
  return speed


def _in_words(speed: dict[str, float]) -> str:
  words = f'{speed["tokens_per_second"]:.1f} tokens/s'
  if 'acceptance' in speed:
    words += (
      f', {speed["acceptance"]:.0%} of speculative tokens accepted, '
      f'{speed["tokens_per_step"]:.2f} tokens a step'
    )
  return words


def _read_prompts(path: pathlib.Path) -> list[dict]:
  """The objects of a file; each has a "prompt" and perhaps other keys."""
  try:
    # Not `splitlines`: it would split at characters that JSON strings may hold.
    lines = path.read_text(encoding='utf-8').split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise errors.InputError(f'prompts={path}: {error}') from error
  rows = []
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
    for name in (*_FLAG_KEYS, *_OUTPUT_KEYS):
      if name in row:
        rule = f'--{name} sets it for all prompts'
        rule = 'the output has this key' if name in _OUTPUT_KEYS else rule
        raise errors.InputError(f'{path}:{number} has "{name}": {rule}')
    rows.append(row)
  if not rows:
    raise errors.InputError(f'prompts={path} has no prompt')
  return rows


def define_chat(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  engine_flags.sampling_flags(values)
  add = {'flag_values': values}
  flags.DEFINE_string('system', '', 'The system message.', **add)
  about = 'JSON object of variables of the chat template: {"thinking": true}.'
  flags.DEFINE_string('chat_template_kwargs', '{}', about, **add)


def chat(values: flags.FlagValues) -> None:
  """A chat in the terminal, until an empty line or the end of the input."""
  with contextlib.suppress(KeyboardInterrupt):  # one way to leave
    _chat(values)


def _chat(values: flags.FlagValues) -> None:
  engine_flags.check_sampling(values)
  variables = _template_variables(values.chat_template_kwargs)
  options = engine_flags.engine_options(values)
  cfg, tokenizer = engine_flags.read_config(values)
  sampling = engine_flags.sampling_options(values)
  from dsv3_jax.inference import chat
  from dsv3_jax.inference import request as requests

  messages = [
    *chat.initial_messages(values.system),
    {'role': 'user', 'content': ''},
  ]
  first = tokenizer.apply_chat_template(messages, **variables).ids
  name = 'the prompt, before a word is said,'
  requests.check_prompt(cfg.model, first, values.max_new_tokens or 1, name)
  loaded = engine_flags.load(values, **options)
  conversation = chat.Conversation(
    loaded,
    requests.SamplingParams(**sampling),
    values.max_new_tokens or engine_flags.DEFAULT_TOKENS,
    values.system,
    variables,
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
    for piece in shown_pieces(conversation.say(line), sys.stdout.isatty()):
      print(piece, end='', flush=True)
    print(flush=True)


def _template_variables(text: str) -> dict:
  """The object in --chat_template_kwargs; it sets no messages."""
  name = f'chat_template_kwargs={text!r}'
  try:
    variables = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise errors.InputError(f'{name} must be JSON: {error}') from error
  reserved = {'messages', 'tools', 'add_generation_prompt'}
  if not isinstance(variables, dict) or reserved & variables.keys():
    raise errors.InputError(
      f'{name} must be an object without {", ".join(sorted(reserved))}'
    )
  return variables


def shown_pieces(
  pieces: Iterable[tuple[bool, str]], is_terminal: bool
) -> Iterator[str]:
  """Text to print: thoughts are dim on a terminal, elsewhere in tags."""
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
  flags.DEFINE_string(
    'name', '', 'Name of the model; default: its folder.', **add
  )
  flags.DEFINE_integer(
    'max_rows', 16, 'Requests that run at a time, on each rank.', **add
  )
  flags.DEFINE_integer('max_waiting', 256, 'Requests that may wait.', **add)
  flags.DEFINE_integer('max_tokens', 4096, 'Most tokens of an answer.', **add)
  flags.DEFINE_integer(
    'cache_tokens',
    0,
    'Size of the cache of each rank; 0: two full rows.',
    **add,
  )
  flags.DEFINE_boolean(
    'warm_up', True, 'Compile before the server is ready.', **add
  )
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
    if not (text or '').isprintable():  # bytes that are no UTF-8 are not
      raise errors.InputError(f'{named} must have printable characters only')
  if not values.host:
    raise errors.InputError('--host=ADDRESS is empty: 0.0.0.0 or :: are all')
  options = engine_flags.engine_options(values)
  _, tokenizer = engine_flags.read_config(values)
  tokenizer.templates.check()
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
      batch_invariant=values.batch_invariant,
    )
