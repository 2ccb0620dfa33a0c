"""What the tasks share: the split of problems, and reading a record whatever it is."""

import hashlib
from collections.abc import Mapping
from typing import Any

from dopd_jax.errors import UserError

SPLITS = ('train', 'test', 'all')
_TEST_SHARE = 4


def in_split(problem: str, split: str) -> bool:
  """Whether a problem belongs to a split: one in four is a test problem, by its hash alone.

  Seeds, sizes and options cannot move a problem from one side to the other.

  Raises:
    UserError: there is no such split.
  """
  if split not in SPLITS:
    raise UserError(f'There is no split {split!r}: choose one of {", ".join(SPLITS)}.')
  is_test = hashlib.sha256(problem.encode()).digest()[0] % _TEST_SHARE == 0
  return split == 'all' or is_test == (split == 'test')


def field(record: Any, name: str) -> Any:
  """A column of a record: of a mapping, or of an object that keeps unknown columns in `extra`."""
  if isinstance(record, Mapping):
    return record.get(name)
  return getattr(record, name, None) if hasattr(record, name) else record.extra.get(name)
