r"""The one owner of alignment between prompts, completions and hidden states.

A row of a batch is a prompt and its completion packed side by side and padded on the right. The
plain and the privileged prompt of a row have different lengths, but token j of the completion is
the same token in both, and the hidden state that predicts it stands at row `prompt_len - 1 + j`. No
other module slices by prompt length.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pack(
  prompt: Int[Array, 'B P'],
  prompt_len: Int[Array, 'B'],
  completion: Int[Array, 'B N'],
  mask: Bool[Array, 'B N'],
) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
  """Prompt and completion side by side, T = P + N, padded on the right.

  Args:
    prompt: [B, P] ids, right-padded.
    prompt_len: [B] tokens of each prompt, at least 1.
    completion: [B, N] ids.
    mask: [B, N] bool, which completion ids are real; a prefix of each row.

  Returns:
    ids [B, T] int32 (0 where padded) and valid [B, T] bool.
  """
  P, N = prompt.shape[1], completion.shape[1]
  t_T = jnp.arange(P + N)[None, :]
  j_T = t_T - prompt_len[:, None]  # completion position that column t holds
  valid = t_T < packed_length(prompt_len, mask)[:, None]
  from_prompt = jnp.pad(prompt, ((0, 0), (0, N)))
  from_completion = jnp.take_along_axis(completion, jnp.clip(j_T, 0, N - 1), axis=1)
  ids = jnp.where(j_T < 0, from_prompt, from_completion)
  return jnp.where(valid, ids, 0), valid


def packed_length(prompt_len: Int[Array, 'B'], mask: Bool[Array, 'B N']) -> Int[Array, 'B']:
  """Tokens of each packed row: its prompt and the real part of its completion."""
  return prompt_len + jnp.sum(mask, axis=1, dtype=prompt_len.dtype)


def pack_positions(
  prompt: Int[Array, 'B P 3'], prompt_len: Int[Array, 'B'], N: int
) -> Int[Array, 'B T 3']:
  """Rotary positions of packed rows, T = P + N, where an image has spread those of the prompt.

  Args:
    prompt: [B, P, 3] int32 positions (time, height, width) of the prompt.
    prompt_len: [B] tokens of each prompt, at least 1.
    N: completion length (columns).

  Returns:
    [B, T, 3] int32; the completion goes on behind the largest position of its prompt, alike on all
    axes.
  """
  P = prompt.shape[1]
  t_T = jnp.arange(P + N)[None, :]
  inside = t_T < prompt_len[:, None]
  padded = jnp.pad(prompt, ((0, 0), (0, N), (0, 0)))
  largest = jnp.max(padded, axis=(1, 2), where=inside[..., None], initial=-1)
  behind = largest[:, None] + 1 + t_T - prompt_len[:, None]
  return jnp.where(inside[..., None], padded, behind[..., None])


def completion_rows(
  hidden: Float[Array, 'B T D'], prompt_len: Int[Array, 'B'], N: int
) -> Float[Array, 'B N D']:
  """The hidden states that predict the completion: rows `prompt_len - 1 + j`, j < N.

  Args:
    hidden: [B, T, D] of packed rows, or of their first columns: what lies behind those is 0.
    prompt_len: [B] tokens of each prompt, at least 1.
    N: completion length (columns).
  """
  rows = prompt_len[:, None] - 1 + jnp.arange(N)[None, :]
  return jnp.take_along_axis(hidden, rows[:, :, None], axis=1, mode='fill', fill_value=0)
