"""Named shapes of the FP8 product, for tests and for the benchmark.

The 671B's (N, K) are those of its linears: q and kv down, q up, kv up, output,
and the experts' (gate and up together, down); tests have a smaller M.
"""

from typing import NamedTuple


class Case(NamedTuple):
  """One product: rows of a, rows of b, contracted dim."""

  m: int
  n: int
  k: int


V3 = {
  'q_kv_down': Case(4096, 2112, 7168),
  'q_up': Case(4096, 24576, 1536),
  'kv_up': Case(4096, 32768, 512),
  'attention_out': Case(4096, 7168, 16384),
  'gate_up': Case(4096, 4096, 7168),
  'down': Case(4096, 7168, 2048),
}
SMALL = {
  'one_block': Case(128, 128, 128),
  'two_tiles': Case(256, 256, 512),
  'tiny': Case(64, 64, 256),
  'one_row': Case(1, 128, 256),
  'rope_row': Case(128, 576, 384),
  'ragged': Case(200, 136, 272),
  'odd': Case(65, 33, 130),
}
