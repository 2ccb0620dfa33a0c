"""The fused head of `losses.head` on the rows of a batch [b, N], split over the mesh as they are.

Under `jax.set_mesh`, with axes of type Auto or Explicit, every device takes its own rows and, where
`tensor` divides the vocabulary, its own columns. The gradient of the head stays in parts, one for
each device that has rows of its own, until all micro-batches are done: `zeros`, then `grads` as
often as needed, then `total`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.losses import head as fused
from dopd_jax.losses.head import Part, Rows, Setting, TokenView
from dopd_jax.objectives import Signals
from dopd_jax.sharding import AXES, ROWS

# By the names in the rules. `hidden` is [b, N, D], `rows` [b]; heads may have unequal tables.
Sources = Mapping[str, Sequence[Part]]


def signals(
  setting: Setting,
  hidden: Float[Array, 'b N D'],
  head: Float[Array, 'V D'],
  tokens: Int[Array, 'b N'],
  mask: Bool[Array, 'b N'],
) -> Signals:
  """What a model says of each token of the mask; 0 elsewhere."""

  def local(setting, hidden, head, tokens, mask):
    found = fused.head_signals(setting, _flat(hidden), head, _flat(tokens), _flat(mask))
    return Signals(*_shaped(found, mask))

  split = _Split(tokens, head)
  specs = ROWS, split.columns, ROWS, ROWS
  return split(local, setting, specs, ROWS)(hidden, head, tokens, mask)


def losses(
  setting: Setting,
  hidden: Float[Array, 'b N D'],
  head: Float[Array, 'V D'],
  sources: Sources,
  rows: Rows,
) -> TokenView:
  """What is seen of each token, without gradients; `rows` of [b, N]."""
  head, sources = _one_width(head, sources)

  def local(setting, hidden, head, sources, rows):
    _, seen = fused.head_loss(setting, *_flat_all(hidden, head, sources, rows))
    return TokenView(*_shaped(seen, rows.live))

  split = _Split(rows.live, head)
  specs = ROWS, split.columns, split.of(sources), ROWS
  return split(local, setting, specs, ROWS)(hidden, head, sources, rows)


def zeros(head: Float[Array, 'V D'], sources: Sources, rows: Any) -> Float[Array, 'devices V D']:
  """Where `grads` begins: `rows` is any array [b, ...] of the first micro-batch."""
  head, _ = _one_width(head, sources)
  split = _Split(rows, head)
  start = jnp.zeros((split.devices, *head.shape), jnp.float32)
  if split.mesh and not split.explicit:
    start = jax.lax.with_sharding_constraint(start, split.partial)
  return start  # between Explicit axes `grads` lays it out


def grads(
  setting: Setting,
  hidden: Float[Array, 'b N D'],
  head: Float[Array, 'V D'],
  sources: Sources,
  rows: Rows,
  d_head: Float[Array, 'devices V D'],
) -> tuple[TokenView, Float[Array, 'b N D'], Float[Array, 'devices V D']]:
  """As `losses`, with the gradients of `sum(coef * loss)`; the head's is added to `d_head`."""
  head, sources = _one_width(head, sources)

  def local(setting, hidden, head, sources, rows, d_head):
    flat = _flat_all(hidden, head, sources, rows)
    _, seen, found = fused.head_grads(setting, *flat, d_head[0])
    seen = TokenView(*_shaped(seen, rows.live))
    return seen, found.hidden.reshape(hidden.shape), found.head[None]

  split = _Split(rows.live, head)
  specs = ROWS, split.columns, split.of(sources), ROWS, split.partial
  run = split(local, setting, specs, (ROWS, ROWS, split.partial))
  return run(hidden, head, sources, rows, d_head)


def total(d_head: Float[Array, 'devices V D'], head: Float[Array, 'V D']) -> Float[Array, 'V D']:
  """The gradient of the whole head."""
  found = _sum(d_head)
  return jnp.pad(found, ((0, head.shape[0] - found.shape[0]), (0, 0)))


