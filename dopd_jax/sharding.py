"""Where arrays live: the mesh, one rule for each parameter, and the rows of a batch.

Axes: `data` copies the model and splits rows; `fsdp` splits rows and parameters; `tensor` splits
heads, the feed-forward width and the vocabulary. Axes are of type Auto: XLA places what these rules
leave open. (`jax.jit` with these shardings is what used to be called pjit.)
"""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dopd_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
ROWS = P(('data', 'fsdp'))

# Names of parameters, as paths, and how their dimensions are split (letters: dopd_jax.models).
# A name must match exactly one rule. (The path of an optimizer's moment ends in the same name.)
RULES = (
  (r'embedding|lm_head', P('tensor', 'fsdp')),  # V D
  (r'final_norm', P(None)),  # D
  (r'layers/(attention|mlp)_norm', P(None, None)),  # L D
  (r'layers/attention/[qkv]_proj', P(None, 'fsdp', 'tensor', None)),  # L D Q H, L D K H
  (r'layers/attention/o_proj', P(None, 'tensor', None, 'fsdp')),  # L Q H D
  (r'layers/attention/[qk]_norm', P(None, None)),  # L H
  (r'layers/mlp/(gate|up)_proj', P(None, 'fsdp', 'tensor')),  # L D F
  (r'layers/mlp/down_proj', P(None, 'tensor', 'fsdp')),  # L F D
  # The vision tower of Qwen3-VL.
  (r'vision/patch_proj', P(None, 'fsdp')),  # C W
  (r'vision/position_embedding', P(None, 'fsdp')),  # (rows and columns of a grid) W
  (r'vision/(patch_bias|merger/(norm|norm_bias|(up|down)_bias))', P(None)),  # W
  (r'vision/blocks/(attention|mlp)_norm(_bias)?', P(None, None)),  # L W
  (r'vision/blocks/attention/qkv_proj', P(None, 'fsdp', None, 'tensor', None)),  # L W 3 Q H
  (r'vision/blocks/attention/o_proj', P(None, 'tensor', None, 'fsdp')),  # L Q H W
  (r'vision/blocks/mlp/up_proj', P(None, 'fsdp', 'tensor')),  # L W F
  (r'vision/blocks/mlp/down_proj', P(None, 'tensor', 'fsdp')),  # L F W
  (r'vision/blocks/(attention/(qkv|o)|mlp/(up|down))_bias', P(None, None)),  # L W
  (r'vision/merger/up_proj', P('fsdp', 'tensor')),  # (patches of a feature) W, the same
  (r'vision/merger/down_proj', P('tensor', 'fsdp')),  # (patches of a feature) W, D
  (r'vision/deepstack_mergers/(norm|norm_bias|(up|down)_bias)', P(None, None)),  # K W
  (r'vision/deepstack_mergers/up_proj', P(None, 'fsdp', 'tensor')),
  (r'vision/deepstack_mergers/down_proj', P(None, 'tensor', 'fsdp')),
)


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh over all devices; at most one size is -1 and takes the devices that are left.

  Between several slices of TPUs, and nodes of GPUs where it can, runs the `data` axis alone.

  Raises: UserError if the sizes don't multiply to the number of devices, or don't fit the slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  sizes = dict(zip(AXES, (data, fsdp, tensor)))
  asked = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f'Mesh sizes must be positive, and -1 at most once, but are {asked}.')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if count % fixed or (not open_axes and fixed != count):
    raise UserError(
      f'A mesh of {asked} does not fit {count} devices: choose sizes whose product is {count} '
      f'(each one of {", ".join(str(n) for n in range(1, count + 1) if count % n == 0)}), '
      'or -1 for one of them.'
    )
  shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  # Slices of TPUs, or nodes of GPUs: networks between them are slower than those inside.
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
  if shape[0] % slices == 0:
    inside, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    found = mesh_utils.create_hybrid_device_mesh(
      inside, between, devices, allow_split_physical_axes=True
    )
  elif devices[0].platform == 'tpu':
    raise UserError(
      f'mesh.data ({shape[0]}) must be a multiple of the {slices} slices of TPUs, so that '
      'gradients alone cross the network between them'
    )
  else:
    found = mesh_utils.create_device_mesh(shape, devices)
  return Mesh(found, AXES, axis_types=auto)


