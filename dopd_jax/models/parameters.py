"""How parameters are made, and cast where they are used: shared by the decoder and the tower."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def matrix(config: Any, rngs: nnx.Rngs, *shape: int) -> nnx.Param:
  """Normal with standard deviation `config.initializer_range`, float32."""
  return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


def ones(size: int) -> nnx.Param:
  """The scale of a norm before training."""
  return nnx.Param(jnp.ones((size,), jnp.float32))


def zeros(size: int) -> nnx.Param:
  """A bias before training."""
  return nnx.Param(jnp.zeros((size,), jnp.float32))


def cast(param: nnx.Param, x: jax.Array) -> jax.Array:
  """The parameter in the dtype of the activations that it meets."""
  return param[...].astype(x.dtype)


# Names of parameters that are used in float32 whatever the activations are, or are small.
_IN_FLOAT32 = ('norm', 'bias', 'position_embedding')


def held(params: Any, dtype: Any) -> Any:
  """Frozen parameters as they are used: matrices in `dtype`, so that `cast` finds them done.

  What a model computes does not change by a bit, and its weights take half of the memory where
  `dtype` is bfloat16.
  """

  def one(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return x if name.endswith(_IN_FLOAT32) else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params)