def _sum(d_head: Float[Array, 'devices V D']) -> Float[Array, 'V D']:
  """The sum of the devices' parts, scattered over `fsdp` as the head is where that divides it.

  XLA would sum them whole everywhere, in a second array of their size.
  """
  devices, V, D = d_head.shape
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  if devices == 1 or D % sizes['fsdp']:
    return jnp.sum(d_head, axis=0)
  columns = 'tensor' if sizes['tensor'] > 1 and V % sizes['tensor'] == 0 else None

  def local(part):
    mine = jax.lax.psum_scatter(part[0], 'fsdp', scatter_dimension=1, tiled=True)
    return jax.lax.psum(mine, 'data')

  specs = P(ROWS[0], columns), P(columns, 'fsdp')
  return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], check_vma=False)(d_head)


class _Split:
  """How rows and columns lie on the mesh of the context; without one, or where the rows do not
  divide, everything is computed as if there was one device, and XLA places it."""

  def __init__(self, rows: Any, head: Any):
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(AXES) <= {*mesh.auto_axes, *mesh.explicit_axes}
    sizes = dict(mesh.shape) if ours else {}
    self.explicit = bool(mesh.explicit_axes)
    self.devices = math.prod(sizes.get(axis, 1) for axis in ROWS[0])
    self.mesh = bool(sizes) and rows.shape[0] % self.devices == 0
    if not self.mesh:
      self.devices = 1
    tensor = sizes.get('tensor', 1)
    self.axis = 'tensor' if self.mesh and tensor > 1 and head.shape[0] % tensor == 0 else ''
    self.columns = P(self.axis or None)
    self.partial = P(ROWS[0], self.axis or None)

  def of(self, sources: Sources) -> Any:
    """Specs of the parts."""
    rows: Any = ROWS  # they stand where the types say Array
    heads: Any = self.columns
    number: Any = P()
    spec = lambda part: Part(rows, heads, number, None if part.rows is None else rows)
    return {name: tuple(map(spec, parts)) for name, parts in sources.items()}

  def __call__(self, local: Callable, setting: Setting, specs: Any, out: Any) -> Callable:
    fn = lambda *args: local(setting._replace(axis=self.axis), *args)
    if not self.mesh:
      return fn
    run = jax.shard_map(fn, in_specs=specs, out_specs=out, check_vma=False)
    return lambda *args: run(*self.placed(args, specs))

  def placed(self, args: Any, specs: Any) -> Any:
    """Arguments where the specs say: between axes of type Explicit nothing moves by itself."""
    if not self.explicit:
      return args
    return jax.sharding.reshard(args, jax.tree.broadcast(specs, args, is_leaf=_is_spec))


def _is_spec(x: Any) -> bool:
  return isinstance(x, P)


def _one_width(head: Array, sources: Sources) -> tuple[Array, Sources]:
  """Tables padded to different sizes are cut to the smallest: no live id lies beyond it."""
  V = min([head.shape[0], *(part.head.shape[0] for parts in sources.values() for part in parts)])
  cut = lambda part: part._replace(head=part.head[:V])
  return head[:V], {name: tuple(map(cut, parts)) for name, parts in sources.items()}


def _flat(x: Array) -> Array:
  return x.reshape(-1, *x.shape[2:])


def _flat_all(hidden: Array, head: Array, sources: Sources, rows: Rows):
  """What `losses.head` takes: one axis of tokens in place of rows and positions."""

  def flat(part):
    mine = part.rows
    if mine is not None:
      mine = _flat(jnp.broadcast_to(mine[:, None], rows.live.shape))
    return part._replace(hidden=_flat(part.hidden), rows=mine)

  parts = {name: tuple(map(flat, parts)) for name, parts in sources.items()}
  return _flat(hidden), head, parts, jax.tree.map(_flat, rows)


def _shaped(found: Sequence[Array], like: Array) -> list[Array]:
  return [x.reshape(like.shape) for x in found]
