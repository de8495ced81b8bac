"""Requests to the server with something wrong, made by changing valid ones.

Bodies are trees as in `fuzz_shards`. Most requests are well-formed HTTP with a
wrong body; some are wrong as HTTP, and some clients leave early.
"""

import gzip
import random
from collections.abc import Iterator
from typing import NamedTuple

from dsv3_jax.data import tokenizer as tokenizers
from tests.checkpoint.safetensors import fuzz_shards

Pairs, Text = fuzz_shards.Pairs, fuzz_shards.Text

PATHS = ('/v1/completions', '/v1/chat/completions', '/tokenize', '/detokenize')
MAX_TOKENS, ROOM, VOCAB = 5, 120, 280  # of the server that answers


class Case(NamedTuple):
  """One request.

  path: the endpoint that it began from. data: all that is sent. method: HEAD
  has no body in its answer. is_http: well-formed up to the end of its body, so
  that it has an answer of ours. leaves: the client closes and reads nothing.
  closes: it closes after the answer.
  """

  path: str
  data: bytes
  method: str = 'POST'
  is_http: bool = True
  leaves: bool = False
  closes: bool = True


# Values of fields at the ends of what is legal, and between.
_LEGAL = {
  'model': ('tiny',),
  'stream': (True, False),
  'n': (1, 2, 16),
  'stop': (
    *('x', '', [], ['', 'a'], ['\n'], 'x' * 300, '\u2028', ['\ufffd'] * 16),
    *(Text('"\\ud800"'), '\0', ['e', 'en', 'end'], '\U0001f600'),
  ),
  'ignore_eos': (True, False),
  'user': ('me', Text('"\\udc00"')),
  'metadata': (Pairs(), Pairs([['a', [[[]]]]])),
  'temperature': (0, 0.0, -0.0, 1e-320, 1e-45, 1e-38, 1e-9, 1, 2.5, 100),
  'top_p': (1, 1e-320, 1e-38, 1e-7, 0.5, Text('0.99999999999999999')),
  'top_k': (-1, 0, 1, 7, VOCAB, 2**31 - 1),
  'min_p': (0, 1, 1e-320, 0.5, Text('1E-7')),
  'seed': (0, 1, -(2**63), 2**63, 2**64 - 1),
  'presence_penalty': (-2, 2, 0, 1e-320),
  'frequency_penalty': (-2, 2.0, 0, 0.5),
  'repetition_penalty': (0.01, 100, 1, 1.3),
  'logit_bias': (
    Pairs(),
    Pairs([['5', 100], ['05', 100], ['5', -100]]),
    Pairs([[str(i), -100] for i in range(VOCAB)]),
    Pairs([[str(i), 100] for i in range(0, VOCAB, 7)]),
  ),
}
_COMPLETION = _LEGAL | {
  'max_tokens': (0, 1, MAX_TOKENS),
  'echo': (True, False),
  'logprobs': (0, 1, 20),
  'best_of': (2, 16),
  'suffix': ('', 'b', '\n' * 40),
  'add_special_tokens': (True, False),
}
_CHAT = _LEGAL | {
  'max_tokens': (1, MAX_TOKENS),
  'logprobs': (True,),
  'max_completion_tokens': (0, MAX_TOKENS),
}
_STRINGS = (
  *('', 'Hello', 'x = 1', '\u4f60\u597d', '\0', 'a\r\nb', '\u2028', '\ufeff'),
  *('\U0001f468\u200d\U0001f469\u200d\U0001f467', 'e\u0301' * 9, '\u202eabc'),
  *(tokenizers.BOS, f'{tokenizers.BOS}Hello', '<\uff5cUser\uff5c>', '<think>'),
  *('\ufffd', '\uffff', ' ' * 99, '0' * 99, '\\', '"', "'", '%s%n', '{{x}}'),
)
_NUMBERS = (
  *(-1, 0, 1, 2, 7, 16, 17, 20, 21, 119, 120, 121, 279, 280, 281, 1025),
  *(2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**30, True, False, None),
  *(0.5, -0.0, 1.0, 1e300, -1e-320, '1', Text('NaN'), Text('Infinity')),
  *(Text('-Infinity'), Text('1e999'), Text('-1e999'), Text('9' * 4000)),
  *(Text('9' * 5000), Text('01'), Text('+1'), Text('1_0'), Text('.5')),
)
_NESTED = (
  *([], [[]], [None], [True], [0.5], Pairs(), Pairs([['a', 1]]), [Pairs()]),
  *(Text('[' * 900 + ']' * 900), Text('[' * 50_000), Text('{"a":' * 2000)),
  *(Text('{"a":' * 400 + '1' + '}' * 400), Text('[' * 5 + '"a"' + ']' * 5)),
  *(Text('"\\ud800"'), Text('"\\udc00x"'), Text('"\\ud83d\\ude00"')),
  *(Text('"\\x"'), Text('"\\u12"'), Text('"\t"'), Text("'a'"), Text('nul')),
  *(Text('[' + '5,' * 3000 + '5]'), Text('["a"' + ',"a"' * 300 + ']')),
)
# At these values they have no effect.
_NEUTRAL = {
  'add_generation_prompt': True,
  'bad_words': [],
  'chat_template_kwargs': Pairs(),
  'early_stopping': False,
  'functions': [],
  'length_penalty': 1.0,
  'min_tokens': 0,
  'modalities': ['text'],
  'parallel_tool_calls': False,
  'response_format': Pairs([['type', 'text']]),
  'service_tier': 'auto',
  'store': False,
  'tool_choice': 'none',
  'tools': [],
  'verbosity': 'medium',
}
_FIELDS = (
  *_NEUTRAL,
  *(*_COMPLETION, 'prompt', 'messages', 'tokens', 'top_logprobs', 'role'),
  *('stream_options', 'include_usage', 'content', 'type', 'text', 'min_tokens'),
  *('', '\n', 'Prompt', 'prompt ', '__proto__', 'x' * 9999, '\u00fc', '\x00'),
)
_ENCODINGS = ('utf-16', 'utf-16-le', 'utf-32', 'utf-8-sig', 'latin-1', 'cp500')


