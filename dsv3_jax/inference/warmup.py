"""Which step shapes a server compiles before it is ready.

Rows, tokens and blocks of a step are powers of two (`engine`). Most
combinations never occur: a prefill has at most a chunk of tokens in all, and
block tables are rounded up to a quarter of that of the longest row, or to four
blocks. Left out are prefills of several prompts that the cache already has
tokens of, and of three, five or more prompts whose padded sizes exceed a chunk:
these are compiled when they first occur.
"""

from dsv3_jax.inference import engine, scheduler


def min_blocks(max_seq_len: int) -> int:
  """The smallest size of a server's block tables; three sizes remain."""
  full = _powers(-(-max_seq_len // engine.BLOCK_SIZE))[-1]
  return max(full // 4, min(full, 4))  # fewer than four are not faster


def shapes(
  model_engine: engine.Engine, max_seq_len: int
) -> list[engine.StepShape]:
  """The shapes to compile, in the order in which they are likely needed.

  Args:
    max_seq_len: of a row.
  """
  if model_engine.batch_invariant:
    return _batch_invariant(model_engine)
  ranks = model_engine.num_ranks
  row_counts = [ranks * rows for rows in _powers(model_engine.max_rows)]
  full = _powers(-(-max_seq_len // engine.BLOCK_SIZE))
  least = model_engine.min_blocks
  decode_width = model_engine.decode_width
  tables = [blocks for blocks in full if blocks >= least]
  chunk = max(model_engine.chunk // engine.BLOCK_SIZE, 1)
  widths = [width for width in full if width <= chunk]
  prefill = [
    engine.StepShape(
      rows, engine.BLOCK_SIZE * width, max(width, least), 'prefill'
    )
    for rows in row_counts
    for width in widths
    if rows // ranks * width <= chunk
  ]
  beyond = 2 * full[-1]  # for a row whose padding passes the longest table
  decode = [
    engine.StepShape(rows, decode_width, blocks, 'decode')
    for blocks in (*tables, beyond)
    for rows in row_counts
    if blocks < beyond or decode_width > 1
  ]
  extend = [
    engine.StepShape(ranks, engine.BLOCK_SIZE * width, blocks, 'extend')
    for blocks in (*tables, beyond)
    for width in widths
    if width <= blocks < beyond or width >= 4
  ]
  score = [
    engine.StepShape(ranks, engine.BLOCK_SIZE * width, blocks, 'score')
    for blocks in tables
    for width in widths
    if width <= min(blocks, scheduler.SCORED_CHUNK // engine.BLOCK_SIZE)
  ]
  single = [shape for shape in prefill if shape.rows == ranks]
  several = [shape for shape in prefill if shape.rows > ranks]
  return single + decode + extend + several + score


def _batch_invariant(model_engine: engine.Engine) -> list[engine.StepShape]:
  """The only shapes of a batch invariant engine."""
  longest, ranks = model_engine.max_seq_len, model_engine.num_ranks
  chunk = model_engine.chunk
  widths = {'extend': chunk, 'decode': model_engine.decode_width}
  widths['score'] = min(chunk, scheduler.SCORED_CHUNK)
  per_rank = _powers(model_engine.max_rows)[-1]
  rows = {'extend': ranks, 'decode': ranks * per_rank, 'score': ranks}
  return [
    engine.StepShape(
      rows[kind], width, model_engine.num_table_blocks(longest, width), kind
    )
    for kind, width in widths.items()
  ]


def _powers(most: int) -> list[int]:
  """Powers of two, up to the first that is not less."""
  return [1 << i for i in range((most - 1).bit_length() + 1)]
