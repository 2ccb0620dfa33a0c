r"""How every command starts and ends: absl flags, and exit code 2 for a user's mistake."""

import logging as stdlib_logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from absl import app, flags, logging

from dopd_jax import config as configs
from dopd_jax import distributed
from dopd_jax.errors import SaveFailed, Stopped, UserError, disk_reason

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # such as that torch is missing
OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'  # how XLA begins to say it
PACKAGE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'dopd_jax'


def run(
  main: Callable[[], None], several: bool = False, before: Callable[[], None] = lambda: None
) -> None:
  """Parses the flags, runs `main`, and exits: 0 done, 2 for a `UserError`, 130 for an interrupt.

  Args:
    main: the command.
    several: whether it can run on several processes.
    before: runs before jax has looked for devices.
  """

  def together(_):
    with distributed.ending_together():
      _guarded(main, several, before)

  app.run(together, flags_parser=_parse)


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


def keep_compilations() -> None:
  """Lets jax keep what it compiles in the user's cache, unless JAX_COMPILATION_CACHE_DIR is set.

  Not where several CPU devices work together: XLA:CPU (jaxlib 0.10.2) forgets in which order the
  collectives of a program run when it reads it back, so that shards meet in the wrong ones. That
  ends in crashes, or in wrong sums.
  """
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.config.update('jax_enable_compilation_cache', False)
  elif 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(CACHE / 'xla'))


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f'unexpected argument {rest[1]!r}: settings are given as --flag=value')
    return rest
  except (UserError, flags.Error) as error:
    # What a config file raised comes back wrapped, with its traceback folded into the message.
    ours = [e for e in _chain(error) if isinstance(e, UserError)]
    _fail(_sentence(ours[-1] if ours else error))
  except (AttributeError, KeyError, TypeError) as error:  # how config_flags reports a bad override
    _fail(f'bad --config override: {_sentence(error)}')


def _guarded(
  main: Callable[[], None], several: bool = False, before: Callable[[], None] = lambda: None
) -> None:
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  logging.get_absl_handler().addFilter(_ours_or_serious)
  try:
    before()
    distributed.start(several)
    keep_compilations()
    main()
  except UserError as error:
    of_save = _chain(error) if isinstance(error, SaveFailed) else ()
    if gone := next((e for e in of_save if distributed.lost(e)), None):
      _gone(gone)
    at_once = isinstance(error, SaveFailed) or any(disk_reason(e) for e in _chain(error))
    _fail(str(error), at_once)
  except Stopped as error:
    print(f'stopped: {error}', file=sys.stderr)
    sys.exit(1)
  except OSError as error:
    if not disk_reason(error):  # a file of anybody, but only what a full or closed disk says
      raise
    where = error.filename or 'a file of the run'
    _fail(
      f'{where} cannot be used ({error.strerror}): make room or choose another place, then start '
      'again; finished checkpoints are kept',
      at_once=True,
    )
  except KeyboardInterrupt:
    sys.exit(130)
  except Exception as error:
    if _is_out_of_memory(error):
      _fail(
        f'out of memory ({" ".join(str(error).split())[:160]}): lower microbatch, head_tile or '
        'rollout.prompts_at_once (rollout.slots where completions are of uneven length), and start '
        'again; finished checkpoints are kept'
      )
    if not distributed.lost(error):
      raise
    _gone(error)


def _gone(error: BaseException) -> NoReturn:
  print(
    f'stopped: another process of this run is gone ({_sentence(error)[:99]}): see its own log, '
    'then start all of them again; the same command goes on from the last checkpoint',
    file=sys.stderr,
  )
  sys.exit(1)


def _ours_or_serious(record) -> bool:
  """Libraries' INFO lines are not the user's, nor is a trace of what Orbax also raises to us."""
  if str(PACKAGE) in record.pathname:
    return True
  told_twice = record.exc_info and 'orbax' in record.pathname
  return record.levelno >= stdlib_logging.WARNING and not told_twice


def _is_out_of_memory(error: Exception) -> bool:
  of_xla = isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY in str(error)
  return of_xla or isinstance(error, MemoryError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """An error and all that it was raised from."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _sentence(error: BaseException) -> str:
  while error.args and isinstance(error.args[0], BaseException):  # errors wrapped in errors
    error = error.args[0]
  return ' '.join(str(error.args[0] if error.args else error).split())


def _fail(sentence: str, at_once: bool = False) -> NoReturn:
  print(f'error: {sentence}', file=sys.stderr, flush=True)
  if at_once:  # exit handlers of libraries would only fail on the same disk, with tracebacks
    sys.stdout.flush()
    os._exit(2)
  sys.exit(2)