def _text(rng) -> str:
  return ''.join(rng.choices(_STRINGS, k=rng.randint(1, 3)))


def _ids(rng) -> list[int]:
  return [rng.randrange(VOCAB) for _ in range(rng.choice((1, 1, 3, 70, 110)))]


def _message(rng, role) -> Pairs:
  content = _text(rng)
  if rng.random() < 0.2:
    part = [['type', 'text'], ['text', content]]
    content = [Pairs(part)] * rng.randint(0, 3)
  message = Pairs([['role', role], ['content', content]])
  if rng.random() < 0.1:
    message.append(['name', 'Ada'])
  return message


def _messages(rng) -> list[Pairs]:
  roles = rng.choice((['user'], ['system', 'user'], ['developer', 'user']))
  more = ['assistant', 'user'] * rng.choice((0, 0, 0, 1, 4))
  return [_message(rng, role) for role in roles + more]


def _some(rng, legal) -> Pairs:
  """A few fields at legal values; together they may still be refused."""
  names = rng.sample(list(legal), rng.choice((0, 1, 2, 2, 3, 5, 8)))
  value = lambda name: fuzz_shards.copy(rng.choice(legal[name]))
  tree = Pairs([[name, value(name)] for name in names])
  if fuzz_shards.get(tree, 'stream') is True and rng.random() < 0.6:
    names = ('include_usage', 'continuous_usage_stats')
    options = Pairs([[name, rng.random() < 0.7] for name in names])
    tree.append(['stream_options', options])
  if fuzz_shards.get(tree, 'logprobs') is True:
    tree.append(['top_logprobs', rng.choice((0, 1, 20))])
  if rng.random() < 0.2:
    name = rng.choice(list(_NEUTRAL))
    tree.append([name, fuzz_shards.copy(_NEUTRAL[name])])
  return tree


