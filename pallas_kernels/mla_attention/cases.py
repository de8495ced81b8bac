"""Named shapes of MLA's attention, for tests and benchmark."""

from typing import NamedTuple


class Case(NamedTuple):
  """Sequences, tokens, heads; widths of a head; samples in a sequence."""

  batch: int
  length: int
  heads: int
  nope: int = 128
  rope: int = 64
  value: int = 128
  samples: tuple[int, ...] | None = None  # lengths; the rest is padding


V3 = {
  'pretrain': Case(1, 4096, 128),
  'packed': Case(1, 4096, 128, samples=(1000, 3, 2000, 600)),
}
SMALL = {
  'tiny': Case(2, 16, 2, 16, 8, 16),
  'one': Case(1, 1, 2, 16, 8, 16),
  'block': Case(1, 128, 1),
  'ragged': Case(1, 131, 2, 24, 8, 40),
  'packed': Case(2, 150, 2, 16, 8, 24, (70, 1, 60)),
  'padding': Case(1, 20, 1, 16, 8, 16, ()),
}
