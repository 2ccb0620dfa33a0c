"""What would make a run fit: one setting at a time, by a rule of thumb from what was measured.

In order of what they cost: fewer rows at once, which only takes longer; recomputation; a cache in
int8; a teacher that waits in host memory; then other axis sizes, more of one row's work on other
devices; then more devices.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dopd_jax import config as configs
from dopd_jax.config import Config
from dopd_jax.objectives import Objective
from dopd_jax.pods.topologies import GIB

# Of the temporaries of an update: gradients and their sums are there however few rows a micro-batch
# has. On 8 v5e chips 8B -> 1.7B takes 17.7, 13.0, 9.9 and 8.7 GiB with 8, 4, 2 and 1 rows a device.
FIXED = {'update': 0.4}


class Proposal(NamedTuple):
  """Settings to change, and why, as a sentence; without settings it is up to the reader."""

  settings: Mapping[str, Any]
  why: str


def fitting_mesh(config: Config, objective: Objective, devices: int) -> Config:
  """The config with axis sizes that divide its rows, where it leaves `fsdp` open.

  As many devices as divide the prompts and every micro-batch have rows of their own; the others
  share them, over `tensor`.
  """
  mesh = config.mesh
  if mesh.fsdp != -1 or mesh.tensor < 1 or devices % (mesh.data * mesh.tensor):
    return config  # what make_mesh says of these is said there
  numbers = [config.rollout.prompts, config.rollout.prompts_at_once or config.rollout.prompts]
  for rows in configs.rows_of_batches(config, objective):
    share = rows // objective.updates
    numbers.append(share // configs.micro_batches(share, config.microbatch))
  shards = math.gcd(*numbers, devices // mesh.tensor)
  if shards % mesh.data:
    return config
  tensor = devices // shards
  return dataclasses.replace(config, mesh=configs.Mesh(mesh.data, shards // mesh.data, tensor))


def smallest_change(config: Config, report: Mapping[str, Any]) -> Proposal | None:
  """What to change first so that the run of a `compile_check.check` report fits; None if it does.

  The program that lacks most is looked at; the sentence says what it needs now and, where that is
  known, about what it would need then.
  """
  lacking = {name: p for name, p in report['programs'].items() if not p['fits']}
  if not lacking:
    return None
  name = max(lacking, key=lambda name: lacking[name].get('needs', math.inf))
  program, limit, mesh = lacking[name], report['memory'], report['mesh']
  shards = mesh['data'] * mesh['fsdp']
  held = sum(report['held'].values())
  temporaries, needs = program.get('temporaries'), program.get('needs')
  if needs is None and temporaries is not None:  # refused, for its temporaries alone
    needs = held + temporaries
  elif needs is None and 'needs_at_least' in program:
    needs = program['needs_at_least']
    temporaries = max(needs - held, 0)

  def said(settings: Mapping[str, Any], share: float, why: str, saved: int = 0) -> Proposal:
    """`share` of the temporaries would be left, and `saved` bytes of what is held not be there."""
    change = ', '.join(f'--config.{key}={value}' for key, value in settings.items())
    about = ''
    if needs is not None:
      then = needs - (1 - share) * temporaries - saved
      about = (
        f'; {name} needs {needs / GIB:.1f} GiB of {limit / GIB:.2f}, then about {then / GIB:.1f}'
      )
    return Proposal(settings, f'{change} ({why}{about})')

  fixed = FIXED.get(name, 0.0)
  left = lambda count: fixed + (1 - fixed) * 0.5**count

  def halvings(rows: int) -> int:
    """How often to halve the rows until what they take fits; the shards must divide the rest."""
    count = 0
    while rows > shards and rows % (2 * shards) == 0:
      rows, count = rows // 2, count + 1
      if needs is None or needs - (1 - left(count)) * temporaries <= limit:
        break
    return count

  idle = 0 if name == 'score' else report['could_wait']
  waits = lambda: said(
    {'teacher.offload': True}, 1, 'it waits in host memory until it scores', idle
  )
  if needs is not None and needs - temporaries > limit:
    if needs - temporaries - idle <= limit:
      return waits()
    return Proposal({}, f'more devices: weights and optimizer state alone overfill {name}')
  r = config.rollout
  if name == 'rollout':
    once = r.prompts_at_once or r.prompts
    if n := halvings(once):
      return said({'rollout.prompts_at_once': once >> n}, left(n), 'less of the cache at a time')
    if r.kv_cache == 'compute':
      return said({'rollout.kv_cache': 'int8'}, 0.6, 'keys and values in half of the bytes')
  elif n := halvings(config.microbatch):
    return said({'microbatch': config.microbatch >> n}, left(n), 'fewer rows at a time')
  elif name == 'update' and not config.remat:
    return said({'remat': True}, 0.3, 'blocks are computed again in the backward pass')
  if idle and needs is not None and needs - idle <= limit:
    return waits()
  if mesh['fsdp'] % 2 == 0 and mesh['tensor'] < report['kv_heads']:
    settings = {'mesh.fsdp': mesh['fsdp'] // 2, 'mesh.tensor': mesh['tensor'] * 2}
    halved = config.microbatch // 2
    if name != 'rollout' and config.microbatch == shards:
      settings['microbatch'] = halved
    return said(settings, 0.6, 'two devices share the rows of one')
  return Proposal({}, f'more devices, or shorter rows: no setting makes {name} smaller')