def _valid(rng, path: str) -> Pairs:
  if path == '/v1/completions':
    kind = rng.randrange(5)
    prompt = [_text(rng), _ids(rng), [_text(rng)], [_ids(rng)]][kind % 4]
    if kind == 4:
      prompt = [_text(rng), _ids(rng), _text(rng)]
    return Pairs([['prompt', prompt], *_some(rng, _COMPLETION)])
  if path == '/v1/chat/completions':
    return Pairs([['messages', _messages(rng)], *_some(rng, _CHAT)])
  if path == '/detokenize':
    return Pairs([['tokens', rng.choice(([], _ids(rng), _ids(rng)))]])
  if rng.random() < 0.5:
    return Pairs([['messages', _messages(rng)]])
  special = rng.choice((True, False))
  return Pairs([['prompt', _text(rng)], ['add_special_tokens', special]])


# Changes of a tree in place; each may find nothing to do.


def _put_junk(rng, tree):
  place, i = rng.choice(list(fuzz_shards.slots(tree)))
  kinds = (_NUMBERS, _STRINGS, _NESTED)
  place[i] = fuzz_shards.copy(rng.choice(rng.choice(kinds)))


def _add_field(rng, tree):
  value = fuzz_shards.copy(rng.choice(rng.choice((_NUMBERS, _NESTED))))
  tree.insert(rng.randrange(len(tree) + 1), [rng.choice(_FIELDS), value])


def _rename(rng, tree):
  rng.choice(tree)[0] = rng.choice(_FIELDS)


def _double(rng, tree):
  """A key twice, with another value."""
  pair = [rng.choice(tree)[0], rng.choice(rng.choice((_NUMBERS, _STRINGS)))]
  tree.insert(rng.randrange(len(tree) + 1), pair)


def _wrap(rng, tree):
  place, i = rng.choice(list(fuzz_shards.slots(tree)))
  value = place[i]
  place[i] = [value] if rng.random() < 0.5 else Pairs([['text', value]])


def _repeat(rng, tree):
  """A list many times as long; not a repeated list of repeated lists."""
  lists = [p for p in fuzz_shards.slots(tree) if type(p[0][p[1]]) is list]
  if lists:
    place, i = rng.choice(lists)
    times = rng.choice((2, 20, 300))
    if times * len(fuzz_shards.dump(place[i])) < 2**21:
      place[i] = place[i] * times


_CHANGES = (
  *(_put_junk, _put_junk, _put_junk, _add_field, _rename, _double, _wrap),
  *(_repeat, fuzz_shards.exchange, fuzz_shards.change_pairs),
)


def _body(rng, path: str) -> bytes:
  tree = _valid(rng, path)
  for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3))):
    rng.choice(_CHANGES)(rng, tree)
    if not tree:
      break
  text, chance = fuzz_shards.dump(tree), rng.random()
  if chance < 0.04:
    return text.encode(rng.choice(_ENCODINGS), 'replace')
  raw = text.encode()
  if chance < 0.05:
    return rng.choice((b'', b'\0', b'null', b'[]', b'"', raw + raw, b'0'))
  if chance < 0.052:
    return b' ' * (2**20 + 5) + raw
  return fuzz_shards.change_bytes(rng, raw) if chance < 0.15 else raw


def _request(method: bytes, target: bytes, headers, body: bytes) -> bytes:
  lines = [method + b' ' + target + b' HTTP/1.1', b'host: x', *headers]
  return b'\r\n'.join(lines) + b'\r\n\r\n' + body


def _length(body: bytes) -> bytes:
  return b'content-length: %d' % len(body)


def _chunked(rng, body: bytes) -> bytes:
  pieces, at = b'', 0
  while at < len(body):
    piece = body[at : at + rng.randint(1, 400)]
    pieces += b'%x\r\n%s\r\n' % (len(piece), piece)
    at += len(piece)
  return pieces + b'0\r\n\r\n'


