"""OpenAI's client sends every field, and raises its own errors."""

import asyncio
import json

import pytest

from tests.inference import counting
from tests.server import web

HELLO = [{'role': 'user', 'content': 'Hello'}]
# Which of them the client has parameters for is its business: see `_split`.
_SAMPLING = {
  'temperature': 0.5,
  'top_p': 0.9,
  'top_k': 5,
  'min_p': 0.1,
  'seed': 3,
  'logit_bias': {'5': 1},
  'presence_penalty': 0.5,
  'frequency_penalty': 0.5,
  'repetition_penalty': 1.1,
  'n': 2,
  'stop': ['quite another end'],
  'ignore_eos': True,
  'min_tokens': 0,
  'user': 'me',
  'metadata': {'a': 'b'},
  'prompt_cache_key': 'k',
  'safety_identifier': 's',
  'model': 'tiny',
  # Others than these have tests of their own, as they exclude one another.
  'response_format': {'type': 'text'},
  'guided_json': None,
  'guided_regex': None,
  'guided_choice': None,
  'structured_outputs': None,
  'prompt_logprobs': None,
}
COMPLETION = _SAMPLING | {
  'prompt': 'Hello',
  'max_tokens': 6,
  'logprobs': 1,
  'echo': False,
  'best_of': 2,
  'suffix': 'b',
  'add_special_tokens': True,
}
CHAT = _SAMPLING | {
  'messages': HELLO,
  'max_completion_tokens': 6,
  'max_tokens': 6,
  'logprobs': True,
  'top_logprobs': 2,
  'tools': [],
  'tool_choice': 'none',
  'parallel_tool_calls': True,
  'chat_template_kwargs': {},
}
_EXTRA = (
  *('top_k', 'min_p', 'repetition_penalty', 'ignore_eos', 'min_tokens'),
  *('add_special_tokens', 'guided_json', 'guided_regex', 'guided_choice'),
  *('structured_outputs', 'prompt_logprobs', 'chat_template_kwargs'),
)
_ONLY_CHAT = (
  *('metadata', 'prompt_cache_key', 'safety_identifier'),
  'response_format',
)


def _split(fields, extra):
  """Parameters of the client, and what it sends along."""
  body = {name: fields[name] for name in extra if name in fields}
  rest = {name: x for name, x in fields.items() if name not in body}
  return rest | {'extra_body': body}


def known(address, path):
  """Fields of an endpoint, which the refusal of another one lists."""
  _, body, _ = web.fetch(f'{address}/v1/{path}', b'{"nothing": 1}')
  names = json.loads(body)['error']['message'].split('request: ')[1]
  return set(names.split(', '))


@pytest.mark.parametrize('stream', [False, True])
def test_every_field_is_sent(served, tokenizer, stream):
  streamed = {'stream', 'stream_options'}
  assert known(served[0], 'completions') <= COMPLETION.keys() | streamed
  assert known(served[0], 'chat/completions') <= CHAT.keys() | streamed
  more = {'stream': stream}
  if stream:
    more['stream_options'] = {'include_usage': True}
  with web.client(served[0]) as ask:
    fields = _split(COMPLETION, (*_EXTRA, *_ONLY_CHAT))
    text = ask.completions.create(**fields, **more)
    chat = ask.chat.completions.create(**_split(CHAT, _EXTRA), **more)
    answers = [(list(x) if stream else [x]) for x in (text, chat)]
  prompts = (
    tokenizer.encode_fim('Hello', 'b').tolist(),
    web.chat_ids(tokenizer, 'Hello'),
  )
  for parts, prompt in zip(answers, prompts, strict=True):
    assert parts[-1].usage.prompt_tokens == len(prompt)
    assert parts[-1].usage.completion_tokens == 12
    texts = {0: '', 1: ''}
    for part in parts:
      for choice in part.choices:
        texts[choice.index] += _text(choice)
    new = counting.continued(prompt, 6, 280)
    want = tokenizer.decode(new, skip_special=True)
    assert list(texts.values()) == [want, want]


def _text(choice) -> str:
  for name in ('message', 'delta'):
    if hasattr(choice, name):
      return getattr(choice, name).content or ''
  return choice.text


def test_errors_are_the_client_s_own(openai, tokenizer):
  fields = {'model': 'tiny', 'prompt': 'a'}
  cases = [
    (openai.BadRequestError, 400, fields | {'max_tokens': -1}),
    (openai.BadRequestError, 400, fields | {'max_tokens': 5000}),
    (openai.NotFoundError, 404, fields | {'model': 'x'}),
    (openai.APIStatusError, 413, fields | {'prompt': 'a' * 2**20}),
  ]
  with web.serving(tokenizer, api_key='secret') as (address, _):
    with web.client(address, 'secret') as ask:
      for kind, status, body in cases:
        with pytest.raises(kind) as caught:
          ask.completions.create(**body)
        error = caught.value
        assert (error.status_code, error.type) == (
          status,
          'invalid_request_error',
        )
        assert error.message and error.param is None
      other = {'sec-fetch-site': 'cross-site'}
      with pytest.raises(openai.PermissionDeniedError) as caught:
        ask.completions.create(**fields, extra_headers=other)
      assert caught.value.type == 'permission_error'
      with pytest.raises(openai.NotFoundError, match='Not Found'):
        ask.embeddings.create(model='tiny', input='a')
    with web.client(address, 'wrong') as ask:
      with pytest.raises(openai.AuthenticationError) as caught:
        ask.completions.create(**fields)
      assert caught.value.type == 'authentication_error'


def test_a_client_tries_again_while_the_queue_is_full(openai, tokenizer):
  with (
    web.serving(tokenizer, 0.02, most_waiting=0, max_rows=1) as (address, _),
    web.client(address) as ask,
  ):
    fields = {'model': 'tiny', 'prompt': [5]}
    stream = ask.completions.create(**fields, max_tokens=400, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError):
      ask.completions.create(**fields)
    patient = ask.with_options(max_retries=5)

    async def both():
      asking = asyncio.to_thread(patient.completions.create, **fields)
      task = asyncio.create_task(asking)
      await asyncio.sleep(0.1)
      await asyncio.to_thread(stream.close)
      return await task

    answer = asyncio.run(both())
  assert answer.choices[0].finish_reason in ('stop', 'length')


def test_an_async_client_may_leave(openai, served):
  async def leave():
    options = {'base_url': f'{served[0]}/v1', 'api_key': 'x'}
    async with openai.AsyncOpenAI(**options) as ask:
      parts = await ask.chat.completions.create(
        model='tiny', messages=HELLO, max_tokens=400, stream=True
      )
      async for _ in parts:
        break
      await parts.close()

  asyncio.run(leave())
  web.idle(served[1])
