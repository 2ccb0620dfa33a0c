"""What may be sampled: masks and filters on logits, as `transformers` computes them.

Order and ties are those of `transformers` 5 (`GenerationMixin._get_logits_processor`): suppressed
ids first, then temperature, top-k, top-p, min-p, each on what the one before it left. All logits
are float32, and what is filtered becomes -inf, so that it gets probability 0.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dopd_jax.rollout.types import Sampling


def filter_logits(logits: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Logits that tokens are drawn from: temperature, top-k, top-p, min-p. Not for temperature 0."""
  if sampling.temperature != 1:
    logits = logits / sampling.temperature
  if sampling.top_k > 0:
    logits = top_k(logits, sampling.top_k)
  if sampling.top_p < 1:
    logits = top_p(logits, sampling.top_p)
  if sampling.min_p > 0:
    logits = min_p(logits, sampling.min_p)
  return logits


def top_k(logits: Float[Array, 'B V'], k: int) -> Float[Array, 'B V']:
  """Keeps logits that are at least the k-th largest: more than k of them on a tie."""
  kth = lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
  return _keep(logits >= kth, logits)


def top_p(logits: Float[Array, 'B V'], p: float) -> Float[Array, 'B V']:
  """Removes the least likely tokens while their mass is at most 1 - p (Holtzman et al. 2020).

  At least one token stays. Of tied tokens the smaller ids go first; `transformers` drops as many of
  them, but leaves to an unstable sort which ones.
  """
  V = logits.shape[-1]
  ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  ascending, order = lax.sort((logits, ids), dimension=1, num_keys=1, is_stable=True)
  mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
  removed = jnp.sum(mass <= 1 - p, axis=-1, keepdims=True, dtype=jnp.int32)
  last = jnp.minimum(removed, V - 1)
  # The least likely token that stays. A comparison with it replaces a scatter to the old order.
  logit = jnp.take_along_axis(ascending, last, axis=1)
  first_id = jnp.take_along_axis(order, last, axis=1)
  return _keep((logits > logit) | ((logits == logit) & (ids >= first_id)), logits)


def min_p(logits: Float[Array, 'B V'], p: float) -> Float[Array, 'B V']:
  """Keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
  probs = jax.nn.softmax(logits, axis=-1)
  return _keep(probs >= p * jnp.max(probs, axis=-1, keepdims=True), logits)


def _keep(keep: Bool[Array, 'B V'], logits: Float[Array, 'B V']) -> Float[Array, 'B V']:
  return jnp.where(keep, logits, -jnp.inf)
