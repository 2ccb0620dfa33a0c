"""What the steps are given beside the state: one model resident, or several that take turns.

Several teachers wait in the hosts' memory. Scoring brings the trunk of one at a time onto the
devices, for the rows whose records name it; the heads stay, since every update reads them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dopd_jax.data import Record
from dopd_jax.errors import UserError


class Turns(Mapping):
  """Parked parameters by name, each moved to the devices when it is asked for."""

  def __init__(self, parked: Mapping[str, Any]):
    self._parked = parked

  def __getitem__(self, name: str) -> Any:
    return _moved(self._parked[name], 'device')

  def __iter__(self):
    return iter(self._parked)

  def __len__(self) -> int:
    return len(self._parked)


def park(params: Any) -> Any:
  """The parameters in the hosts' memory, split over the hosts as they are over the devices."""
  return _moved(params, 'pinned_host')


def heads(policies: Mapping[str, Any]) -> dict[str, Any]:
  """Of each loaded policy the one array that `model.head` reads, on the devices."""
  result = {}
  for name, (model, params, *_) in policies.items():
    key = 'embedding' if model.config.tie_word_embeddings else 'lm_head'
    result[name] = {key: _moved(params[key], 'device')}
  return result


def given(policies: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
  """What scoring reads and what updates read, from the loaded policies of a pair.

  Where nothing is parked, both are the same arrays.
  """
  everything, resident = {}, {}
  for kind, by_name in policies.items():
    params = {name: loaded.params for name, loaded in by_name.items()}
    several = '' not in by_name
    everything[kind] = Turns(params) if several else params
    resident[kind] = heads(by_name) if several else params
  return everything, resident


def check_records(records: Iterable[Record], names: Collection[str]) -> None:
  """Raises `UserError` unless every record names one of the teachers."""
  for record in records:
    if record.teacher is None:
      raise UserError(
        f'record {record.id} names no teacher: add the column teacher with one of '
        f'{", ".join(names)}, or name yours in data.columns'
      )
    if record.teacher not in names:
      raise UserError(
        f'record {record.id} names the teacher {record.teacher!r}, and teachers has '
        f'{", ".join(names)}: correct the record or add the teacher'
      )


def rows_by_teacher(
  records: Sequence[Record], names: Collection[str], multiple: int
) -> dict[str, np.ndarray]:
  """The rows of each teacher, int32, padded to a multiple with an index past the end."""
  result = {}
  for name in names:
    rows = [i for i, record in enumerate(records) if record.teacher == name]
    rows += [len(records)] * (-len(rows) % multiple)
    result[name] = np.array(rows, np.int32)
  return result


def _moved(tree: Any, kind: str) -> Any:
  return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)
