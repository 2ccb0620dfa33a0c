"""Judges completions by the verifier that a record names."""

from typing import Any

from dopd_jax.errors import UserError
from dopd_jax.tasks import digits, plan_execute, reasoning
from dopd_jax.tasks.common import field

VERIFIERS = {
  'plan_execute': plan_execute.verify,
  'digits': digits.verify,
  'exact': reasoning.exact,
}


def verify(record: Any, completion: str) -> float:
  """Scores a completion from 0 (wrong) to 1 (right).

  Args:
    record: with a `verifier`: 'plan_execute', 'digits', 'exact', or 'reasoning_gym:FAMILY'.
    completion: the text after the prompt, without special tokens.

  Raises:
    UserError: the record names no verifier, or none that exists.
  """
  name = field(record, 'verifier')
  if name in VERIFIERS:
    return VERIFIERS[name](record, completion)
  if isinstance(name, str) and name.startswith('reasoning_gym:'):
    return reasoning.verify(record, completion)
  known = ', '.join([*VERIFIERS, 'reasoning_gym:FAMILY'])
  raise UserError(
    f'Record {field(record, "id")}: there is no verifier {name!r}; its column verifier is one of '
    f'{known}.'
  )
