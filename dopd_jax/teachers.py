"""What the steps are given beside the state: models that stay on the devices, or take turns there.

Who is parked waits in the hosts' memory: several teachers, or one whose memory the rollout and the
update need. Scoring brings the trunk of one at a time onto the devices, for the rows that it reads;
the heads stay, since every update reads them.
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


def is_parked(params: Any) -> bool:
  """Whether `park` made them."""
  return jax.tree.leaves(params)[0].sharding.memory_kind == 'pinned_host'


def head(model: Any, params: Mapping[str, Any]) -> dict[str, Any]:
  """The one parameter that `model.head` reads."""
  key = 'embedding' if model.config.tie_word_embeddings else 'lm_head'
  return {key: params[key]}


def given(policies: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
  """What scoring reads and what updates read, from the loaded policies of a pair.

  Where nothing is parked, both are the same arrays.
  """
  everything, resident = {}, {}
  for kind, by_name in policies.items():
    params = {name: loaded.params for name, loaded in by_name.items()}
    everything[kind] = resident[kind] = params
    if any(map(is_parked, params.values())):
      everything[kind] = Turns(params)
      heads = {name: head(loaded.model, loaded.params) for name, loaded in by_name.items()}
      resident[kind] = _moved(heads, 'device')
  return everything, resident


def compiled(score: Any, policies: Mapping[str, Mapping[str, Any]]) -> Any:
  """`Steps.score` for a loaded pair: one program, or its parts, between which parked ones move."""
  everyone = (loaded for by_name in policies.values() for loaded in by_name.values())
  return score if any(is_parked(loaded.params) for loaded in everyone) else jax.jit(score)


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
