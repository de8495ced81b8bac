"""LangChain's models on the server: `make nightly`."""

import asyncio
import importlib

import pytest

from tests.inference import counting
from tests.server import web

pytestmark = [
  pytest.mark.nightly,
  pytest.mark.filterwarnings('ignore'),  # theirs
]


@pytest.fixture(scope='module')
def langchain(monkeypatch_module):
  monkeypatch_module.setenv('LANGSMITH_TRACING', 'false')
  pytest.importorskip('langchain_openai', reason='needs the extra `clients`')
  return importlib.import_module('langchain_openai')


@pytest.fixture(scope='module')
def monkeypatch_module():
  with pytest.MonkeyPatch.context() as patch:
    yield patch


@pytest.fixture
def options(served):
  return {
    'base_url': f'{served[0]}/v1',
    'api_key': 'x',
    'model': 'tiny',
    'max_tokens': 12,
    'max_retries': 0,
  }


def chat_text(tokenizer, text, count=12):
  return web.text_of(tokenizer, web.chat_ids(tokenizer, text), count)


def text_of(tokenizer, text, count=12):
  ids = tokenizer.encode(text, add_bos=True).tolist()
  return web.text_of(tokenizer, ids, count)


def test_chat_is_invoked_streamed_and_batched(langchain, options, tokenizer):
  model = langchain.ChatOpenAI(temperature=0, **options)
  text, reason = chat_text(tokenizer, 'Hello')
  answer = model.invoke('Hello')
  assert answer.content == text
  assert answer.response_metadata['finish_reason'] == reason
  usage = answer.usage_metadata
  assert usage['input_tokens'] == len(web.chat_ids(tokenizer, 'Hello'))
  assert usage['total_tokens'] == sum(
    usage[f'{name}_tokens'] for name in ('input', 'output')
  )
  assert ''.join(part.content for part in model.stream('Hello')) == text
  prompts = ['Hello', 'x = 1', 'world']
  texts = [answer.content for answer in model.batch(prompts)]
  assert texts == [chat_text(tokenizer, prompt)[0] for prompt in prompts]


def test_chat_is_asked_by_coroutines(langchain, options, tokenizer):
  model = langchain.ChatOpenAI(temperature=0, **options)
  text, _ = chat_text(tokenizer, 'Hello')

  async def ask():
    assert (await model.ainvoke('Hello')).content == text
    answers = await model.abatch(['Hello', 'Hello'])
    assert [answer.content for answer in answers] == [text, text]
    parts = [part.content async for part in model.astream('Hello')]
    assert ''.join(parts) == text
    # It keeps its connections, which would outlive the loop.
    await model.root_async_client.close()

  asyncio.run(ask())


def test_chat_streams_its_usage(langchain, options, tokenizer):
  model = langchain.ChatOpenAI(stream_usage=True, **options)
  parts = list(model.stream('Hello'))
  whole = parts[0]
  for part in parts[1:]:
    whole += part
  assert whole.usage_metadata == model.invoke('Hello').usage_metadata
  assert whole.content == chat_text(tokenizer, 'Hello')[0]


def test_chat_gives_log_probabilities(langchain, options, tokenizer):
  model = langchain.ChatOpenAI(logprobs=True, top_logprobs=2, **options)
  content = model.invoke('Hello').response_metadata['logprobs']['content']
  ids = web.chat_ids(tokenizer, 'Hello')
  want = counting.continued(ids, 12, 280)[: len(content)]
  assert [entry['logprob'] for entry in content] == [-x / 8 for x in want]
  assert all(len(entry['top_logprobs']) == 2 for entry in content)


def test_chat_takes_a_conversation_and_its_own_answers(
  langchain, options, tokenizer
):
  model = langchain.ChatOpenAI(n=2, stop=['\n\n\n'], seed=1, **options)
  messages = [('system', 'x = 1'), ('human', 'Hello')]
  answer = model.invoke(messages)
  turns = [*messages, answer, ('human', 'world')]
  usage = model.invoke(turns).usage_metadata
  same = [
    {'role': 'system', 'content': 'x = 1'},
    {'role': 'user', 'content': 'Hello'},
    {'role': 'assistant', 'content': answer.content},
    {'role': 'user', 'content': 'world'},
  ]
  ids, _ = tokenizer.encode_chat(same, add_generation_prompt=True)
  assert usage['input_tokens'] == len(ids)


def test_completions(langchain, options, tokenizer):
  model = langchain.OpenAI(temperature=0, **options)
  text, _ = text_of(tokenizer, 'Hello')
  assert model.invoke('Hello') == text
  assert ''.join(model.stream('Hello')) == text
  prompts = ['Hello', 'x = 1']
  assert model.batch(prompts) == [text_of(tokenizer, p)[0] for p in prompts]
  two = langchain.OpenAI(n=2, best_of=3, logprobs=1, **options)
  output = two.generate(prompts)
  assert [len(x) for x in output.generations] == [2, 2]
  assert output.llm_output['token_usage']['completion_tokens'] >= 6
  first = output.generations[0][0]
  assert first.generation_info['logprobs']['token_logprobs']


def test_what_is_too_long_is_langchain_s_error(openai, langchain, options):
  model = langchain.ChatOpenAI(**options | {'max_tokens': 400})
  core = importlib.import_module('langchain_core.exceptions')
  with pytest.raises(core.ContextOverflowError) as caught:
    model.invoke('x' * 700)
  assert isinstance(caught.value, openai.BadRequestError)
  with pytest.raises(openai.NotFoundError):
    langchain.ChatOpenAI(**options | {'model': 'x'}).invoke('Hello')
