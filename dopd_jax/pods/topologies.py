"""Machines to compile for that are not there: TPU topologies, and a CPU that poses as several."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from dopd_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
  """A kind of device. `memory`: bytes that a program may use, as its compiler says; 0: no limit."""

  name: str
  memory: int
  known: str  # shapes that exist, for a sentence


# By the family in a topology's name. v5p is called v5 by libtpu.
CHIPS = {
  'v5e': Chip('TPU v5e', int(15.75 * GIB), 'v5e:2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16'),
  'v6e': Chip('TPU v6e', int(31.25 * GIB), 'v6e:2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16'),
  'v5': Chip('TPU v5p', int(95.74 * GIB), 'v5:2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, ...'),
  'cpu': Chip('CPU', 0, 'cpu:8'),
}


class Topology(NamedTuple):
  """Devices to compile for."""

  name: str
  chip: Chip
  devices: list[Any]

  @property
  def platform(self) -> str:
    return self.devices[0].platform


def without_accelerators(name: str) -> None:
  """Keeps jax to this machine's CPU; for `cpu:N` as N devices. Before anything asks for a device.

  Raises:
    UserError: a name of no topology.
  """
  family, shape = _parsed(name)
  jax.config.update('jax_platforms', 'cpu')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else it waits for a server that is not there
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no chip is used, none is shared
  if family == 'cpu':
    jax.config.update('jax_num_cpu_devices', shape[0])


def find(name: str) -> Topology:
  """The devices of `v5e:16x16` and the like.

  Raises:
    UserError: a name of no topology, or libtpu is not installed.
  """
  family, shape = _parsed(name)
  chip = CHIPS[family]
  if family == 'cpu':
    return Topology(name, chip, jax.devices()[: shape[0]])
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(f"compiling for {name} needs libtpu: pip install -e '.[tpu]'")
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(name, platform='tpu')
  except jax.errors.JaxRuntimeError as error:
    if 'INVALID_ARGUMENT' not in str(error):
      raise
    raise UserError(f'there is no topology {name}: use {chip.known}') from error
  return Topology(name, chip, list(found.devices))


def _parsed(name: str) -> tuple[str, list[int]]:
  """'v5e:4x4' -> ('v5e', [4, 4])."""
  family, _, shape = name.partition(':')
  if family not in CHIPS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){0,2}', shape):
    known = '; '.join(chip.known for chip in CHIPS.values())
    raise UserError(f'there is no topology {name!r}: use {known}')
  if family == 'cpu' and 'x' in shape:
    raise UserError(f'cpu takes a number of devices, such as cpu:8, not {name}')
  return family, [int(n) for n in shape.split('x')]
