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


# The same, with the parts of a message as Qwen3-VL writes them: one token for an image, between two
# that say where it begins and ends.
IMAGE_TOKEN = '<|image_pad|>'
VISION = ('<|vision_start|>', IMAGE_TOKEN, '<|vision_end|>')
VIDEO_TOKEN = '<|video_pad|>'  # a model that sees must have one
IMAGE_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
  "{{ message['content'] }}",
  "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
  "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
  f"{' '.join(VISION)} {{% else %}}{{{{ part['text'] }}}} {{% endif %}}{{% endfor %}}{{% endif %}}",
)


def word_tokenizer(words: Sequence[str], images: bool = False) -> 'PreTrainedTokenizerFast':
  """A Hugging Face tokenizer of the given words; saves and loads like any other.

  Ids: `<pad>` 0, `<unk>` 1, `<|im_end|>` 2 (the stop token), three role tokens, with `images` the
  three of `VISION` and that of videos, the heading of the privileged section, then the words in
  order. Words are split at white space, and the kind of white space is lost: a prompt may have a
  definition on each line. Where the end of a line is one of the words, it is a token of its own.
  """
  from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  roles = [f'<|{role}|>' for role in ROLES]
  if images:
    roles += (*VISION, VIDEO_TOKEN)
  vocabulary = [PAD, UNKNOWN, STOP, *roles, REFERENCE, *words]
  if len(set(vocabulary)) < len(vocabulary):
    raise ValueError('the words of a tokenizer must differ')
  ids = {word: i for i, word in enumerate(vocabulary)}
  tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  if '\n' in words:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Split(Regex(r'[^\S\n]+'), 'removed'), pre_tokenizers.Split('\n', 'isolated')]
    )
  tokenizer.add_special_tokens([PAD, UNKNOWN, STOP, *roles])
  tokenizer.add_tokens([AddedToken(REFERENCE, normalized=False)])
  fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    unk_token=UNKNOWN,
    eos_token=STOP,
    clean_up_tokenization_spaces=False,
  )
  fast.chat_template = IMAGE_CHAT_TEMPLATE if images else CHAT_TEMPLATE
  return fast
