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
    text = self._decode(self._ids)
    if text.endswith(_BROKEN):
      return ''
    new = text[self._told :]
    if len(self._ids) > 16:  # a text may depend on the token before it
      self._ids = self._ids[-1:]
      text = self._decode(self._ids)
    self._told = len(text)
    return new

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
  """Parts text into what stands between think tags and what does not."""

  def __init__(self):
    self._held = ''
    self.inside = False

  def feed(self, text: str) -> list[tuple[bool, str]]:
    """Pieces, each with whether it is a thought."""
    text, pieces = self._held + text, []
    while True:
      tag = END_THINK if self.inside else THINK
      at = text.find(tag)
      if at < 0:
        break
      pieces.append((self.inside, text[:at]))
      text, self.inside = text[at + len(tag) :], not self.inside
    cut = len(text) - _begun(text, tag)
    pieces.append((self.inside, text[:cut]))
    self._held = text[cut:]
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
