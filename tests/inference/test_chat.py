"""A conversation by a folder's template: thoughts, turns, ends of answers."""

import pytest

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data import tokenizer_files
from dsv3_jax.inference import chat, detokenizer, generate, llm
from dsv3_jax.inference import request as requests
from tests.data import folders
from tests.inference import counting

THINK, END = 300, 41


class Runner(counting.Runner):
  """Repeats a script behind each last <think>; keeps the longest row."""

  def __init__(self, script):
    super().__init__(302, room=600)
    self._script, self.row = script, []

  def following(self, row):
    row = row.tolist()
    self.row = max(self.row, row, key=len)
    at = row[::-1].index(THINK) - 1
    return self._script[at] if at < len(self._script) else 42


def conversation(template, script, **variables):
  settings = tokenizer_files.TokenizerSettings(
    templates={'default': template}, origin='x', eos_ids=(1, END)
  )
  tokenizer = tokenizers.Tokenizer(folders.thinking_text(), settings)
  ids = [x if isinstance(x, int) else tokenizer.encode(x) for x in script]
  flat = [i for x in ids for i in ([x] if isinstance(x, int) else x.tolist())]
  runner = Runner(flat)
  model = llm.LLM(runner.cfg, {}, {}, tokenizer)
  vars(model)['runner'] = runner
  return runner, chat.Conversation(
    model, requests.GREEDY, 50, 'Be kind.', variables
  )


def test_thoughts_are_told_apart_and_not_read_again():
  script = ['add(1, 2)', THINK + 1, 'print 3', END]
  runner, talking = conversation(folders.REASONING, script)
  pieces = list(talking.say('What?'))
  join = lambda is_thought: ''.join(x for t, x in pieces if t is is_thought)
  assert (join(True), join(False)) == ('add(1, 2)', 'print 3')
  assert talking.messages[-1] == {'role': 'assistant', 'content': 'print 3'}
  list(talking.say('And now?'))
  text = folders.tokenizer.Tokenizer(folders.thinking_text()).decode(runner.row)
  assert 'And now?' in text and text.count('add(1, 2)') == 1


def test_variables_reach_the_template():
  template = "{{ raise_exception('no ' ~ thinking) }}"
  _, talking = conversation(template, [], thinking=True)
  with pytest.raises(errors.InputError, match=r'^x: no True$'):
    next(talking.say('Hi'))


@pytest.mark.parametrize('step', [1, 3, 99])
def test_a_thought_that_the_prompt_has_opened(step):
  text, pieces = '<think> a</thi b</think>c<think>', []
  thoughts = detokenizer.Thoughts(inside=True)
  for start in range(0, len(text), step):
    pieces += thoughts.feed(text[start : start + step])
  pieces += thoughts.end()
  join = lambda is_thought: ''.join(x for t, x in pieces if t is is_thought)
  assert (join(True), join(False)) == ('<think> a</thi b', 'c<think>')


def test_each_of_several_tokens_ends_a_continuation():
  runner = counting.Runner()
  whole = generate.generate(runner, [[2, 9]], 12).tokens[0]
  first, other = whole[0], next(t for t in whole if t != whole[0])
  unused = next(t for t in range(counting.VOCAB) if t not in whole)
  for ends, count in (
    ((other, first), 1),
    ((unused, other), 1 + whole.index(other)),
    ((), 12),
  ):
    output = generate.generate(runner, [[2, 9]], 12, stop_id=ends)
    assert output.tokens == [whole[:count]]
