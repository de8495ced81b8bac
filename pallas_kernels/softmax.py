"""Numbers of the softmax that kernels compute while keys pass."""

import math

LOG2_E = math.log2(math.e)
# Scores of what is not seen, and where largest scores begin. Not -inf, whose
# differences are NaN; 2 to the power of HIDDEN - LEAST is zero.
HIDDEN, LEAST = -1e30, -5e29
