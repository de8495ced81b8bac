"""Text in pieces is the text as a whole, whatever the pieces are."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import detokenizer

TEXTS = ['Hello, world!\n\nx = 1', 'd\u00e9j\u00e0 vu \u2014 \u4f60\u597d']


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.train(TEXTS * 30, 280)


@hypothesis.given(st.text(max_size=60))
def test_characters_are_whole(tokenizer, written):
  ids = tokenizer.encode(written).tolist()
  stream = detokenizer.Characters(tokenizer.decode)
  pieces = [stream.feed(i) for i in ids]
  assert '\ufffd' in written or '\ufffd' not in ''.join(pieces)
  assert ''.join(pieces) + stream.end() == tokenizer.decode(ids) == written


def test_many_tokens_are_not_decoded_again_and_again(tokenizer):
  sizes = []

  def decode(ids):
    sizes.append(len(ids))
    return tokenizer.decode(ids)

  ids = tokenizer.encode('Hello, world! ' * 100).tolist()
  stream = detokenizer.Characters(decode)
  assert ''.join(map(stream.feed, ids)) == 'Hello, world! ' * 100
  assert max(sizes) <= 17


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
  ids = tokenizer.encode('\u5b57').tolist()  # is in no text of the training
  assert len(ids) == 3
  stream = detokenizer.Characters(tokenizer.decode)
  assert [stream.feed(i) for i in ids[:-1]] == [''] * (len(ids) - 1)
  assert stream.end() == '\ufffd'


def test_text_that_is_never_whole_comes_all_the_same(tokenizer):
  sizes = []

  def decode(ids):
    sizes.append(len(ids))
    return tokenizer.decode(ids)

  first = tokenizer.encode('\u5b57').tolist()[0]  # never a whole character
  stream = detokenizer.Characters(decode)
  pieces = [stream.feed(first) for _ in range(100)]
  assert ''.join(pieces) + stream.end() == '\ufffd' * 100
  assert max(sizes) <= 17


def split(whole, places):
  places = sorted({p % (len(whole) + 1) for p in places})
  edges = [0, *places, len(whole)]
  return [whole[a:b] for a, b in itertools.pairwise(edges)]


WORDS = st.lists(
  st.sampled_from(['a', 'b', 'ab', '<', '<think>', '</think>', 'th', '\n']),
  max_size=12,
).map(''.join)
PLACES = st.lists(st.integers(0, 99), max_size=8)


@hypothesis.given(WORDS, PLACES, st.lists(st.sampled_from(['ab', 'bb', '\n'])))
def test_text_ends_at_the_first_stop(whole, places, stops):
  stream = detokenizer.Stops(stops)
  text = ''.join(stream.feed(piece) for piece in split(whole, places))
  text += stream.end()
  starts = [whole.find(s) for s in stops if s in whole]
  assert text == (whole[: min(starts)] if starts else whole)
  assert stream.stopped == bool(starts)


@hypothesis.given(WORDS, PLACES)
def test_a_thought_is_what_an_answer_begins_with(whole, places):
  stream, got = detokenizer.Thoughts(), {False: '', True: ''}
  for piece in split(whole, places):
    for inside, part in stream.feed(piece):
      got[inside] += part
  for inside, part in stream.end():
    got[inside] += part
  want = {False: whole, True: ''}
  if whole.startswith('<think>'):
    thought, _, rest = whole.removeprefix('<think>').partition('</think>')
    want = {False: rest, True: thought}
  assert got == want


def test_nothing_is_held_back_longer_than_it_must_be():
  stream = detokenizer.Stops(['END'])
  assert [stream.feed(x) for x in 'aEbENc'] == ['a', '', 'Eb', '', '', 'ENc']
  thoughts = detokenizer.Thoughts()
  assert thoughts.feed('<thi') == []
  assert thoughts.feed('s') == [(False, '<this')]
  assert thoughts.feed('<think>') == [(False, '<think>')]
