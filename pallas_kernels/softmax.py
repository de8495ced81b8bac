"""Constants of the online softmax of kernels."""

import math

LOG2_E = math.log2(math.e)
# The score of masked keys, and the initial largest score. Not -inf, as
# differences of it are NaN; 2 to the power of HIDDEN - LEAST is zero.
HIDDEN, LEAST = -1e30, -5e29
