import jax.numpy as jnp
import numpy as np

from dopd_jax.losses import pairing


def test_row_j_is_prompt_len_minus_one_plus_j():
  """Prompts of 3 and 7 tokens, a completion of 2: rows 2..3 pair with rows 6..7."""
  hidden = jnp.broadcast_to(jnp.arange(9.0)[None, :, None], (2, 9, 1))
  rows = pairing.completion_rows(hidden, jnp.array([3, 7]), 2)
  np.testing.assert_array_equal(rows[..., 0], [[2, 3], [6, 7]])


def test_pack_puts_each_completion_after_its_own_prompt():
  prompt = jnp.array([[11, 12, 13, 0], [21, 0, 0, 0], [31, 32, 0, 0]])
  completion = jnp.array([[1, 2, 3], [4, 5, 9], [9, 9, 9]])
  mask = jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
  ids, valid = pairing.pack(prompt, jnp.array([3, 1, 2]), completion, mask)
  np.testing.assert_array_equal(
    ids, [[11, 12, 13, 1, 2, 3, 0], [21, 4, 5, 0, 0, 0, 0], [31, 32, 0, 0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(valid.sum(1), [6, 3, 2])
  assert (ids[~valid] == 0).all()


def test_the_last_token_predicts_nothing():
  """Changing the last completion id changes no used row of a causal model."""
  prompt, length = jnp.array([[5, 6, 0]]), jnp.array([2])
  mask = jnp.ones((1, 3), bool)

  def used(last):
    ids, _ = pairing.pack(prompt, length, jnp.array([[1, 2, last]]), mask)
    causal = jnp.cumsum(ids, axis=1)[..., None]  # row t depends on ids <= t
    return pairing.completion_rows(causal, length, 3)

  np.testing.assert_array_equal(used(3), used(4))