def spec(name: str) -> P:
  """The rule of a parameter, by its path such as 'layers/mlp/up_proj'.

  Raises: ValueError unless exactly one rule matches: a new parameter needs a decision.
  """
  found = [rule for pattern, rule in RULES if re.fullmatch(f'(.*/)?{pattern}', name)]
  if len(found) != 1:
    raise ValueError(f'{name!r} matches {len(found)} rules of dopd_jax.sharding.RULES, not one.')
  return found[0]


def param_shardings(
  tree: Any, mesh: Mesh | AbstractMesh, split_over: Collection[str] = ('fsdp', 'tensor')
) -> Any:
  """A NamedSharding for each leaf of a tree of arrays or shapes: parameters, or optimizer state.

  Along axes that are not in `split_over` the devices hold copies.

  A dimension that its axis does not divide is replicated along it (3 key heads on tensor=2), since
  uneven shards are not allowed at the edge of jit. Scalars, such as step counts, are replicated.
  """

  def sharding(path, leaf):
    if not leaf.shape:
      return NamedSharding(mesh, P())
    rule = spec(jax.tree_util.keystr(path, simple=True, separator='/'))
    if len(rule) != len(leaf.shape):
      raise ValueError(f'{rule} does not fit {jax.tree_util.keystr(path)} of shape {leaf.shape}.')
    fits = (
      axis if axis in split_over and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(rule, leaf.shape)
    )
    return NamedSharding(mesh, P(*fits))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def rows(mesh: Mesh) -> NamedSharding:
  """For arrays [B, ...]: rows split over data and fsdp, which must divide B."""
  return NamedSharding(mesh, ROWS)


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
  """Which of `count` rows lie on the devices of this process, ascending; [b] int.

  Together the processes hold every row. Two of them hold the same where `tensor` spans both.
  """
  held = rows(mesh).addressable_devices_indices_map((count,)).values()
  mine = np.zeros(count, bool)
  for part in held:
    mine[part] = True
  return np.flatnonzero(mine)


def replicated(mesh: Mesh) -> NamedSharding:
  """For what every device holds whole: thresholds, metrics, step counts."""
  return NamedSharding(mesh, P())


def shards(*axes: str) -> int:
  """In how many parts these axes split an array, under `jax.set_mesh`; 1 without a mesh."""
  mesh = _auto_mesh()
  return math.prod(mesh.shape[axis] for axis in axes) if mesh else 1


def constrain_rows(x: jax.Array) -> jax.Array:
  """Keeps activations [B, ...] split by rows inside jit, under `jax.set_mesh`; else does nothing.

  Without it XLA may split an activation's width the way its weight is split, and gather the rows.
  """
  return _constrain(x, ROWS)


def constrain_columns(x: jax.Array) -> jax.Array:
  """As `constrain_rows` for logits [B, V]: columns split over `tensor`, as the head is."""
  return _constrain(x, P(*ROWS, 'tensor'))


def gather(params: Any) -> Any:
  """Inside jit, under `jax.set_mesh`: parameters whole along `fsdp`, still split over `tensor`."""
  mesh = _auto_mesh()
  if mesh is None:
    return params

  def one(x, where):
    axes = (None if axis == 'fsdp' else axis for axis in where.spec)
    return jax.lax.with_sharding_constraint(x, P(*axes))

  return jax.tree.map(one, params, param_shardings(params, mesh))


def _constrain(x: jax.Array, where: P) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, where) if _auto_mesh() else x


def _auto_mesh() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh`, where XLA may be told how to place things on it."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(AXES) <= set(mesh.auto_axes) else None
