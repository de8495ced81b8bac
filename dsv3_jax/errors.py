"""The one error that is the caller's: `dsv3` prints it and exits with 2.

Any other exception, a ValueError of some library included, is a fault of ours
and keeps its traceback.
"""


class InputError(ValueError):
  """Bad input, in one line: field or file, value, rule, what to do."""


# Exit codes of `dsv3`. 1 is a fault of ours, with its traceback.
EXIT_BAD_INPUT = 2  # one line, before anything compiles
EXIT_STUCK = 70  # no step finished in time; all stacks are on stderr
EXIT_SAVED_ON_SIGNAL = 75  # the same command goes on
EXIT_NON_FINITE = 76  # the last checkpoint stands
EXIT_CORRUPTION = 77  # one step, run twice, gave different bits
EXIT_NO_READER = 141  # stdout was closed, as after `| head`
