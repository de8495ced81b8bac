"""The one error that is the caller's: `dsv3` prints it and exits with 2.

Any other exception, a ValueError of some library included, is a fault of ours
and keeps its traceback.
"""


class InputError(ValueError):
  """Bad input, in one line: field or file, value, rule, what to do."""
