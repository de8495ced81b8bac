"""The page of the server, in a browser that is driven as a user drives it."""

import os
import shutil
import threading

import pytest

from dsv3_jax.data import tokenizer as tokenizers
from tests import limits
from tests.inference import counting
from tests.server import web

_CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium')
pytestmark = pytest.mark.skipif(
  not _CHROMIUM, reason='there is no chromium here: apt-get install chromium'
)
THOUGHT, ANSWER = 'one, two <b>', 'It is\n<i>three</i> \u4f60.'


class Runner(counting.Runner):
  """Answers in the words of a script; of a plain text it counts on.

  `stops_at` has events by positions in the script: it waits there for them.
  """

  def __init__(self, tokenizer, seconds):
    super().__init__(280, seconds, room=2000)
    self.thought_ids = tokenizer.encode(f'<think>{THOUGHT}</think>')
    self.answer_ids = tokenizer.encode(ANSWER)
    self._script_ids = [*self.thought_ids, *self.answer_ids, tokenizer.eos_id]
    self.stops_at = {}
    self._begin = tokenizer.assistant_id

  def following(self, row):
    row = row.tolist()
    if self._begin not in row:
      return 40 + len(row) % 7  # never ends
    at = row[::-1].index(self._begin)
    if at in self.stops_at:
      assert self.stops_at[at].wait(limits.HANG)
    return self._script_ids[at]


@pytest.fixture(scope='module')
def sync_api():
  reason = 'playwright is missing: pip install -e .[test]'
  return pytest.importorskip('playwright.sync_api', reason=reason)


@pytest.fixture(scope='module')
def browser(sync_api):
  with sync_api.sync_playwright() as playwright:
    options = {'executable_path': _CHROMIUM, 'args': ['--no-sandbox']}
    browser = playwright.chromium.launch(**options)
    sync_api.expect.set_options(timeout=1000 * limits.HANG)
    yield browser
    browser.close()


@pytest.fixture
def runner():
  return Runner(tokenizers.train(web.TEXTS * 30, 280), 0.01)


@pytest.fixture
def served(runner):
  tokenizer = tokenizers.train(web.TEXTS * 30, 280)
  with web.serving(tokenizer, runner=runner) as server:
    yield server


@pytest.fixture
def page(browser, served):
  page = browser.new_page()
  page.set_default_timeout(1000 * limits.HANG)
  failed = []
  page.on('pageerror', lambda error: failed.append(str(error)))
  page.goto(served[0])
  yield page
  page.close()
  assert not failed


def say(page, text):
  page.get_by_role('textbox', name='Text').fill(text)
  page.keyboard.press('Enter')


def expect(page, selector):
  from playwright import sync_api

  return sync_api.expect(page.locator(selector))


def test_an_answer_comes_bit_by_bit_its_thought_apart(page, runner):
  tokenizer = tokenizers.train(web.TEXTS * 30, 280)
  parts = {  # by their ends in the script
    len(runner.thought_ids) + n: tokenizer.decode(runner.answer_ids[:n])
    for n in range(1, len(runner.answer_ids), 3)
  }
  runner.stops_at = {at: threading.Event() for at in parts}
  assert len(parts) > 3 and all(map(ANSWER.startswith, parts.values()))
  expect(page, '#model').to_have_text('tiny')
  say(page, 'What is 1 + 2?')
  expect(page, '.user').to_have_text('What is 1 + 2?')
  for at, part in parts.items():
    expect(page, '.assistant').to_have_text(part)
    expect(page, '.thought div').to_have_text(THOUGHT)
    runner.stops_at[at].set()
  expect(page, '.note').to_contain_text('tokens')
  assert page.locator('.assistant').text_content() == ANSWER
  assert page.locator('.thought div').text_content() == THOUGHT
  assert page.locator('.assistant i, .thought b').count() == 0


def test_the_conversation_goes_on_without_thoughts(page):
  asked = []
  page.on('request', lambda sent: asked.append(sent.post_data_json))
  for count in (1, 2):
    say(page, 'Hello')
    expect(page, '.note').to_have_count(count)
  hello = {'role': 'user', 'content': 'Hello'}
  answer = {'role': 'assistant', 'content': ANSWER}
  assert asked[-1]['messages'] == [hello, answer, hello]
  page.get_by_role('button', name='Clear').click()
  expect(page, '#log > *').to_have_count(0)
  say(page, 'Hello')
  expect(page, '.note').to_have_count(1)
  assert asked[-1]['messages'] == [hello]


def test_stop_ends_it_here_and_there(page, runner, served):
  runner.seconds = 0.1  # not to be at its end before it is stopped
  page.get_by_label('chat').uncheck()
  page.get_by_label('tokens').fill('400')
  say(page, 'x')
  expect(page, '.assistant').not_to_be_empty()
  page.get_by_role('button', name='Stop').click()
  expect(page, '.note').to_have_text('stopped')
  expect(page, '#send').to_be_visible()
  web.idle(served[1])
  assert served[1].counts['abort'] == 1


def test_errors_are_shown_and_can_be_mended(page, runner):
  page.get_by_label('tokens').fill('501')
  say(page, 'Hello')
  expect(page, '.error').to_have_text('max_tokens=501 must be in [0, 500]')
  expect(page, '.assistant').to_have_count(0)
  page.get_by_label('tokens').fill('400')
  page.get_by_label('chat').uncheck()
  runner.seconds = 0.1  # not to be at its end before it fails
  say(page, 'Hello')
  expect(page, '.assistant').not_to_be_empty()
  runner.fails = True
  expect(page, '.error').to_have_count(2)
  expect(page, '.error >> nth=1').to_have_text('the model has ended')


def test_a_missing_key_is_said(browser):
  tokenizer = tokenizers.train(web.TEXTS * 30, 280)
  with web.serving(tokenizer, api_key='k') as (address, _):
    page = browser.new_page()
    page.goto(address)
    expect(page, '#model').to_have_text('the API key is missing or wrong')
    page.goto(f'{address}/?#key=k')
    expect(page, '#model').to_have_text('tiny')
    page.close()


@pytest.mark.parametrize(
  'width', [320, pytest.param(390, marks=pytest.mark.nightly), 1280]
)
def test_nothing_is_wider_than_the_screen(page, width):
  page.set_viewport_size({'width': width, 'height': 700})
  say(page, 'A word ' + 'thatdoesnotend' * 30)
  expect(page, '.note').to_have_count(1)
  wide = 'document.documentElement.scrollWidth'
  assert page.evaluate(wide) <= width
  for name in ('Send', 'Clear'):
    box = page.get_by_role('button', name=name).bounding_box()
    assert box['x'] >= 0 and box['x'] + box['width'] <= width
    assert box['y'] >= 0 and box['y'] + box['height'] <= 700
