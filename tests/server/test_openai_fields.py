"""Log-probabilities, echo, suffixes and lengths by OpenAI's client."""

import asyncio
import json
from unittest import mock

import pytest

from dsv3_jax.data import chat
from dsv3_jax.inference import request as requests
from dsv3_jax.server import engine_thread, protocol, responses
from tests.inference import counting
from tests.server import web


def own(token):
  """What `counting.Runner` says of a token."""
  return -token / 8


def test_completion_logprobs_are_the_engine_s(ask, tokenizer):
  ids = [7, 8, 9]
  want = counting.continued(ids, 6, 280)
  answer = ask.completions.create(
    model='tiny', prompt=ids, max_tokens=6, logprobs=2, temperature=0
  ).choices[0]
  end = want.index(tokenizer.eos_id) if tokenizer.eos_id in want else 6
  want = want[: end + 1]  # with the end of the sequence
  got = answer.logprobs
  assert got.token_logprobs == [own(token) for token in want]
  texts = [tokenizer.token_bytes(token) for token in want]
  for text, data in zip(got.tokens, texts, strict=True):
    spelled = 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)
    assert text.encode() == data or text == spelled
  for token, top in zip(want, got.top_logprobs, strict=True):
    assert sorted(top.values()) == [own(token) - 0.5, own(token)]


def test_offsets_are_those_of_whole_characters(ask, tokenizer):
  text = 'x \U0001f600 = d\u00e9'
  ids = tokenizer.encode(text, add_bos=True).tolist()
  answer = ask.completions.create(
    model='tiny', prompt=text, echo=True, max_tokens=0, logprobs=0
  ).choices[0]
  assert answer.text == text
  got = answer.logprobs.text_offset
  for i in range(len(ids)):
    before = tokenizer.decode(ids[:i], True)
    assert got[i] == len(before.rstrip('\ufffd'))


def test_an_answer_that_ends_at_once_has_the_end_s_log_probability(tokenizer):
  class Runner(counting.Runner):
    def following(self, row):
      return tokenizer.eos_id

  with (
    web.serving(tokenizer, runner=Runner(280, room=600)) as (address, _),
    web.client(address) as ask,
  ):
    fields = {'model': 'tiny', 'logprobs': 1}
    plain = ask.completions.create(prompt=[5, 6], **fields).choices[0]
    echo = ask.completions.create(
      prompt=[5, 6], echo=True, max_tokens=1, **fields
    ).choices[0]
    chat = ask.chat.completions.create(
      model='tiny',
      messages=[{'role': 'user', 'content': 'x'}],
      logprobs=True,
    ).choices[0]
  end = own(tokenizer.eos_id)
  assert (plain.text, plain.logprobs.token_logprobs) == ('', [end])
  # Harnesses drop the last one, whatever it is.
  assert echo.logprobs.token_logprobs == [None, own(6), end]
  assert [entry.logprob for entry in chat.logprobs.content] == [end]


def test_a_stop_string_ends_texts_and_offsets(ask, tokenizer):
  fields = {'model': 'tiny', 'prompt': [7, 8, 9], 'max_tokens': 30}
  fields |= {'logprobs': 0, 'extra_body': {'ignore_eos': True}}
  whole = ask.completions.create(**fields).choices[0]
  stop = whole.text[4:6]
  for stream in (False, True):
    answer = ask.completions.create(stop=stop, stream=stream, **fields)
    choices = [part.choices[0] for part in (answer if stream else [answer])]
    text = ''.join(choice.text for choice in choices)
    offsets = sum((choice.logprobs.text_offset for choice in choices), [])
    assert text == whole.text[: whole.text.index(stop)]
    assert choices[-1].finish_reason == 'stop'
    assert offsets == sorted(offsets) and offsets[-1] <= len(text)
    assert offsets == [
      min(x, len(text)) for x in whole.logprobs.text_offset[: len(offsets)]
    ]


