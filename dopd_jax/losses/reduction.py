r"""From losses of tokens to one number, by coefficients that are known beforehand.

`loss = sum(coefficients(mask, reduction) * token_loss)`: since the normaliser never depends on how
a batch is cut, neither micro-batches nor the number of devices can change the result.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

REDUCTIONS = ('sequence', 'token')


def coefficients(mask: Bool[Array, 'B N'], reduction: str = 'sequence') -> Float[Array, 'B N']:
  """The share of each token in the mean, float32, 0 where masked; sums to 1, or to 0 for no tokens.

  Args:
    mask: [B, N] bool, the completion tokens.
    reduction: `'sequence'`: mean over the tokens of a row, then over the rows that have at least
    one
      token. `'token'`: mean over all tokens.

  Raises:
    ValueError: unknown `reduction`.
  """
  if reduction not in REDUCTIONS:
    raise ValueError(f'reduction must be one of {REDUCTIONS}, got {reduction!r}')
  if reduction == 'token':
    share = 1.0 / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    return jnp.where(mask, share, 0.0)
  length = jnp.sum(mask, axis=1, keepdims=True)
  rows = jnp.maximum(jnp.sum(length > 0), 1).astype(jnp.float32)
  return jnp.where(mask, 1.0 / (jnp.maximum(length, 1).astype(jnp.float32) * rows), 0.0)
