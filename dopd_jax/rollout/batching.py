"""Prompts of many lengths in arrays of few shapes: a new length is not a new compilation."""

from collections.abc import Sequence

import numpy as np

from dopd_jax.errors import UserError


def bucket_length(length: int, buckets: int | Sequence[int]) -> int:
  """The padded length, in tokens, of a batch whose longest prompt has `length` tokens.

  Args:
    length: the longest prompt; 0 counts as 1.
    buckets: a number, whose smallest sufficient multiple is taken; or the lengths to choose from.

  Raises: UserError if no bucket is long enough, or one isn't positive.
  """
  length = max(length, 1)
  if isinstance(buckets, int):
    if buckets < 1:
      raise UserError(f'The prompt bucket {buckets} must be at least 1.')
    return -(-length // buckets) * buckets
  if not buckets or min(buckets) < 1:
    raise UserError(f'The prompt buckets {list(buckets)} must be one or more positive lengths.')
  sufficient = [bucket for bucket in buckets if bucket >= length]
  if not sufficient:
    raise UserError(
      f'A prompt of {length} tokens is longer than the largest bucket, {max(buckets)}: add a '
      'larger bucket or drop the prompt.'
    )
  return min(sufficient)


def pad_prompts(
  prompts: Sequence[Sequence[int]], buckets: int | Sequence[int], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts padded on the left to one bucket: tokens [b, P] int32 and valid [b, P] bool."""
  P = bucket_length(max((len(prompt) for prompt in prompts), default=0), buckets)
  tokens = np.full((len(prompts), P), pad_id, np.int32)
  valid = np.zeros((len(prompts), P), bool)
  for row, prompt in enumerate(prompts):
    tokens[row, P - len(prompt) :] = prompt
    valid[row, P - len(prompt) :] = True
  return tokens, valid
