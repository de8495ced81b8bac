"""The three products of a Linear in FP8, sums exact in float64 (TR 3.3).

  Fprop  y  = x W      x  in tiles 1 x 128 along D    W in blocks 128 x 128
  Dgrad  dx = dy W^T   dy in tiles 1 x 128 along F    W in blocks 128 x 128
  Wgrad  dW = x^T dy   both in tiles of 128 tokens x 1 channel: x is what the
                       forward tiles hold, dequantised and quantised again;
                       dy is quantised again from its own values

Every operand is e4m3. `Dgrad` with dy in blocks of 128 x 128 is the published
negative ablation. Of grouped experts each has its own rows, in order, each
group padded with zero rows to whole tiles.

From the facts alone. Letters: M tokens, D in, F out, E experts, A rows sorted
by expert without the padding.
"""

import numpy as np

from . import fp8_formats as formats

PLAIN, ROW, COLUMN, BLOCK = (
  formats.PLAIN,
  formats.ROW,
  formats.COLUMN,
  formats.BLOCK,
)


def fprop(x_MD, w_DF, x_scaling=PLAIN, w_scaling=PLAIN):
  """y_MF = x W."""
  x_MD = formats.fake(x_MD, ROW, x_scaling)
  return x_MD @ formats.fake(w_DF, BLOCK, w_scaling)


def dgrad(dy_MF, w_DF, dy_scaling=PLAIN, w_scaling=PLAIN, block=False):
  """dx_MD = dy W^T; `block` puts dy into blocks of 128 x 128 instead."""
  dy_MF = formats.fake(dy_MF, BLOCK if block else ROW, dy_scaling)
  return dy_MF @ formats.fake(w_DF, BLOCK, w_scaling).T


def requantize(x_MD, x_scaling=PLAIN):
  """x as Wgrad sees it: tiles 1 x 128 first, of these tiles 128 x 1."""
  x_MD = formats.fake(x_MD, ROW, x_scaling)
  return formats.fake(x_MD, COLUMN, x_scaling)


def wgrad(x_MD, dy_MF, x_scaling=PLAIN, dy_scaling=PLAIN):
  """dW_DF = x^T dy."""
  dy_MF = formats.fake(dy_MF, COLUMN, dy_scaling)
  return requantize(x_MD, x_scaling).T @ dy_MF


def pad_groups(x_AD, counts_E, multiple=128):
  """Rows of each expert from a multiple on, with zero rows up to the next."""
  parts, start = [], 0
  for count in counts_E:
    rows = -(-int(count) // multiple) * multiple
    part_ID = np.zeros((rows, np.shape(x_AD)[1]))
    part_ID[:count] = x_AD[start : start + count]
    parts.append(part_ID)
    start += int(count)
  assert start == len(x_AD)
  return np.concatenate(parts)


def _groups(counts_E):
  """(expert, its rows) of compact sorted rows."""
  ends_E = np.cumsum(counts_E)
  for e, end in enumerate(ends_E):
    yield e, slice(int(end - counts_E[e]), int(end))


def grouped_fprop(x_AD, w_EDF, counts_E, x_scaling=PLAIN, w_scaling=PLAIN):
  """y_AF: every row times the weight of its expert."""
  y_AF = np.zeros((len(x_AD), w_EDF.shape[2]))
  for e, rows in _groups(counts_E):
    if counts_E[e]:
      y_AF[rows] = fprop(x_AD[rows], w_EDF[e], x_scaling, w_scaling)
  return y_AF


def grouped_dgrad(
  dy_AF, w_EDF, counts_E, dy_scaling=PLAIN, w_scaling=PLAIN, block=False
):
  """dx_AD: every row times the transposed weight of its expert."""
  dx_AD = np.zeros((len(dy_AF), w_EDF.shape[1]))
  for e, rows in _groups(counts_E):
    if counts_E[e]:
      dx_AD[rows] = dgrad(dy_AF[rows], w_EDF[e], dy_scaling, w_scaling, block)
  return dx_AD


def grouped_wgrad(x_AD, dy_AF, counts_E, x_scaling=PLAIN, dy_scaling=PLAIN):
  """dW_EDF: tiles of tokens start at every expert; no rows, no dW."""
  dw_EDF = np.zeros((len(counts_E), x_AD.shape[1], dy_AF.shape[1]))
  for e, rows in _groups(counts_E):
    if counts_E[e]:
      dw_EDF[e] = wgrad(x_AD[rows], dy_AF[rows], x_scaling, dy_scaling)
  return dw_EDF


def difference(got, want):
  """1 - 2 <x, y> / (|x|^2 + |y|^2): 0 where equal."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return 1 - 2 * np.sum(got * want) / np.sum(got**2 + want**2)
