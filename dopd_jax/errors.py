"""The two ways in which a command ends early."""


class UserError(ValueError):
  """A mistake in a config, a file or a flag.

  The message is one sentence that says what is wrong and what to change. Commands print it and exit
  with code 2; library callers catch it like any `ValueError`.
  """


class Stopped(RuntimeError):
  """The run cannot go on, through nobody's mistake: a loss that is not finite. Exit code 1."""
