"""A tokenizer for toy tasks: every word is one token, roles are one token each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, STOP = '<pad>', '<unk>', '<|im_end|>'
ROLES = ('system', 'user', 'assistant')
# One token for the whole heading of the privileged section: a privileged prompt of a toy task would
# otherwise be mostly heading. It is the heading of data.chat's default template.
REFERENCE = 'Reference for this problem (do not mention it in your answer):'
# A role token opens a message, and what comes after `<|assistant|>` up to the stop token is
# sampled.
CHAT_TEMPLATE = (
  "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}"
  "{% if message['role'] == 'assistant' %} <|im_end|>{% endif %} {% endfor %}"
  '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


def word_tokenizer(words: Sequence[str]) -> 'PreTrainedTokenizerFast':
  """A Hugging Face tokenizer of the given words; saves and loads like any other.

  Ids: `<pad>` 0, `<unk>` 1, `<|im_end|>` 2 (the stop token), three role tokens, the heading of the
  privileged section, then the words in order. Words are split at white space, and the kind of white
  space is lost: a prompt may have a definition on each line.
  """
  from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  roles = [f'<|{role}|>' for role in ROLES]
  vocabulary = [PAD, UNKNOWN, STOP, *roles, REFERENCE, *words]
  if len(set(vocabulary)) < len(vocabulary):
    raise ValueError('the words of a tokenizer must differ')
  ids = {word: i for i, word in enumerate(vocabulary)}
  tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens([PAD, UNKNOWN, STOP, *roles])
  tokenizer.add_tokens([AddedToken(REFERENCE, normalized=False)])
  fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    unk_token=UNKNOWN,
    eos_token=STOP,
    clean_up_tokenization_spaces=False,
  )
  fast.chat_template = CHAT_TEMPLATE
  return fast
