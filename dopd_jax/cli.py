r"""How every command starts and ends: absl flags, and exit code 2 for a user's mistake."""

import errno
import logging as stdlib_logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging

from dopd_jax import config as configs
from dopd_jax.errors import Stopped, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
PACKAGE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'dopd_jax'


def run(main: Callable[[], None]) -> None:
  """Parses the flags, runs `main`, and exits: 0 done, 2 for a `UserError`, 130 for an interrupt."""
  app.run(lambda _: _guarded(main), flags_parser=_parse)


def config_of(holder) -> configs.Config:
  """The validated config behind a `config_flags` flag; raises `UserError` if there is none."""
  try:
    value = holder.value
    if value is None:
      raise UserError('--config is missing: give --config=configs/NAME.py')
    return configs.validate(value)
  except OSError as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise UserError(f'--config could not be read: {lines[-1]}') from error


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f'unexpected argument {rest[1]!r}: settings are given as --flag=value')
    return rest
  except flags.Error as error:
    _fail(_sentence(error))
  except UserError as error:
    _fail(str(error))
  except (AttributeError, KeyError, TypeError) as error:  # how config_flags reports a bad override
    _fail(f'bad --config override: {_sentence(error)}')


def _guarded(main: Callable[[], None]) -> None:
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  logging.get_absl_handler().addFilter(_ours_or_serious)
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(CACHE / 'xla'))
  try:
    main()
  except UserError as error:
    _fail(str(error))
  except Stopped as error:
    print(f'stopped: {error}', file=sys.stderr)
    sys.exit(1)
  except OSError as error:
    if error.errno not in FULL:  # a file of anybody, but only what a full or closed disk says
      raise
    where = error.filename or 'a file of the run'
    _fail(
      f'{where} cannot be used ({os.strerror(error.errno)}): make room or choose another place, '
      'then start again; finished checkpoints are kept'
    )
  except KeyboardInterrupt:
    sys.exit(130)


def _ours_or_serious(record) -> bool:
  """Libraries' INFO lines are not the user's."""
  return record.levelno >= stdlib_logging.WARNING or str(PACKAGE) in record.pathname


def _sentence(error: BaseException) -> str:
  while error.args and isinstance(error.args[0], BaseException):  # errors wrapped in errors
    error = error.args[0]
  return ' '.join(str(error.args[0] if error.args else error).split())


def _fail(sentence: str) -> NoReturn:
  print(f'error: {sentence}', file=sys.stderr)
  sys.exit(2)
