"""Which sizes of steps a server compiles before it is ready.

A step's rows, tokens and pages are powers of two (`batching`), of which most
pairs never meet: a prefill has at most a chunk of tokens in all, and pages are
rounded up to a quarter of those of the longest row, or to four. Left out are
several prompts of which the cache has the beginning, and three, five or more
prompts whose sizes are rounded up beyond a chunk: these are compiled when they
are met.
"""

from dsv3_jax.inference import engine


def least_pages(max_seq_len: int) -> int:
  """To which block tables of a server are rounded up: three sizes are left."""
  full = _powers(-(-max_seq_len // engine.PAGE))[-1]
  return max(full // 4, min(full, 4))  # fewer than four are not faster


def sizes(session: engine.Engine, max_seq_len: int) -> list[engine.Size]:
  """Those to compile, in the order in which one is likely to need them.

  Args:
    max_seq_len: of a row.
  """
  if session.invariant:
    return _invariant(session)
  ranks = session.steps.num_ranks
  each = _powers(session.scheduler.max_rows // ranks)
  most_rows = [ranks * rows for rows in each]
  full = _powers(-(-max_seq_len // engine.PAGE))
  least, drafts = session.least_pages, session.steps.num_drafts
  tables = [pages for pages in full if pages >= least]
  chunk = max(session.scheduler.chunk // engine.PAGE, 1)
  widths = [width for width in full if width <= chunk]
  prefill = [
    engine.Size(rows, engine.PAGE * width, max(width, least), 'prefill')
    for rows in most_rows
    for width in widths
    if rows // ranks * width <= chunk
  ]
  beyond = 2 * full[-1]  # where what a row is padded with passes its end
  decode = [
    engine.Size(rows, 1 + drafts, pages, 'decode')
    for pages in (*tables, beyond)
    for rows in most_rows
    if pages < beyond or drafts
  ]
  more = [
    engine.Size(ranks, engine.PAGE * width, pages, 'extend')
    for pages in (*tables, beyond)
    for width in widths
    if width <= pages < beyond or width >= 4
  ]
  alone = [size for size in prefill if size.rows == ranks]
  others = [size for size in prefill if size.rows > ranks]
  return alone + decode + more + others


def _invariant(session: engine.Engine) -> list[engine.Size]:
  """The two that there are."""
  longest = session.steps.cfg.model.max_seq_len
  widths = {'extend': session.scheduler.chunk}
  widths['decode'] = 1 + session.steps.num_drafts
  ranks = session.steps.num_ranks
  each = _powers(session.scheduler.max_rows // ranks)[-1]
  rows = {'extend': ranks, 'decode': ranks * each}
  return [
    engine.Size(rows[kind], width, session.pages_of_table(longest, width), kind)
    for kind, width in widths.items()
  ]


def _powers(most: int) -> list[int]:
  """Powers of two, up to the first that is not less."""
  return [1 << i for i in range((most - 1).bit_length() + 1)]
