"""The two ways in which a command ends early."""

import errno
import os

# What a full or closed disk says.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def first_line(error: BaseException) -> str:
  """What an error says first, without its full stop."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return (lines[0] if lines else type(error).__name__).rstrip('.')


def disk_reason(error: BaseException) -> str:
  """The words of a full or closed disk behind an error, '' for another one."""
  if isinstance(error, OSError) and error.errno in DISK:
    return os.strerror(error.errno)
  # TensorStore says so in words only.
  return next((os.strerror(code) for code in DISK if os.strerror(code) in str(error)), '')


class UserError(ValueError):
  """A mistake in a config, a file or a flag.

  The message is one sentence that says what is wrong and what to change. Commands print it and exit
  with code 2; library callers catch it like any `ValueError`.
  """


class SaveFailed(UserError):
  """A checkpoint could not be written; threads of a library may still be at it."""


class Stopped(RuntimeError):
  """The run cannot go on, through nobody's mistake: a loss that is not finite. Exit code 1."""
