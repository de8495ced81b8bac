"""Named shapes of the experts' FP8 products, for tests and benchmark."""

from typing import NamedTuple


class Case(NamedTuple):
  """Rows of each expert, before padding to 128; rows of b, contracted dim."""

  sizes: tuple[int, ...]
  n: int
  k: int


V3 = {
  'gate_up': Case((4096,) * 8, 4096, 7168),
  'down': Case((4096,) * 8, 7168, 2048),
}
SMALL = {
  'even': Case((128, 128, 256, 128), 256, 256),
  'ragged': Case((1, 200, 127, 129), 128, 384),
  'empty': Case((0, 130, 0, 64), 128, 256),
  'all_to_one': Case((0, 0, 500, 0), 128, 128),
  'none': Case((0, 0), 128, 128),
  'odd': Case((5, 260), 72, 200),
}
