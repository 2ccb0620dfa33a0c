"""The plain and the privileged rendering of a prompt, by the student's chat template.

Every policy, student or teacher, reads the ids made here: one tokenizer, one template, one
generation state. The two renderings of a record differ by the privileged section in the last user
message and in nothing else.

Images stand in a prompt where the record says (`Record.prompt`). The template writes one image
token for each, and here it becomes as many as the model has features for the image: prompts and
features can only ever agree.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from dopd_jax.data.image_inputs import ImageInputs, image_grids, images_unread
from dopd_jax.data.image_processor import Grid
from dopd_jax.data.records import Message, Record
from dopd_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = (
  '{prompt}\n\nReference for this problem (do not mention it in your answer):\n{context}'
)
IMAGE_MARKER = '<image>'
_PLACEHOLDER = re.compile(r'(\{prompt\}|\{context\})')


class Renderer:
  """Renders records to token ids with one tokenizer.

  Args:
    tokenizer: of the student. Without a chat template, text prompts are encoded as they are.
    privileged_template: the last user message of a privileged prompt; `{prompt}` stands for the
      plain message, `{context}` for the privileged context, and every other brace for itself.
    thinking: what the template gets as `enable_thinking`, where it knows that name.
    stop_id: the token that ends a completion; by default the tokenizer's eos token.
    images: of the model that reads the images of the records; None for text only.

  Raises:
    UserError: the privileged template lacks a placeholder, or the tokenizer the image token.
  """

  def __init__(
    self,
    tokenizer: 'PreTrainedTokenizerBase',
    privileged_template: str = DEFAULT_TEMPLATE,
    thinking: bool = False,
    stop_id: int | None = None,
    images: ImageInputs | None = None,
  ):
    for placeholder in ('{prompt}', '{context}'):
      if placeholder not in privileged_template:
        raise UserError(
          f'data.privileged_template must contain {placeholder}; {privileged_template!r} does not.'
        )
    if images is not None and not 0 <= images.image_token_id < len(tokenizer):
      raise UserError(
        f'The tokenizer of {len(tokenizer)} tokens lacks the image token {images.image_token_id}: '
        'use the tokenizer of the model that reads the images.'
      )
    self.tokenizer = tokenizer
    self.images = images
    self.stop_id = tokenizer.eos_token_id if stop_id is None else stop_id
    bos = tokenizer.bos_token_id
    self._bos = [bos] if bos is not None and tokenizer('a')['input_ids'][:1] == [bos] else []
    self._pieces = _PLACEHOLDER.split(privileged_template)
    self._chat_template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    # Only where the template knows it: some templates refuse or misread what they do not know.
    knows_thinking = self._chat_template and 'enable_thinking' in self._chat_template
    self._template_options: dict[str, Any] = {'enable_thinking': thinking} if knows_thinking else {}

  def plain(self, record: Record) -> list[int]:
    """Ids of the prompt without privileged context: BOS at most once, no EOS at the end."""
    return self.plain_batch([record])[0]

  def privileged(self, record: Record) -> list[int]:
    """Ids of the prompt with its privileged context; a blank context gives exactly `plain`."""
    return self.privileged_batch([record])[0]

  def completion(self, record: Record) -> list[int] | None:
    """Ids of a given completion and exactly one stop token; None where none is given."""
    return self.completion_batch([record])[0]

  def plain_batch(
    self, records: Sequence[Record], grids: Sequence[Sequence[Grid]] | None = None
  ) -> list[list[int]]:
    """`plain` of several records, faster than one by one.

    Args:
      records: any number.
      grids: of each record, the patches (t, h, w) of each of its images as the model will see them:
        those of another view than the full image must be given. None reads the heads of the images.

    Raises:
      UserError: images in a run of text, more or fewer places for images than images, or a chat
        template that refuses the messages.
    """
    return self._prompt_ids(records, [_placed(record) for record in records], grids)

  def privileged_batch(
    self, records: Sequence[Record], grids: Sequence[Sequence[Grid]] | None = None
  ) -> list[list[int]]:
    """`privileged` of several records; the same images stand at the same places."""
    prompts = [self._privileged_prompt(record) for record in records]
    return self._prompt_ids(records, prompts, grids)

  def completion_batch(self, records: Sequence[Record]) -> list[list[int] | None]:
    """`completion` of several records."""
    given = [record.completion for record in records if record.completion is not None]
    if given and self.stop_id is None:
      raise UserError('The tokenizer has no eos token: name the token that ends a completion.')
    encoded = iter(self._encode(given))
    if self.images is not None:
      encoded = iter(
        self._without_images([r for r in records if r.completion is not None], encoded)
      )
    return [None if r.completion is None else self._stopped(next(encoded)) for r in records]

  def _stopped(self, ids: list[int]) -> list[int]:
    while ids and ids[-1] == self.stop_id:
      ids.pop()
    return [*ids, self.stop_id]

  def _privileged_prompt(self, record: Record) -> str | list[Message]:
    context = record.privileged_context
    prompt = _placed(record)
    if context is None or not context.strip():
      return prompt
    if isinstance(prompt, str):
      return self._with_context(prompt, context)
    messages = [dict(message) for message in prompt]
    last = max(i for i, message in enumerate(messages) if message['role'] == 'user')
    messages[last]['content'] = self._with_context(messages[last]['content'], context)
    return messages

  def _with_context(self, prompt: Any, context: str) -> Any:
    # Pieces are replaced, not formatted: braces in a prompt or a context are their own business.
    fields = {'{prompt}': prompt, '{context}': context}
    pieces = [fields.get(piece, piece) for piece in self._pieces]
    if isinstance(prompt, str):
      return ''.join(pieces)
    return _joined([p for piece in pieces for p in ([piece] if isinstance(piece, str) else piece)])

  def _prompt_ids(
    self,
    records: Sequence[Record],
    prompts: Sequence[str | list[Message]],
    grids: Sequence[Sequence[Grid]] | None,
  ) -> list[list[int]]:
    if self.images is None:
      unread = next((record for record in records if record.images), None)
      if unread is not None:
        raise images_unread(unread)
      return self._text_ids(records, prompts)
    if grids is None:
      grids = [image_grids(record, self.images) for record in records]
    if [len(record.images) for record in records] != [len(each) for each in grids]:
      raise ValueError('each image of each record needs a grid')
    ids = self._text_ids(records, prompts)
    return [self._expanded(*row) for row in zip(records, ids, grids, strict=True)]

  def _expanded(self, record: Record, ids: list[int], grids: Sequence[Grid]) -> list[int]:
    """The ids with every image token repeated as its image has features."""
    assert self.images is not None
    token, tokens = self.images.image_token_id, self.images.processor.tokens
    count = ids.count(token)
    if count != len(grids):
      cause = (
        'the chat template of the tokenizer writes none; use the template of the model'
        if not count
        else 'take image tokens out of its text'
      )
      raise UserError(
        f'Record {record.id}: its rendered prompt has {count} image tokens for {len(grids)} '
        f'images: {cause}.'
      )
    if not grids:
      return ids
    left = iter(grids)
    return [i for one in ids for i in ([one] * tokens(next(left)) if one == token else [one])]

  def _without_images(
    self, records: Sequence[Record], encoded: Iterable[list[int]]
  ) -> Iterator[list[int]]:
    assert self.images is not None
    for record, ids in zip(records, encoded):
      if self.images.image_token_id in ids:
        raise UserError(
          f'Record {record.id}: the completion has an image token, which only a prompt may have; '
          'take it out.'
        )
      yield ids

  def _text_ids(
    self, records: Sequence[Record], prompts: Sequence[str | list[Message]]
  ) -> list[list[int]]:
    if self._chat_template is None:
      texts = [_only_text(record, prompt) for record, prompt in zip(records, prompts)]
      # BOS where the tokenizer itself would begin with it; its EOS, if it adds one, stays away.
      return [[*self._bos, *ids] if ids[:1] != self._bos else ids for ids in self._encode(texts)]
    chats = [[{'role': 'user', 'content': p}] if isinstance(p, str) else p for p in prompts]
    try:
      texts = self._apply_template(chats)
    except Exception:
      # Templates raise errors of their own on roles that they do not take: find out on whose.
      for record, chat in zip(records, chats):
        try:
          self._apply_template([chat])
        except Exception as error:
          raise UserError(
            f'Record {record.id}: the chat template refuses its messages ({error}).'
          ) from error
      raise
    # The template has written BOS if the model wants it: no second one from the tokenizer.
    return self._encode(texts)

  def _apply_template(self, chats: list[list[Message]]) -> list[str]:
    texts = self.tokenizer.apply_chat_template(
      chats,
      chat_template=self._chat_template,
      tokenize=False,
      add_generation_prompt=True,
      **self._template_options,
    )
    return cast(list[str], texts)

  def _encode(self, texts: list[str]) -> list[list[int]]:
    if not texts:
      return []
    return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)['input_ids']]


def _only_text(record: Record, prompt: str | list[Message]) -> str:
  if isinstance(prompt, str):
    return prompt
  if len(prompt) == 1 and isinstance(prompt[0]['content'], str):
    return prompt[0]['content']
  raise UserError(
    f'Record {record.id}: the tokenizer has no chat template to render a conversation or an image '
    'with; give the prompt as text.'
  )


def _placed(record: Record) -> str | list[Message]:
  """The prompt with a part {'type': 'image'} where each image stands; text stays as it is."""
  prompt = record.prompt
  if not record.images and isinstance(prompt, str):
    return prompt
  messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
  places = sum(_is_image(part) for m in messages for part in m['content'])
  if record.images and not places:  # so all contents are text
    marked = sum(m['content'].count(IMAGE_MARKER) for m in messages)
    if marked:
      messages = [{**m, 'content': _at_markers(m['content'])} for m in messages]
    else:
      first = next(i for i, m in enumerate(messages) if m['role'] == 'user')
      messages = list(messages)
      content = messages[first]['content']
      images = [{'type': 'image'} for _ in record.images]
      messages[first] = {**messages[first], 'content': _joined([*images, content])}
    places = marked or len(record.images)
  if places != len(record.images):
    raise UserError(
      f'Record {record.id}: the prompt has {places} places for images ({IMAGE_MARKER} or parts of '
      f'the type image) and the record has {len(record.images)} images; make them equal.'
    )
  return messages


def _at_markers(text: str) -> Any:
  """Text and images in turn; text alone where it has no marker."""
  first, *rest = text.split(IMAGE_MARKER)
  if not rest:
    return text
  return _joined([first, *(part for piece in rest for part in ({'type': 'image'}, piece))])


def _joined(parts: Sequence[Any]) -> list[dict[str, Any]]:
  """Parts of a message, given as parts or as text, with neighbouring texts made one."""
  result: list[dict[str, Any]] = []
  for part in parts:
    text = part if isinstance(part, str) else part.get('text')
    if text is None:
      result.append(part)
    elif text and result and result[-1]['type'] == 'text':
      result[-1] = {'type': 'text', 'text': result[-1]['text'] + text}
    elif text:
      result.append({'type': 'text', 'text': text})
  return result


def _is_image(part: Any) -> bool:
  return isinstance(part, dict) and part.get('type') == 'image'
