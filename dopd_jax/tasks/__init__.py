"""Prompts, hints and verifiers that need no download.

plan_execute   the toy task: every token is planning or execution by construction
digits         the same with pictures: find a handwritten digit, read it
reasoning      families of reasoning_gym that carry a worked solution; exact match
hints          worked solutions without their results
verifiers      completion -> score, by the verifier that a record names
"""

import ast
import difflib
import inspect
from typing import Any
from urllib.parse import parse_qsl

from dopd_jax.errors import UserError
from dopd_jax.tasks import digits, plan_execute, reasoning
from dopd_jax.tasks.verifiers import verify as verify

_OWN = {'plan_execute': plan_execute.make_records, 'digits': digits.make_records}
_KINDS = {int: 'a whole number', float: 'a number', str: 'text'}


def make_records(name: str, size: int, seed: int, **options: Any) -> list[dict[str, Any]]:
  """Records of a task, as mappings with the columns that `dopd_jax.data` reads.

  Args:
    name: 'plan_execute', 'digits', or a family of reasoning_gym.
    size: number of records.
    seed: of the task.
    **options: of the task: `make_records` of `plan_execute`, `digits` or `reasoning`.

  Raises:
    UserError: no such task or option, or an impossible value.
  """
  if name not in _OWN:
    return reasoning.make_records(name, size, seed, **options)
  known = dict(list(inspect.signature(_OWN[name]).parameters.items())[2:])
  for option, value in options.items():
    if option not in known:
      near = difflib.get_close_matches(option, list(known), n=1, cutoff=0)[0]
      raise UserError(f'{name} has no option {option!r}: did you mean {near!r}?')
    kind = known[option].annotation
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
      raise UserError(f'{name} takes {_KINDS[kind]} as {option}, not {value!r}.')
  return _OWN[name](size, seed, **options)


def load(spec: str) -> list[dict[str, Any]]:
  """Records of a task named like a web address: 'plan_execute?size=1000&seed=0&rho=0.5'.

  This is the loader of the scheme `task` for `dopd_jax.data.open_source`.

  Raises:
    UserError: size or seed is missing, or what `make_records` raises.
  """
  name, _, query = spec.partition('?')
  # A plus sign stands for itself here, as in ops=+-.
  pairs = parse_qsl(query.replace('+', '%2B'), keep_blank_values=True)
  options = {key: _literal(key, value) for key, value in pairs}
  for key in ('size', 'seed'):
    if not isinstance(options.get(key), int):
      raise UserError(f'The task {spec!r} needs a whole number {key}, as in NAME?size=1000&seed=0.')
  return make_records(name, options.pop('size'), options.pop('seed'), **options)


def _literal(key: str, value: str) -> Any:
  if key in ('ops', 'hint', 'split', 'solution', 'label', 'trace', 'colours'):
    return value
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return value
