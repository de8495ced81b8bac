"""From documents to rows of T + 1 tokens (TR 4.1, 5.1).

  1. fill-in-the-middle (FIM): some documents are split at two places and
     written as prefix, suffix, middle (PSM)
  2. some punctuation + newline tokens are split in two
  3. documents longer than a row are split into rows
  4. best-fit packing: a piece goes to the open row that it fills best
     (Grain's implementation, after Ding et al., 2404.10830)

FIM splits the text, not the tokens, so that the model also learns to continue
from the middle of a word. In pre-training, samples in a row attend to each
other; with `isolate_samples` (SFT) they do not and are never split over rows.
"""

from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.data import tokenizer as tokenizers


def encode_document(
  record: dict[str, Any],
  tokenizer: tokenizers.Tokenizer,
  cfg: config.DataConfig,
  rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Encodes one document as bos, text, eos.

  A share `data.fim_rate` of the documents is written in PSM order instead.

  Returns:
    `tokens` int32 and `learned` int32, equally long; `learned` is 1 on tokens
    that are targets of the loss, 0 on the prompts of chats.
  """
  if 'messages' in record:
    tokens, learned = tokenizer.encode_chat(record['messages'])
    return {'tokens': tokens, 'learned': learned.astype(np.int32)}
  text = record['text']
  if rng.random() < cfg.fim_rate:
    tokens = fim_tokens(text, tokenizer, rng)
  else:
    tokens = tokenizer.encode(text)
  tokens = split_at_random(tokens, tokenizer, cfg.split_rate, rng)
  ends = np.array([tokenizer.bos_id, tokenizer.eos_id], np.int32)
  tokens = np.concatenate([ends[:1], tokens, ends[1:]])
  return {'tokens': tokens, 'learned': np.ones_like(tokens)}


def fim_tokens(
  text: str, tokenizer: tokenizers.Tokenizer, rng: np.random.Generator
) -> np.ndarray:
  """<begin> prefix <hole> suffix <end> middle, split at two random places."""
  first, second = sorted(rng.integers(0, len(text) + 1, size=2))
  parts = (text[:first], text[second:], text[first:second])
  marks = (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
  pieces = []
  for mark, part in zip(marks, parts, strict=True):
    pieces += [np.array([mark], np.int32), tokenizer.encode(part)]
  return np.concatenate(pieces)


def split_at_random(
  tokens: np.ndarray,
  tokenizer: tokenizers.Tokenizer,
  rate: float,
  rng: np.random.Generator,
) -> np.ndarray:
  """Splits punctuation + newline tokens, each with probability `rate`."""
  if not rate:
    return tokens
  table = tokenizer.punctuation_newlines
  candidates = np.flatnonzero(np.isin(tokens, tokenizer.splittable_ids))
  chosen = candidates[rng.random(len(candidates)) < rate]
  pieces, start = [], 0
  for at in chosen:
    pieces += [tokens[start:at], table[int(tokens[at])]]
    start = at + 1
  return np.concatenate([*pieces, tokens[start:]])


def split_document(
  document: dict[str, np.ndarray], length: int, isolated: bool
) -> list[dict[str, np.ndarray]]:
  """Splits into pieces of `length` tokens; truncates isolated samples."""
  total = len(document['tokens'])
  stop = min(total, length) if isolated else total
  return [
    {name: x[start : min(start + length, stop)] for name, x in document.items()}
    for start in range(0, stop, length)
  ]


def to_example(
  row: dict[str, np.ndarray], isolated: bool
) -> dict[str, np.ndarray]:
  """Converts a packed row of T + 1 tokens to inputs and targets of length T.

  Args:
    row: `tokens`, `learned`, and from the packer `tokens_segment_ids` (from 1,
      0 on padding) and `tokens_positions` (from 0 in each segment).
    isolated: samples of the row do not attend to each other.
  Returns:
    tokens, targets, positions, segments (int32) and weights (f32), as in
    `nn.model.Batch`. Without isolation, a document's last token predicts the
    next document's first token. Padding is never a target.
  """
  segments = row['tokens_segment_ids']
  weights = (segments > 0) * row['learned']
  weights_T = weights[1:].astype(np.float32)
  positions_T = np.arange(len(segments) - 1, dtype=np.int32)
  if isolated:
    weights_T *= segments[1:] == segments[:-1]
    positions_T = row['tokens_positions'][:-1].astype(np.int32)
  return {
    'tokens_BT': row['tokens'][:-1].astype(np.int32),
    'targets_BT': row['tokens'][1:].astype(np.int32),
    'positions_BT': positions_T,
    'segments_BT': segments[:-1].astype(np.int32),
    'weights_BT': weights_T,
  }
