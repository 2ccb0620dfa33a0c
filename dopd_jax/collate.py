"""Host and device: examples become arrays on the mesh, and arrays come back as NumPy."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dopd_jax import sharding, sight
from dopd_jax.data import Example, Renderer, pad_batch
from dopd_jax.rollout import Rollout, StopReason, bucket_length
from dopd_jax.sight import Sight
from dopd_jax.step import Batch, Prompt


def prompts(
  examples: Sequence[Example],
  names: Sequence[str],
  bucket: int,
  pad_id: int,
  fill: int = 0,
  seen: Sight | None = None,
  renderer: Renderer | None = None,
  room: int = 0,
) -> dict[str, Prompt]:
  """The prompts of a batch in each rendering, right-padded to a multiple of `bucket`, on the host.

  Args:
    examples: b of them.
    names: 'plain', 'privileged', and either with another image: 'plain+crop'.
    bucket: tokens; lengths within one bucket share a compilation.
    pad_id: what stands behind a prompt.
    fill: rows of the result; those past b are empty (length 0).
    seen: how the policies see, where they do.
    renderer: for renderings that the examples do not carry.
    room: tokens to pad to at least.
  """
  result = {}
  for name in names:
    rows = sight.ids(examples, name, seen, renderer)
    rows += [[]] * (fill - len(rows))
    length = bucket_length(max(room, *map(len, rows)), bucket)
    tokens, valid = _padded(rows, length, pad_id)
    positions = sight.positions(examples, name, tokens, valid, seen)
    result[name] = Prompt(tokens, valid.sum(1).astype(np.int32), positions)
  return result


def repeat(tree: Any, times: int) -> Any:
  """Every row `times` times, side by side: one prompt's completions are adjacent."""
  return jax.tree.map(lambda x: np.repeat(x, times, axis=0), tree)


def fixed_completions(
  examples: Sequence[Example], length: int, pad_id: int
) -> tuple[Rollout, np.ndarray]:
  """A rollout of the completions of the data, and which of its tokens carry loss [B, N]."""
  tokens, mask = _padded([e.completion_ids or [] for e in examples], length, pad_id)
  supervised, _ = _padded(
    [e.completion_mask or [True] * len(e.completion_ids or []) for e in examples], length, 0
  )
  zeros: Any = np.zeros(tokens.shape, np.float32)
  stop: Any = np.full(len(tokens), StopReason.STOP.value, np.int32)
  return Rollout(tokens, mask, zeros, zeros, stop), supervised.astype(bool) & mask


def choose_context(
  by_context: dict[str, Prompt], examples: Sequence[Example], share: float, seed: int
) -> dict[str, Prompt]:
  """As 'plain', `share` of the rows with their privileged prompt, by a coin of their own draw."""
  if not share:
    return by_context
  coin = [np.random.default_rng([seed, e.draw]).random() < share for e in examples]
  plain, privileged = by_context['plain'], by_context['privileged']
  length = max(plain.tokens.shape[1], privileged.tokens.shape[1])

  def choose(a: Any, b: Any) -> Any:
    if a is None:
      return None
    if a.ndim > 1:
      a, b = (
        np.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2))) for x in (a, b)
      )
    return np.where(np.reshape(coin, (-1, *(1,) * (a.ndim - 1))), a, b)

  return {'plain': Prompt(*map(choose, privileged, plain))}


def put(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Arrays [B, ...] as global arrays with their rows split over the mesh.

  Each process holds arrays of all rows, and need know its own alone: no others are read.
  """
  rows = sharding.rows(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, rows, lambda part: x[part]), tree
  )


def mine(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """`sharding.own_rows` of global arrays [B, ...], as NumPy."""

  def one(x):
    parts = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

  return jax.tree.map(one, jax.device_put(tree, sharding.rows(mesh)))


def fetch(tree: Any) -> Any:
  """Global arrays as NumPy, whole, on every process; all must ask, under `jax.set_mesh`."""
  return jax.device_get(_whole(tree) if jax.process_count() > 1 else tree)


_whole = jax.jit(lambda tree: tree, out_shardings=P())


def _padded(rows: Sequence[Sequence[Any]], length: int, pad_id: int) -> tuple[Any, Any]:
  """NumPy arrays that stand where the steps' types say Array: they become so in `put`."""
  return pad_batch(rows, length, pad_id)


def as_batch(by_context: dict[str, Prompt], rollout: Rollout, supervised: Any = None) -> Batch:
  """What the steps see of a rollout; without `supervised` every token may carry loss."""
  supervised = rollout.mask if supervised is None else supervised
  return Batch(by_context, rollout.tokens, rollout.mask, supervised, rollout.logp)
