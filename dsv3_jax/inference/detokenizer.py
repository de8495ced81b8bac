"""Text of tokens as they come: whole characters, up to a stop, thoughts apart.

A token may end within a character, and text may begin what turns out to be a
stop or a tag; such an end is held back until it is clear what it is.
"""

from collections.abc import Callable, Sequence

THINK, END_THINK = '<think>', '</think>'
_BROKEN = '\ufffd'


class Characters:
  """Tokens in, text out; only whole characters, in as few decodings as do."""

  def __init__(self, decode: Callable[[Sequence[int]], str]):
    self._decode = decode
    self._ids: list[int] = []  # since some token at which text was whole
    self._told = 0  # characters of their text

  def feed(self, token: int) -> str:
    """What a token adds."""
    self._ids.append(token)
    text, end = self._whole()
    new = text[self._told : end]
    if len(self._ids) > 16:  # of a character at most four tokens
      self._ids = self._ids[-4:]
      text, end = self._whole()
    self._told = end
    return new

  def _whole(self) -> tuple[str, int]:
    """Text, and how much of it is certain: its end may lack bytes."""
    text = self._decode(self._ids)
    return text, len(text) - text.endswith(_BROKEN)

  def end(self) -> str:
    """What was held back, broken as it may be."""
    return self._decode(self._ids)[self._told :]


class Stops:
  """Text up to the first of some strings, which is not part of it."""

  def __init__(self, stops: Sequence[str]):
    self._stops = [stop for stop in stops if stop]
    self._held = ''
    self.stopped = False

  def feed(self, text: str) -> str:
    """What is certain to come before any stop."""
    if self.stopped:
      return ''
    text = self._held + text
    found = [at for s in self._stops if (at := text.find(s)) >= 0]
    if found:
      self.stopped, self._held = True, ''
      return text[: min(found)]
    size = max((_begun(text, stop) for stop in self._stops), default=0)
    cut = len(text) - size
    self._held = text[cut:]
    return text[:cut]

  def end(self) -> str:
    """What was held back."""
    held, self._held = self._held, ''
    return '' if self.stopped else held


class Thoughts:
  """Parts an answer that begins with a think tag from the thought."""

  def __init__(self):
    self._held = ''
    self._may_begin = True
    self.inside = False

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
      thought, found, rest = text.partition(END_THINK)
      cut = len(thought) - (0 if found else _begun(thought, END_THINK))
      pieces.append((True, thought[:cut]))
      self._held = thought[cut:]
      self.inside, text = not found, rest
    pieces.append((False, text))
    return [piece for piece in pieces if piece[1]]

  def end(self) -> list[tuple[bool, str]]:
    """What was held back."""
    held, self._held = self._held, ''
    return [(self.inside, held)] if held else []


def _begun(text: str, word: str) -> int:
  """How many characters at the end of the text begin the word."""
  for size in range(min(len(word) - 1, len(text)), 0, -1):
    if text.endswith(word[:size]):
      return size
  return 0
