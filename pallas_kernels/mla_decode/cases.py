"""Named shapes of decoding, for tests and for the benchmark.

V3 has latents of 512 and rotary keys of 64; 128 heads are those of one device
without tensor parallelism, 16 those of one of eight. Two queries a row verify
one speculative token (TR 5.4.3).
"""

from typing import NamedTuple


class Case(NamedTuple):
  """Tokens of each row (its own queries included), and a query's shape."""

  lengths: tuple[int, ...]
  heads: int
  queries: int = 1
  latent: int = 512
  rotary: int = 64

  @property
  def blocks(self) -> int:
    """Columns of the block table: those of the longest row, one at least."""
    return max(-(-max(self.lengths) // 64), 1)


V3 = {
  'heads_16': Case((8192,) * 128, 16),
  'heads_128': Case((8192,) * 128, 128),
  'heads_128_speculative': Case((8192,) * 128, 128, queries=2),
  'heads_128_ragged': Case(tuple(range(64, 8193, 64)), 128),
  'heads_128_few_rows': Case((8192,) * 8, 128),
}
SMALL = {
  'tiny': Case((70, 5), 2, latent=128),
  'page_border': Case((64, 65, 128, 127), 4, latent=128),
  'ragged': Case((1, 130, 33, 200), 3, latent=128),
  'empty_row': Case((0, 77, 0), 4, latent=128),
  'speculative': Case((66, 2, 190), 4, queries=2, latent=128),
  'four_queries': Case((130, 4, 67), 5, queries=4, latent=128),
  'shorter_than_queries': Case((2, 65), 4, queries=3, latent=128),
  'v3_heads_16': Case((150, 64), 16),
  'v3_heads_128': Case((100,), 128),
}
