"""Prompts of many lengths in arrays of few shapes: a new length is not a new compilation."""

from dopd_jax.errors import UserError


def bucket_length(length: int, bucket: int) -> int:
  """The padded length, in tokens, of a batch whose longest prompt has `length` tokens.

  Args:
    length: the longest prompt; 0 counts as 1.
    bucket: the result is its smallest sufficient multiple.

  Raises: UserError if the bucket isn't positive.
  """
  if bucket < 1:
    raise UserError(f'The prompt bucket {bucket} must be at least 1.')
  return -(-max(length, 1) // bucket) * bucket
