"""Pieces of text as a page shows them."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dopd_jax import tasks
from dopd_jax.token_records import pieces


def byte_level():
  inner = Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  inner.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))
  return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize('text', ['c2 7 = 7', 'a  b', 'naïve café 猫 =', ''])
def test_pieces_are_the_text(text):
  """One byte a token: a character of several has them as the tokenizer writes halves."""
  tokenizer = byte_level()
  ids = tokenizer.encode(text, add_special_tokens=False)
  shown = pieces(tokenizer, ids)
  assert len(shown) == len(ids)
  if text.isascii():
    assert ''.join(shown) == text


def test_words_stand_apart():
  tokenizer = tasks.digits.tokenizer()
  ids = tokenizer.encode('c2 7 = 7', add_special_tokens=False)
  assert pieces(tokenizer, ids) == ['c2', ' 7', ' =', ' 7']
