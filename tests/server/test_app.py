"""The server as OpenAI's own client meets it."""

import asyncio
import threading

import pytest

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import engine
from tests.server import web


def test_completions(served, tokenizer):
  ids = tokenizer.encode('Hello', add_bos=True).tolist()
  text, finish = web.text_of(tokenizer, ids, 9)
  with web.client(served[0]) as ask:
    fields = {'model': 'tiny', 'max_tokens': 9}
    response = ask.completions.create(prompt='Hello', **fields)
    assert (response.choices[0].text, response.choices[0].finish_reason) == (
      text,
      finish,
    )
    assert response.usage.prompt_tokens == len(ids)
    two = ask.completions.create(prompt=[ids, ids[:1]], n=2, **fields)
    texts = [choice.text for choice in two.choices]
    other, _ = web.text_of(tokenizer, ids[:1], 9)
    assert texts == [text, text, other, other]
    parts = ask.completions.create(prompt=ids, stream=True, **fields)
    assert ''.join(part.choices[0].text for part in parts) == text


def test_chat_streams_what_it_says_at_once(served, tokenizer):
  text, finish = web.text_of(tokenizer, web.chat_ids(tokenizer, 'Hello'), 30)
  fields = {'model': 'tiny', 'max_completion_tokens': 30}
  fields['messages'] = [{'role': 'user', 'content': 'Hello'}]
  with web.client(served[0]) as ask:
    response = ask.chat.completions.create(**fields)
    assert response.choices[0].message.content == text
    assert response.choices[0].message.role == 'assistant'
    options = {'include_usage': True}
    parts = ask.chat.completions.create(
      stream=True, stream_options=options, **fields
    )
    *parts, last = list(parts)
    assert parts[0].choices[0].delta.role == 'assistant'
    assert ''.join(p.choices[0].delta.content for p in parts) == text
    assert parts[-1].choices[0].finish_reason == finish
    assert last.usage.completion_tokens >= 1 and not last.choices


def test_what_newer_clients_send(openai, served, tokenizer):
  text, _ = web.text_of(tokenizer, web.chat_ids(tokenizer, 'Hello'), 9)
  parts = [{'type': 'text', 'text': 'Hel'}, {'type': 'text', 'text': 'lo'}]
  with web.client(served[0]) as ask:
    response = ask.chat.completions.create(
      model='tiny',
      messages=[{'role': 'user', 'content': parts}],
      max_tokens=9,
      store=False,
      tool_choice='none',
      parallel_tool_calls=False,
    )
    assert response.choices[0].message.content == text
    again = [{'role': 'developer', 'content': 'x'}, response.choices[0].message]
    response = ask.chat.completions.create(
      model='tiny', messages=[*again, {'role': 'user', 'content': 'x'}]
    )
    assert response.usage.prompt_tokens > 4
    extra = {'suffix_of': 2}
    with pytest.raises(openai.BadRequestError, match="'suffix_of' is no field"):
      ask.completions.create(model='tiny', prompt='a', extra_body=extra)


def test_the_model_has_one_name(openai, served):
  with web.client(served[0]) as ask:
    assert ask.models.retrieve('tiny').id == 'tiny'
    wrong = [
      lambda: ask.models.retrieve('org/other'),
      lambda: ask.completions.create(model='other', prompt='a'),
      lambda: ask.chat.completions.create(
        model='other', messages=[{'role': 'user', 'content': 'a'}]
      ),
    ]
    for call in wrong:
      with pytest.raises(openai.NotFoundError, match='is not served') as caught:
        call()
      assert caught.value.code == 'model_not_found'
      assert caught.value.type == 'invalid_request_error'
  code, body, _ = web.fetch(f'{served[0]}/v1/nothing')
  assert code == 404 and 'invalid_request_error' in body


def test_several_answers_compute_their_prompt_once(tokenizer):
  with web.serving(tokenizer) as (address, model), web.client(address) as ask:
    ids = list(range(100)) * 3
    response = ask.completions.create(
      model='tiny', prompt=ids, n=5, max_tokens=9, temperature=0
    )
    want, _ = web.text_of(tokenizer, ids, 9)
    assert [choice.text for choice in response.choices] == [want] * 5
    assert model.counts['cached_tokens'] == 4 * 299
    web.idle(model)


def test_a_long_text_holds_up_nobody(tokenizer):
  begun, may_end = threading.Event(), threading.Event()

  class Slow(tokenizers.Tokenizer):
    def encode(self, *args, **options):
      begun.set()
      assert may_end.wait(30)
      return super().encode(*args, **options)

  slow = Slow(tokenizer.text)
  with web.serving(slow) as (address, _), web.client(address) as ask:
    fields = {'model': 'tiny', 'max_tokens': 1}
    say = lambda: ask.completions.create(prompt='Hello', **fields)
    thread = threading.Thread(target=say)
    thread.start()
    assert begun.wait(30)
    assert web.fetch(f'{address}/health')[0] == 200
    response = ask.completions.create(prompt=[5], **fields)
    assert response.usage.prompt_tokens == 1 and thread.is_alive()
    may_end.set()
    thread.join()


def test_it_is_unwell_until_it_is_warm(tokenizer, monkeypatch):
  may_end = threading.Event()
  wait = lambda self, shape: may_end.wait(30)
  monkeypatch.setattr(engine.Engine, 'warm_up', wait)
  warm = [engine.StepShape(1, 1, 1, 'decode')]
  with (
    web.serving(tokenizer, warm=warm) as (address, _),
    web.client(address) as ask,
  ):
    code, body, _ = web.fetch(f'{address}/health')
    assert code == 503 and 'the model warms up' in body
    fields = {'model': 'tiny', 'prompt': [5], 'max_tokens': 1}
    parts = ask.completions.create(stream=True, **fields)
    may_end.set()
    assert len(list(parts)) == 1  # it has waited
    assert web.fetch(f'{address}/health')[0] == 200


def test_a_stop_cuts_the_text_and_frees_the_row(served, tokenizer):
  ids = tokenizer.encode('Hello', add_bos=True).tolist()
  text, _ = web.text_of(tokenizer, ids, 200)
  stop = text[10:13]
  with web.client(served[0]) as ask:
    response = ask.completions.create(
      model='tiny', prompt=ids, max_tokens=200, stop=[stop]
    )
  assert response.choices[0].text == text[: text.index(stop)]
  assert response.choices[0].finish_reason == 'stop'
  assert response.usage.completion_tokens < 200
  web.idle(served[1])


def test_64_streams_at_once_get_their_own(openai, served, tokenizer):
  address, model = served

  async def one(ask, i):
    ids = tokenizer.encode(f'x = {i}, world!' * (1 + i % 9)).tolist()
    count = 20 + i
    parts = await ask.completions.create(
      model='tiny', prompt=ids, max_tokens=count, stream=True
    )
    texts = [part.choices[0].text async for part in parts]
    assert ''.join(texts) == web.text_of(tokenizer, ids, count)[0]

  async def all_of_them():
    options = {'base_url': f'{address}/v1', 'api_key': 'x', 'max_retries': 0}
    async with openai.AsyncOpenAI(**options) as ask:
      await asyncio.gather(*(one(ask, i) for i in range(64)))

  before = model.counts['requests']
  asyncio.run(all_of_them())
  assert model.counts['requests'] - before == 64
  web.idle(model)


def test_the_page_is_there(served):
  code, text, headers = web.fetch(served[0])
  assert code == 200 and '/v1/chat/completions' in text
  assert headers['content-type'].startswith('text/html')
