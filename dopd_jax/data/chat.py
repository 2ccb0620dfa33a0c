"""The plain and the privileged rendering of a prompt, by the student's chat template.

Every policy, student or teacher, reads the ids made here: one tokenizer, one template, one
generation state. The two renderings of a record differ by the privileged section in the last user
message and in nothing else.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from dopd_jax.data.records import Message, Record
from dopd_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = (
  '{prompt}\n\nReference for this problem (do not mention it in your answer):\n{context}'
)
_PLACEHOLDER = re.compile(r'(\{prompt\}|\{context\})')


class Renderer:
  """Renders records to token ids with one tokenizer.

  Args:
    tokenizer: of the student. Without a chat template, text prompts are encoded as they are.
    privileged_template: the last user message of a privileged prompt; `{prompt}` stands for the
      plain message, `{context}` for the privileged context, and every other brace for itself.
    thinking: what the template gets as `enable_thinking`, where it knows that name.
    stop_id: the token that ends a completion; by default the tokenizer's eos token.

  Raises:
    UserError: the privileged template lacks a placeholder.
  """

  def __init__(
    self,
    tokenizer: 'PreTrainedTokenizerBase',
    privileged_template: str = DEFAULT_TEMPLATE,
    thinking: bool = False,
    stop_id: int | None = None,
  ):
    for placeholder in ('{prompt}', '{context}'):
      if placeholder not in privileged_template:
        raise UserError(
          f'data.privileged_template must contain {placeholder}; {privileged_template!r} does not.'
        )
    self.tokenizer = tokenizer
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

  def plain_batch(self, records: Sequence[Record]) -> list[list[int]]:
    """`plain` of several records, faster than one by one."""
    return self._prompt_ids(records, [record.prompt for record in records])

  def privileged_batch(self, records: Sequence[Record]) -> list[list[int]]:
    """`privileged` of several records."""
    return self._prompt_ids(records, [self._privileged_prompt(record) for record in records])

  def completion_batch(self, records: Sequence[Record]) -> list[list[int] | None]:
    """`completion` of several records."""
    given = [record.completion for record in records if record.completion is not None]
    if given and self.stop_id is None:
      raise UserError('The tokenizer has no eos token: name the token that ends a completion.')
    encoded = iter(self._encode(given))
    return [None if r.completion is None else self._stopped(next(encoded)) for r in records]

  def _stopped(self, ids: list[int]) -> list[int]:
    while ids and ids[-1] == self.stop_id:
      ids.pop()
    return [*ids, self.stop_id]

  def _privileged_prompt(self, record: Record) -> str | list[Message]:
    context = record.privileged_context
    if context is None or not context.strip():
      return record.prompt
    if isinstance(record.prompt, str):
      return self._with_context(record.prompt, context)
    messages = [dict(message) for message in record.prompt]
    last = max(i for i, message in enumerate(messages) if message['role'] == 'user')
    messages[last]['content'] = self._with_context(messages[last]['content'], context)
    return messages

  def _with_context(self, prompt: str, context: str) -> str:
    # Pieces are replaced, not formatted: braces in a prompt or a context are its own business.
    fields = {'{prompt}': prompt, '{context}': context}
    return ''.join(fields.get(piece, piece) for piece in self._pieces)

  def _prompt_ids(
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
  if len(prompt) == 1:
    return prompt[0]['content']
  raise UserError(
    f'Record {record.id}: the tokenizer has no chat template to render a conversation with; '
    'give the prompt as text.'
  )
