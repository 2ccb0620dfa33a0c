import pytest

from dopd_jax.errors import UserError
from dopd_jax.rollout import bucket_length


def test_multiples():
  assert [bucket_length(n, 16) for n in (0, 1, 15, 16, 17, 32, 33)] == [16, 16, 16, 16, 32, 32, 48]
  assert bucket_length(5, 1) == 5


@pytest.mark.parametrize('bucket', [0, -8])
def test_buckets_that_are_none(bucket):
  with pytest.raises(UserError, match='bucket'):
    bucket_length(4, bucket)