def test_chat_logprobs_stream_with_their_text(ask, tokenizer):
  fields = {'messages': [{'role': 'user', 'content': 'Hello'}]}
  fields |= {'model': 'tiny', 'max_tokens': 12, 'logprobs': True}
  whole = ask.chat.completions.create(**fields, top_logprobs=3).choices[0]
  content = whole.logprobs.content
  ids = web.chat_ids(tokenizer, 'Hello')
  want = counting.continued(ids, 12, 280)
  want = want[: len(content)]
  assert [entry.logprob for entry in content] == [own(x) for x in want]
  for token, entry in zip(want, content, strict=True):
    assert bytes(entry.bytes) == tokenizer.token_bytes(token)
    values = [top.logprob for top in entry.top_logprobs]
    assert values == [own(token), own(token) - 0.5, own(token) - 1.0]
  data = b''.join(bytes(entry.bytes) for entry in content)
  text = data.decode(errors='replace').removesuffix(chat.EOS)
  assert text == whole.message.content
  parts = ask.chat.completions.create(**fields, top_logprobs=3, stream=True)
  streamed = [
    entry
    for part in parts
    if part.choices[0].logprobs
    for entry in part.choices[0].logprobs.content
  ]
  assert streamed == content
  plain = ask.chat.completions.create(**fields).choices[0].logprobs.content
  assert [x.logprob for x in plain] == [x.logprob for x in content]
  assert not any(x.top_logprobs for x in plain)


@pytest.mark.parametrize('count', [0, 1, 2])
@pytest.mark.parametrize('stream', [False, True])
def test_echo_gives_the_prompt_s_log_probabilities(
  ask, tokenizer, count, stream
):
  """As evaluation harnesses ask for them: `count` of 0 scores alone."""
  prompts = ['Hello, x', 'x = 1']
  answer = ask.completions.create(
    model='tiny',
    prompt=prompts,
    max_tokens=count,
    echo=True,
    logprobs=1,
    temperature=0,
    stream=stream,
  )
  texts, tokens, logprobs, offsets = ({0: [], 1: []} for _ in range(4))
  for part in answer if stream else [answer]:
    for choice in part.choices:
      texts[choice.index].append(choice.text)
      if choice.logprobs:
        tokens[choice.index] += choice.logprobs.tokens
        logprobs[choice.index] += choice.logprobs.token_logprobs
        offsets[choice.index] += choice.logprobs.text_offset
  for i, prompt in enumerate(prompts):
    ids = tokenizer.encode(prompt, add_bos=True).tolist()
    new = counting.continued(ids, count, 280)
    assert tokenizer.eos_id not in new
    text = ''.join(texts[i])
    assert text == prompt + tokenizer.decode(new, True)
    first, *rest = logprobs[i]
    assert first is None and rest == [own(x) for x in (ids + new)[1:]]
    assert len(tokens[i]) == len(offsets[i]) == len(ids) + count
    assert offsets[i][:2] == [0, 0]  # the first token has no text
    assert text[offsets[i][2] :].startswith(tokenizer.decode(ids[2:3]))


