"""The one exception for mistakes that only the user can repair."""


class UserError(ValueError):
  """A mistake in a config, a file or a flag.

  The message is one sentence that says what is wrong and what to change. Commands print it and exit
  with code 2; library callers catch it like any `ValueError`.
  """
