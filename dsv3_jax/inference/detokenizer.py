"""Incremental text from tokens: characters, stop strings, thoughts.

A token may end within a character, and the end of the text may be the beginning
of a stop string or a tag. Such an end is held back until it is complete, or
turns out to be something else.
"""

from collections.abc import Callable, Sequence

THINK, END_THINK = '<think>', '</think>'
_BROKEN = '\ufffd'


class Characters:
  """Tokens in, text out, in whole characters only.

  Decodes only the last few tokens again for each new one.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str]):
    self._decode = decode
    self._ids: list[int] = []  # the last ones, from a whole character on
    self._num_returned = 0  # characters of their text

  def feed(self, token: int) -> str:
    """The text that a token adds."""
    self._ids.append(token)
    text, end = self._whole()
    new = text[self._num_returned : end]
    if len(self._ids) > 16:  # a character has at most four
      self._ids = self._ids[-4:]
      text, end = self._whole()
    self._num_returned = end
    return new

  def _whole(self) -> tuple[str, int]:
    """The text, and how much of it is final: its end may lack bytes."""
    text = self._decode(self._ids)
    return text, len(text) - text.endswith(_BROKEN)

  def end(self) -> str:
    """The text held back, as replacement characters if it is incomplete."""
    return self._decode(self._ids)[self._num_returned :]


class Stops:
  """Text up to the first of several stop strings, which is left out."""

  def __init__(self, stops: Sequence[str]):
    self._stops = [stop for stop in stops if stop]
    self._held = ''
    self.stopped = False

  def feed(self, text: str) -> str:
    """The text that is certain to come before any stop string."""
    if self.stopped:
      return ''
    text = self._held + text
    places = [at for s in self._stops if (at := text.find(s)) >= 0]
    if places:
      self.stopped, self._held = True, ''
      return text[: min(places)]
    size = max((partial_match(text, stop) for stop in self._stops), default=0)
    end = len(text) - size
    self._held = text[end:]
    return text[:end]

  def end(self) -> str:
    """The text held back."""
    held, self._held = self._held, ''
    return '' if self.stopped else held


class Thoughts:
  """Separates the thought, in think tags, from the rest of an answer."""

  def __init__(self, inside: bool = False):
    """Args: inside: the prompt ends with the first tag."""
    self._held = ''
    self._may_begin = not inside
    self.inside = inside

  def feed(self, text: str) -> list[tuple[bool, str]]:
    """Pieces, each with whether it is a thought."""
    text, self._held = self._held + text, ''
    if self._may_begin:
      if len(text) < len(THINK) and THINK.startswith(text):
        self._held = text
        return []
      self._may_begin, self.inside = False, text.startswith(THINK)
      text = text.removeprefix(THINK)
    pieces = []
    if self.inside:
      thought, end_tag, rest = text.partition(END_THINK)
      held = 0 if end_tag else partial_match(thought, END_THINK)
      end = len(thought) - held
      pieces.append((True, thought[:end]))
      self._held = thought[end:]
      self.inside, text = not end_tag, rest
    pieces.append((False, text))
    return [piece for piece in pieces if piece[1]]

  def end(self) -> list[tuple[bool, str]]:
    """The text held back."""
    held, self._held = self._held, ''
    return [(self.inside, held)] if held else []


def partial_match(text: str, word: str) -> int:
  """How many characters at the end of the text are a beginning of the word."""
  for size in range(min(len(word) - 1, len(text)), 0, -1):
    if text.endswith(word[:size]):
      return size
  return 0