_JUNK_LENGTHS = (b'-1', b'1_0', b'0x10', b'9' * 30, b'5, 6', b'', b'a', b'1.0')
_JUNK_TARGETS = (
  *(b'/', b'/v1', b'//v1/completions', b'/v1/completions/..', b'/%00'),
  *(b'/V1/completions', b'/v1/models/%ff%00', b'/v1/models/' + b'x' * 9999),
  *(b'/v1/models/a/b', b'/v1/models/%F0%9F%98%80', b'/metrics', b'/health'),
  *(b'/v1/completions?prompt=a', b'*', b'http://x/v1/completions', b'/.git'),
)
_JUNK_HEADERS = (
  *(b'content-type: text/plain', b'content-type: \xff', b'accept: x/y'),
  *(b'content-encoding: gzip', b'authorization: Bearer \xe9\xff', b'a: '),
  *(b'expect: 100-continue', b'upgrade: websocket\r\nconnection: upgrade'),
  *(b'sec-fetch-site: cross-site', b'origin: null', b'x: ' + b'y' * 9999),
  *(b'content-type: application/json; charset=utf-16', b'cookie: ;;=;'),
)
_BROKEN = (
  *(b'', b'\r\n\r\n', b'\0' * 9, b'\x16\x03\x01\x02\x00\x01', b'GET\r\n\r\n'),
  *(b'POST /tokenize HTTP/3.0\r\n\r\n', b'POST / HTTP/1.1\r\na b: c\r\n\r\n'),
  *(b'POST /tokenize HTTP/1.1\r\nhost: x\r\nx: ' + b'y' * 70_000,),
  *(b'POST /tok\xff HTTP/1.1\r\nhost: x\r\n\r\n', b'GET / HTTP/1.1\r\n\r\n'),
)
_METHODS = (b'GET', b'PUT', b'HEAD', b'OPTIONS', b'DELETE', b'BREW', b'post')


def _odd(rng, path: str, body: bytes) -> Case:
  """A request that is odd as HTTP."""
  target, kind = path.encode(), rng.randrange(12)
  sized = lambda *more: [_length(body), *more]
  if kind == 0:  # shorter than the body: the rest is another, broken request
    size = rng.randint(0, len(body))
    length = b'content-length: %d' % size
    return Case(path, _request(b'POST', target, [length], body))
  if kind == 1:  # longer, or no end at all: the client gives up
    data = _request(b'POST', target, [_length(body + b' ' * 9)], body)
    return Case(path, data, leaves=True)
  if kind == 2:
    data = _request(b'POST', target, sized(), body)
    return Case(path, data[: rng.randint(0, len(data))], leaves=True)
  if kind == 3:
    length = b'content-length: ' + rng.choice(_JUNK_LENGTHS)
    data = _request(b'POST', target, [length], body)
    return Case(path, data, is_http=False)
  if kind == 4:
    data = _chunked(rng, body)
    headers = [b'transfer-encoding: chunked']
    return Case(path, _request(b'POST', target, headers, data))
  if kind == 5:
    data = _chunked(rng, body).replace(b'\r\n', rng.choice((b'', b'\n', b'z')))
    headers = [b'transfer-encoding: chunked']
    data = _request(b'POST', target, headers, data)
    return Case(path, data, is_http=False, leaves=True)
  if kind == 6:
    method = rng.choice(_METHODS)
    data = _request(method, target, sized(), body)
    return Case(path, data, method.decode())
  if kind == 7:
    data = _request(b'POST', rng.choice(_JUNK_TARGETS), sized(), body)
    return Case(path, data)
  if kind == 8:
    data = _request(b'POST', target, sized(rng.choice(_JUNK_HEADERS)), body)
    return Case(path, data)
  if kind == 9:
    body = gzip.compress(body)
    headers = [_length(body), b'content-encoding: gzip']
    return Case(path, _request(b'POST', target, headers, body))
  if kind == 10:
    return Case(path, rng.choice(_BROKEN), is_http=False, leaves=True)
  data = _request(b'GET', rng.choice(_JUNK_TARGETS), [], b'')
  return Case(path, data, 'GET')


def plain(path: str, body: bytes, leaves: bool = False) -> Case:
  """Well-formed, whatever the body."""
  data = _request(b'POST', path.encode(), [_length(body)], body)
  return Case(path, data, leaves=leaves, closes=False)


def case(rng) -> Case:
  path = rng.choices(PATHS, (5, 5, 2, 1))[0]
  body, chance = _body(rng, path), rng.random()
  if chance < 0.1:
    return _odd(rng, path, body)
  return plain(path, body, leaves=chance > 0.98)


def cases(seed: int, count: int) -> Iterator[Case]:
  """The i-th depends on seed and i alone."""
  for i in range(count):
    yield case(random.Random(f'request/{seed}/{i}'))
