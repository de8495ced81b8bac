"""InputError, the caller's error, and the exit codes of `dsv3`.

`dsv3` prints an InputError in one line and exits with 2. Any other exception,
a library's ValueError included, is a bug of ours and keeps its traceback.
"""


class InputError(ValueError):
  """Bad input, in one line: field or file, value, rule, what to do."""


class FullDiskError(InputError):
  """A file cannot be written: the disk is full, or a quota or limit is reached.

  Args:
    reason: of the operating system.
    advice: what is safe, and what to do.
  """

  def __init__(self, path: object, reason: str, advice: str):
    super().__init__(f'{path} cannot be written ({reason}): {advice}')
    self.reason = reason


# Exit codes of `dsv3`. 1 is a bug of ours, with its traceback.
EXIT_BAD_INPUT = 2  # one line, before anything compiles; or a full disk
EXIT_STUCK = 70  # no step finished in time; all stacks are on stderr
EXIT_SAVED_ON_SIGNAL = 75  # the same command resumes
EXIT_NON_FINITE = 76  # the last checkpoint is good
EXIT_CORRUPTION = 77  # one step, run twice, gave different bits
EXIT_NO_READER = 141  # stdout was closed, as after `| head`
