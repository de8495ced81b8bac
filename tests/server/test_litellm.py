"""litellm on the server: `make nightly`."""

import asyncio
import importlib
import json

import pytest

from tests.server import web

pytestmark = [
  pytest.mark.nightly,
  pytest.mark.filterwarnings('ignore'),  # theirs
]
HELLO = [{'role': 'user', 'content': 'Hello'}]
# How litellm spells OpenAI's protocol, and vLLM's.
CHATS, TEXTS = ('openai', 'hosted_vllm'), ('text-completion-openai',)


@pytest.fixture(scope='module')
def litellm():
  pytest.importorskip('litellm', reason='needs the extra `clients`')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('LITELLM_LOCAL_MODEL_COST_MAP', 'True')  # not from the network
    module = importlib.import_module('litellm')
    module.suppress_debug_info = True
    yield module


@pytest.fixture
def options(served):
  return {'api_base': f'{served[0]}/v1', 'api_key': 'x', 'num_retries': 0}


def own(tokenizer, count=12):
  ids = web.chat_ids(tokenizer, 'Hello')
  return len(ids), *web.text_of(tokenizer, ids, count)


@pytest.mark.parametrize('provider', CHATS)
def test_chat(litellm, options, tokenizer, provider):
  length, text, reason = own(tokenizer)
  fields = {'model': f'{provider}/tiny', 'messages': HELLO, 'max_tokens': 12}
  answer = litellm.completion(**fields, **options, temperature=0, seed=1)
  assert answer.choices[0].message.content == text
  assert answer.choices[0].finish_reason == reason
  assert answer.usage.prompt_tokens == length
  parts = list(
    litellm.completion(
      **fields, **options, stream=True, stream_options={'include_usage': True}
    )
  )
  built = litellm.stream_chunk_builder(parts, messages=HELLO)
  assert built.choices[0].message.content == text
  assert built.usage.prompt_tokens == length
  assert built.usage.completion_tokens == answer.usage.completion_tokens
  again = asyncio.run(litellm.acompletion(**fields, **options))
  assert again.choices[0].message.content == text


def test_chat_gives_log_probabilities(litellm, options):
  answer = litellm.completion(
    model='openai/tiny',
    messages=HELLO,
    max_tokens=5,
    logprobs=True,
    top_logprobs=2,
    **options,
  )
  content = answer.choices[0].logprobs.content
  assert all(len(entry.top_logprobs) == 2 for entry in content)


@pytest.mark.parametrize('provider', TEXTS)
@pytest.mark.parametrize('stream', [False, True])
def test_completions(litellm, options, tokenizer, provider, stream):
  ids = tokenizer.encode('Hello', add_bos=True).tolist()
  text, _ = web.text_of(tokenizer, ids, 12)
  answer = litellm.text_completion(
    model=f'{provider}/tiny',
    prompt='Hello',
    max_tokens=12,
    stream=stream,
    **options,
  )
  parts = list(answer) if stream else [answer]
  assert ''.join(part.choices[0].text or '' for part in parts) == text


@pytest.mark.parametrize('provider', CHATS)
def test_errors_are_litellm_s_own(litellm, options, tokenizer, provider):
  fields = {'model': f'{provider}/tiny', 'messages': HELLO} | options
  long = [{'role': 'user', 'content': 'x' * 700}]
  cases = [
    (litellm.ContextWindowExceededError, {'messages': long, 'max_tokens': 9}),
    (litellm.BadRequestError, {'temperature': -1}),
    (litellm.BadRequestError, {'messages': []}),
    (litellm.NotFoundError, {'model': f'{provider}/other'}),
  ]
  for kind, wrong in cases:
    with pytest.raises(kind):
      litellm.completion(**fields | wrong)
  with (
    web.serving(tokenizer, api_key='secret') as (address, _),
    pytest.raises(litellm.AuthenticationError),
  ):
    litellm.completion(**fields | {'api_base': f'{address}/v1'})


def test_a_full_queue_is_a_rate_limit(litellm, options, tokenizer):
  with web.serving(tokenizer, 0.02, most_waiting=0, max_rows=1) as (address, _):
    fields = {'model': 'openai/tiny', 'messages': HELLO} | options
    fields |= {'api_base': f'{address}/v1', 'max_retries': 0}
    fields['extra_body'] = {'ignore_eos': True}
    parts = litellm.completion(**fields, max_tokens=400, stream=True)
    next(iter(parts))
    with pytest.raises(litellm.RateLimitError):
      litellm.completion(**fields, max_tokens=2)


def test_tokens_are_counted_as_here(litellm, served, tokenizer):
  """With the tokenizer of the served folder."""
  theirs = litellm.create_tokenizer(tokenizer.text)
  text = 'Hello, world! x = 12345'
  count = litellm.token_counter(
    model='openai/tiny', text=text, custom_tokenizer=theirs
  )
  body = {'prompt': text, 'add_special_tokens': False}
  _, answer, _ = web.fetch(f'{served[0]}/tokenize', json.dumps(body).encode())
  assert count == json.loads(answer)['count']