@pytest.mark.parametrize('stream', [False, True])
def test_echo_of_several_answers_scores_their_prompt_once(tokenizer, stream):
  with web.serving(tokenizer) as (address, model), web.client(address) as ask:
    ids = list(range(100)) * 3
    answer = ask.completions.create(
      model='tiny',
      prompt=[ids, ids[1:]],
      n=3,
      max_tokens=2,
      echo=True,
      logprobs=1,
      temperature=0,
      stream=stream,
    )
    logprobs = {i: [] for i in range(6)}
    for part in answer if stream else [answer]:
      for choice in part.choices:
        logprobs[choice.index] += choice.logprobs.token_logprobs
    assert model.counts['cached_tokens'] == 2 * (299 + 298)
  for i, values in logprobs.items():
    prompt = ids[i // 3 :]
    new = counting.continued(prompt, 2, 280)
    assert values == [None] + [own(x) for x in (prompt + new)[1:]]


def test_answers_wait_for_the_scores_of_their_prompt(tokenizer):
  """Where another answer is computed on its own, and sooner."""

  async def pieces():
    thread = mock.create_autospec(engine_thread.EngineThread, instance=True)
    thread.max_new_tokens.side_effect = lambda length: 99 - length
    body = {'prompt': [5, 6], 'n': 2, 'echo': True, 'logprobs': 0}
    limits = protocol.Limits(
      model='tiny', max_choices=9, max_tokens=9, vocab_size=280, seed=1
    )
    call = protocol.parse_completion(
      body | {'max_tokens': 1}, tokenizer, limits
    )
    stream = responses.ResponseStream(thread, tokenizer, call, 9)
    stream.submit()
    first, second = stream.requests
    scores = lambda x: requests.TokenLogprobs(x, 1, ())
    collect = asyncio.create_task(_collected(stream.pieces()))
    for request in (second, first):
      if request is first:
        first.prompt_logprobs[1] = scores(-3.0)
      output = requests.TokenOutput(request, 7, 'length', scores(-1.0))
      stream._on_output(output)
      for _ in range(9):  # what can be read is read before the next
        await asyncio.sleep(0)
    return await collect

  for piece in asyncio.run(pieces()):
    values = [
      token.logprobs and token.logprobs.logprob for token in piece.tokens
    ]
    assert values == [None, -3.0, -1.0]


@pytest.mark.parametrize('count', [0, 2])
def test_prompt_logprobs_have_vllm_s_form(ask, tokenizer, count):
  more = {'extra_body': {'prompt_logprobs': count}}
  prompt = [7, 8, 9]
  choices = ask.completions.create(
    model='tiny', prompt=prompt, n=2, max_tokens=1, logprobs=1, **more
  ).choices
  messages = [{'role': 'user', 'content': 'x'}]
  answer = ask.chat.completions.create(
    model='tiny', messages=messages, max_tokens=1, **more
  )
  assert answer.choices[0].logprobs is None
  checks = [(choice.prompt_logprobs, prompt) for choice in choices]
  checks.append((answer.prompt_logprobs, web.chat_ids(tokenizer, 'x')))
  for entries, ids in checks:
    assert entries[0] is None and len(entries) == len(ids)
    for entry, token in zip(entries[1:], ids[1:], strict=True):
      assert entry[str(token)]['logprob'] == own(token)
      assert len(entry) == max(count, 1)
      # The stand-in's tokens are the likeliest and yet the seventh.
      assert entry[str(token)]['rank'] == (1 if count else 7)
      if count:
        second = entry[str((token + 1) % 280)]
        assert (second['logprob'], second['rank']) == (own(token) - 0.5, 2)
      raw = tokenizer.token_bytes(token)
      text = entry[str(token)]['decoded_token']
      assert text.encode() == raw or text.startswith('bytes:')
  for choice in choices:  # no more than were asked for
    assert len(choice.logprobs.top_logprobs[0]) == 1


async def _collected(pieces):
  return [piece async for piece in pieces]


def test_an_answer_of_no_token(ask):
  answer = ask.completions.create(model='tiny', prompt='Hello', max_tokens=0)
  assert answer.choices[0].text == ''
  assert answer.choices[0].finish_reason == 'length'
  assert answer.usage.completion_tokens == 0


def test_a_suffix_is_filled_in(ask, served, tokenizer):
  ids = tokenizer.encode_fim('def f(', 'return').tolist()
  begin, hole, end = (
    tokenizer.fim_begin_id,
    tokenizer.fim_hole_id,
    tokenizer.fim_end_id,
  )
  head, tail = tokenizer.encode('def f('), tokenizer.encode('return')
  assert ids == [tokenizer.bos_id, begin, *head, hole, *tail, end]
  text, _ = web.text_of(tokenizer, ids, 9)
  fields = {'model': 'tiny', 'max_tokens': 9, 'temperature': 0}
  answer = ask.completions.create(prompt='def f(', suffix='return', **fields)
  assert answer.choices[0].text == text
  assert answer.usage.prompt_tokens == len(ids)


def test_best_of_gives_the_likeliest(tokenizer):
  class Runner(counting.Runner):
    """Each token of all answers is another: the first answers are likelier."""

    given = 0

    def following(self, row):
      self.given += 1
      return 40 + self.given

  runner = Runner(280, room=600)
  with (
    web.serving(tokenizer, runner=runner) as (address, _),
    web.client(address) as ask,
  ):
    fields = {'model': 'tiny', 'prompt': [5], 'max_tokens': 4}
    best = ask.completions.create(best_of=4, n=2, logprobs=0, **fields)
    plain = ask.completions.create(best_of=4, **fields)
    runner.given = 0
    all_four = ask.completions.create(n=4, logprobs=0, **fields)
  means = lambda answer: [
    sum(choice.logprobs.token_logprobs) for choice in answer.choices
  ]
  got, want = means(best), means(all_four)
  assert len(set(want)) == 4 and len(got) == 2 and got[0] > got[1]
  assert best.usage.completion_tokens == 16
  assert len(plain.choices) == 1 and plain.choices[0].logprobs is None


def test_ignore_eos_goes_on(tokenizer):
  class Runner(counting.Runner):
    def following(self, row):
      return tokenizer.eos_id if len(row) == 3 else 40

  with (
    web.serving(tokenizer, runner=Runner(280, room=600)) as (address, _),
    web.client(address) as ask,
  ):
    fields = {'model': 'tiny', 'prompt': [5], 'max_tokens': 6}
    ended = ask.completions.create(**fields)
    went_on = ask.completions.create(**fields, extra_body={'ignore_eos': True})
  letter = tokenizer.decode([40])
  assert ended.choices[0].text == 2 * letter
  assert ended.choices[0].finish_reason == 'stop'
  assert went_on.choices[0].text == 5 * letter
  assert went_on.choices[0].finish_reason == 'length'


def test_what_is_too_long_is_said_as_clients_expect(openai, ask):
  with pytest.raises(openai.BadRequestError) as caught:
    ask.completions.create(model='tiny', prompt=[5] * 590, max_tokens=30)
  assert caught.value.code == 'context_length_exceeded'
  message = (
    "This model's maximum context length is 600 tokens. However, you requested "
    '620 tokens (590 in the prompt, 30 in the completion): shorten one of them '
    '(context_length_exceeded)'
  )
  assert message in str(caught.value)
  parts = 697 * [{'type': 'text', 'text': 'x'}]
  messages = [{'role': 'user', 'content': parts}]
  with pytest.raises(openai.BadRequestError, match='requested 701 tokens'):
    ask.chat.completions.create(model='tiny', messages=messages)


def test_a_length_that_was_not_asked_for_is_what_fits(ask):
  answer = ask.completions.create(
    model='tiny', prompt=[5] * 595, extra_body={'ignore_eos': True}
  )
  assert answer.usage.completion_tokens == 5


def test_tokens_there_and_back(served, tokenizer):
  def post(path, body):
    status, text, _ = web.fetch(
      f'{served[0]}/{path}', json.dumps(body).encode()
    )
    return status, json.loads(text)

  status, body = post('tokenize', {'prompt': 'Hello, x'})
  ids = tokenizer.encode('Hello, x', add_bos=True).tolist()
  assert status == 200
  assert body == {'count': len(ids), 'max_model_len': 600, 'tokens': ids}
  bare = {'prompt': 'Hello, x', 'add_special_tokens': False}
  assert post('tokenize', bare)[1]['tokens'] == ids[1:]
  chat = {'messages': [{'role': 'user', 'content': 'Hello'}]}
  assert post('tokenize', chat)[1]['tokens'] == web.chat_ids(tokenizer, 'Hello')
  assert post('detokenize', {'tokens': ids[1:]}) == (
    200,
    {'prompt': 'Hello, x'},
  )
  for path, wrong in (
    ('tokenize', {}),
    ('tokenize', {'prompt': 'a', 'messages': []}),
    ('tokenize', []),
    ('tokenize', {'prompt': 'a', 'add_generation_prompt': True}),
    ('tokenize', {'messages': [], 'add_special_tokens': True}),
    ('detokenize', {'tokens': [280]}),
    ('detokenize', {'tokens': [True]}),
    ('detokenize', []),
  ):
    assert post(path, wrong)[0] == 400
