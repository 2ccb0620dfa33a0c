import pytest

from dopd_jax.errors import UserError
from dopd_jax.rollout import bucket_length, pad_prompts


def test_multiples():
  assert [bucket_length(n, 16) for n in (0, 1, 15, 16, 17, 32, 33)] == [16, 16, 16, 16, 32, 32, 48]
  assert bucket_length(5, 1) == 5


def test_listed_lengths_in_any_order():
  assert [bucket_length(n, (64, 32, 128)) for n in (0, 32, 33, 128)] == [32, 32, 64, 128]


@pytest.mark.parametrize('buckets', [0, -8, [], [0, 16]])
def test_buckets_that_are_none(buckets):
  with pytest.raises(UserError, match='bucket'):
    bucket_length(4, buckets)


def test_a_prompt_longer_than_all_buckets():
  with pytest.raises(UserError, match=r'129 tokens .* 128'):
    bucket_length(129, [32, 128])


def test_padding_is_on_the_left():
  tokens, valid = pad_prompts([[5, 6, 7], [], [8]], 4, pad_id=9)
  assert tokens.tolist() == [[9, 5, 6, 7], [9, 9, 9, 9], [9, 9, 9, 8]]
  assert valid.tolist() == [[False, True, True, True], [False] * 4, [False] * 3 + [True]]
  assert tokens.dtype == 'int32' and valid.dtype == bool


def test_no_prompts():
  tokens, valid = pad_prompts([], 4, pad_id=9)
  assert tokens.shape == valid.shape == (0, 4)
