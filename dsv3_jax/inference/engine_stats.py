"""Counts of an engine, at one moment."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
  """What an engine holds, and what it has done so far.

  running, waiting: requests. preempted: how often a request was.
  num_blocks, blocks_in_use: of the latent cache, all ranks together.
  decode_steps: their number; decoded_rows: the rows of all of them;
  decoded_tokens: the tokens that they gave.
  speculative_tokens: tokens that decode steps verified; accepted_tokens: how
  many of these were right.
  rebalances: how often redundant experts were placed; None: there are none.
  balancedness: mean load of a device / highest, up to the last rebalance, with
  the placement before it; None: not known yet.
  """

  running: int
  waiting: int
  preempted: int
  num_blocks: int
  blocks_in_use: int
  decode_steps: int
  decoded_rows: int
  decoded_tokens: int
  speculative_tokens: int
  accepted_tokens: int
  rebalances: int | None = None
  balancedness: float | None = None

  @property
  def acceptance(self) -> float:
    """Share of speculative tokens accepted, 0 to 1; 0 if there were none."""
    return self.accepted_tokens / max(self.speculative_tokens, 1)

  @property
  def tokens_per_step(self) -> float:
    """Tokens that a decode step gives each row."""
    return self.decoded_tokens / max(self.decoded_rows, 1)
