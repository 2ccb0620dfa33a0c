"""One example as its columns, and the strict reading of a row into it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dopd_jax.errors import UserError

Message = dict[str, str]
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
# Columns with a meaning; every other column of a row is kept in `extra`.
COLUMNS = (
  'id',
  'prompt',
  'privileged_context',
  'completion',
  'answer',
  'verifier',
  'teacher',
)


@dataclasses.dataclass(frozen=True)
class Record:
  """One example.

  Attributes:
    id: unique within its source; made from the place of the row where the data have none.
    prompt: text, or chat messages [{'role': ..., 'content': ...}] that end with the turn to answer.
    privileged_context: what the privileged policies see besides the prompt; blank means nothing.
    completion: a given completion, for training or scoring on fixed data.
    answer: the right answer, for a verifier.
    verifier: name of the function that judges a completion (`dopd_jax.tasks.verify`).
    teacher: name of the teacher for this record, where a run has several.
    extra: all other columns, as they came.
  """

  id: str
  prompt: str | list[Message]
  privileged_context: str | None = None
  completion: str | None = None
  answer: str | None = None
  verifier: str | None = None
  teacher: str | None = None
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def parse_record(
  row: Any,
  where: str,
  *,
  default_id: str,
  privileged: str = 'column',
  columns: Mapping[str, str] | None = None,
) -> Record:
  """Reads a row into a record.

  Args:
    row: a mapping of column names to values.
    where: the place of the row, for errors: 'train.jsonl line 3'.
    default_id: the id of a row without one.
    privileged: 'column' wants a privileged_context in every row (it may be blank); 'none' gives
      every record an empty one, also where the column exists.
    columns: our column name -> the name it has in these data.

  Raises:
    UserError: a missing column, an empty prompt, a value of the wrong type.
  """
  if not isinstance(row, Mapping):
    raise UserError(f'{where}: a record is an object with columns, not {_kind(row)}.')
  check_columns(columns)
  if privileged not in ('column', 'none'):
    raise UserError(f"data.privileged is 'column' or 'none', not {privileged!r}.")
  names = {name: (columns or {}).get(name, name) for name in COLUMNS}
  values = {name: row.get(key) for name, key in names.items()}
  # A completion may be empty, an id may not, and a number is as good an id or answer as its digits.
  record_id = _text(values['id'], 'id', where, numbers=True)
  if record_id is not None and not record_id.strip():
    raise UserError(f'{where}: the id is empty; give the record an id or leave the column out.')
  context = _text(values['privileged_context'], 'privileged_context', where)
  if privileged == 'none':
    context = ''
  elif context is None:
    raise UserError(
      f'{where}: there is no {names["privileged_context"]}; add this column, name yours in '
      "data.columns, or set data.privileged='none' to train without."
    )
  return Record(
    id=default_id if record_id is None else record_id,
    prompt=_prompt(values['prompt'], names['prompt'], where),
    privileged_context=context,
    completion=_text(values['completion'], 'completion', where),
    answer=_text(values['answer'], 'answer', where, numbers=True),
    verifier=_text(values['verifier'], 'verifier', where),
    teacher=_text(values['teacher'], 'teacher', where),
    extra={key: value for key, value in row.items() if key not in names.values()},
  )


def check_columns(columns: Mapping[str, str] | None) -> None:
  """Raises a UserError where a column mapping names a column that a record does not have."""
  for name, key in (columns or {}).items():
    if name not in COLUMNS:
      raise UserError(
        f'data.columns maps our columns to yours; {name!r} is none of ours: {", ".join(COLUMNS)}.'
      )
    if not isinstance(key, str) or not key:
      raise UserError(f'data.columns[{name!r}] is the name of a column, not {key!r}.')


def _prompt(value: Any, name: str, where: str) -> str | list[Message]:
  if value is None:
    raise UserError(f'{where}: there is no {name}; add this column, or name yours in data.columns.')
  if isinstance(value, str):
    text = _text(value, name, where)
    if not value.strip():
      raise UserError(f'{where}: the {name} is empty; write one or remove the record.')
    assert text is not None
    return text
  if not isinstance(value, list | tuple):
    raise UserError(f'{where}: the {name} is text or chat messages, not {_kind(value)}.')
  if not value:
    raise UserError(f'{where}: the {name} is empty; write one or remove the record.')
  messages = [_message(item, name, where) for item in value]
  if messages[-1]['role'] not in ('user', 'tool'):
    raise UserError(
      f'{where}: the {name} ends with a message of the {messages[-1]["role"]}; '
      'end it with the user message that is to be answered.'
    )
  last_user = [m['content'] for m in messages if m['role'] == 'user'][-1:]
  if not last_user or not last_user[0].strip():
    raise UserError(f'{where}: the {name} has an empty last user message; write one.')
  return messages


def _message(item: Any, name: str, where: str) -> Message:
  if not isinstance(item, Mapping):
    raise UserError(f'{where}: a message of the {name} is an object, not {_kind(item)}.')
  # Tables hold a column for every key that any message has; None there means absent.
  fields = {key: value for key, value in item.items() if value is not None}
  if set(fields) != {'role', 'content'}:
    raise UserError(
      f'{where}: a message of the {name} has the keys role and content, not {sorted(fields)}.'
    )
  role = fields['role']
  if role not in ROLES:
    raise UserError(f'{where}: {role!r} is no role of a message; use one of {", ".join(ROLES)}.')
  content = _text(fields['content'], f'content of a message of the {name}', where)
  assert content is not None
  return {'role': role, 'content': content}


def _text(value: Any, name: str, where: str, numbers: bool = False) -> str | None:
  if value is None:
    return None
  if numbers and isinstance(value, int | float) and not isinstance(value, bool):
    return str(value)
  if not isinstance(value, str):
    raise UserError(f'{where}: the {name} is text, not {_kind(value)}.')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise UserError(
      f'{where}: the {name} holds half of a surrogate pair, which is no text; repair its encoding.'
    ) from None
  return value


def _kind(value: Any) -> str:
  names = {bool: 'a truth value', int: 'a number', float: 'a number', list: 'a list'}
  names |= {str: 'text', dict: 'an object', type(None): 'null', bytes: 'bytes'}
  return names.get(type(value), f'a {type(value).__name__}')
