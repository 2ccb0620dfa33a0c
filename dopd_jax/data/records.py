"""One example as its columns, and the strict reading of a row into it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dopd_jax.data import boxes as box_columns
from dopd_jax.data.images import as_sources, inside
from dopd_jax.errors import UserError

# {'role': ..., 'content': ...}; the content is text, or parts: {'type': 'image'} stands for the
# next of the record's images, {'type': 'text', 'text': ...} for text.
Message = dict[str, Any]
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
# What goes with images, besides the images themselves.
IMAGE_COLUMNS = ('boxes', 'labels', 'caption', 'box_format')
# Columns with a meaning; every other column of a row is kept in `extra`.
COLUMNS = (
  'id',
  'prompt',
  'privileged_context',
  'completion',
  'answer',
  'verifier',
  'teacher',
  'images',
  *IMAGE_COLUMNS,
)


@dataclasses.dataclass(frozen=True)
class Record:
  """One example.

  Attributes:
    id: unique within its source; made from the place of the row where the data have none.
    prompt: text, or chat messages [{'role': ..., 'content': ...}] that end with the turn to answer.
      Images stand where the text has `<image>`, or where a message has parts {'type': 'image'}; or
      else in front of the first user message.
    privileged_context: what the privileged policies see besides the prompt; blank means nothing.
    completion: a given completion, for training or scoring on fixed data.
    answer: the right answer, for a verifier.
    verifier: name of the function that judges a completion (`dopd_jax.tasks.verify`).
    teacher: name of the teacher for this record, where a run has several.
    extra: all other columns, as they came.
    images: where the images come from, not decoded: what `dopd_jax.data.read_image` reads. Relative
      paths of a file's rows are relative to the folder of that file where they exist there, and
      no path leads out of it.
    boxes: (x1, y1, x2, y2) each, in the units of `box_format`; of the one image of the record.
    labels: one a box.
    caption: what the image shows, in words.
    box_format: 'absolute', pixels of the original image as shown (EXIF orientation applied), or
      'thousand', from 0 to 1000 over its width and height; None without boxes.
  """

  id: str
  prompt: str | list[Message]
  privileged_context: str | None = None
  completion: str | None = None
  answer: str | None = None
  verifier: str | None = None
  teacher: str | None = None
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)
  images: tuple[Any, ...] = ()
  boxes: tuple[box_columns.Box, ...] | None = None
  labels: tuple[str, ...] | None = None
  caption: str | None = None
  box_format: str | None = None


def parse_record(
  row: Any,
  where: str,
  *,
  default_id: str,
  privileged: str = 'column',
  columns: Mapping[str, str] | None = None,
  privileged_kind: str = 'column',
  box_format: str = 'absolute',
  folders: Sequence[str] = (),
) -> Record:
  """Reads a row into a record.

  The columns boxes, labels, caption and box_format have their meaning in rows with images, and
  where `privileged_kind` asks for them; in all other rows they are columns like any other.

  Args:
    row: a mapping of column names to values.
    where: the place of the row, for errors: 'train.jsonl line 3'.
    default_id: the id of a row without one.
    privileged: 'column' wants a privileged_context in every row (it may be blank); 'none' gives
      every record an empty one, also where the column exists.
    columns: our column name -> the name it has in these data.
    privileged_kind: 'column', or one of `boxes.KINDS`: what the context will be made of once the
      size of the image is known (`tokenise`); the columns that it takes must be there, and
      privileged_context is left aside.
    box_format: of rows without a column box_format: 'absolute' or 'thousand'.
    folders: where relative paths of images start, and all paths must end; none for data that code
      has made, which may name any file.

  Raises:
    UserError: a missing column, an empty prompt, a value of the wrong type, impossible boxes, an
      image that lies outside the folders.
  """
  if not isinstance(row, Mapping):
    raise UserError(f'{where}: a record is an object with columns, not {_kind(row)}.')
  check_columns(columns)
  if privileged not in ('column', 'none'):
    raise UserError(f"data.privileged is 'column' or 'none', not {privileged!r}.")
  box_columns.check_options(privileged_kind, box_format)
  kind = 'none' if privileged == 'none' else privileged_kind
  names = {name: (columns or {}).get(name, name) for name in COLUMNS}
  values = {name: row.get(key) for name, key in names.items()}
  # A completion may be empty, an id may not, and a number is as good an id or answer as its digits.
  record_id = _text(values['id'], 'id', where, numbers=True)
  if record_id is not None and not record_id.strip():
    raise UserError(f'{where}: the id is empty; give the record an id or leave the column out.')
  if record_id is not None:
    where = f'{where}, record {record_id}'
  context = _text(values['privileged_context'], 'privileged_context', where)
  if kind != 'column':
    context = '' if kind == 'none' else None
  elif context is None:
    raise UserError(
      f'{where}: there is no {names["privileged_context"]}; add this column, name yours in '
      "data.columns, or set data.privileged='none' to train without."
    )
  prompt, in_parts = _prompt(values['prompt'], names['prompt'], where)
  images, used = _images(row, names['images'], where, mapped='images' in (columns or {}))
  if in_parts and images:
    raise UserError(
      f'{where}: images come both from the {names["prompt"]} and from the column {used}; '
      'give them once.'
    )
  images = images or tuple(in_parts)
  used_names = {key for name, key in names.items() if name not in IMAGE_COLUMNS}
  pictured: dict[str, Any] = {}
  if images or kind not in ('column', 'none', 'answer'):
    default_format = values['box_format'] or box_format
    pictured = box_columns.parse_columns(values, names, default_format, where)
    used_names |= {names[name] for name in IMAGE_COLUMNS}
  answer = _text(values['answer'], 'answer', where, numbers=True)
  box_columns.check_kind(kind, {**pictured, 'answer': answer}, names, where)
  return Record(
    id=default_id if record_id is None else record_id,
    prompt=prompt,
    privileged_context=context,
    completion=_text(values['completion'], 'completion', where),
    answer=answer,
    verifier=_text(values['verifier'], 'verifier', where),
    teacher=_text(values['teacher'], 'teacher', where),
    extra={key: value for key, value in row.items() if key not in used_names | {used}},
    images=tuple(inside(image, folders, where) for image in images) if folders else images,
    **pictured,
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


def _images(
  row: Mapping[str, Any], name: str, where: str, mapped: bool
) -> tuple[tuple[Any, ...], str | None]:
  """The sources of a row's images, and the column that they came from."""
  given = [key for key in ((name,) if mapped else (name, 'image')) if row.get(key) is not None]
  if len(given) > 1:
    raise UserError(
      f'{where}: both columns {" and ".join(given)} hold images; name one in data.columns.'
    )
  if not given:
    return (), None
  return as_sources(row[given[0]], f'{where}: the column {given[0]}'), given[0]


def _prompt(value: Any, name: str, where: str) -> tuple[str | list[Message], list[Any]]:
  """The prompt, and the images that its parts carry."""
  if value is None:
    raise UserError(f'{where}: there is no {name}; add this column, or name yours in data.columns.')
  if isinstance(value, str):
    text = _text(value, name, where)
    if not value.strip():
      raise UserError(f'{where}: the {name} is empty; write one or remove the record.')
    assert text is not None
    return text, []
  if not isinstance(value, list | tuple):
    raise UserError(f'{where}: the {name} is text or chat messages, not {_kind(value)}.')
  if not value:
    raise UserError(f'{where}: the {name} is empty; write one or remove the record.')
  images: list[Any] = []
  messages = [_message(item, name, where, images) for item in value]
  if messages[-1]['role'] not in ('user', 'tool'):
    raise UserError(
      f'{where}: the {name} ends with a message of the {messages[-1]["role"]}; '
      'end it with the user message that is to be answered.'
    )
  last_user = [m['content'] for m in messages if m['role'] == 'user'][-1:]
  # Parts are only kept where there is an image among them: that is no empty message.
  if not last_user or (isinstance(last_user[0], str) and not last_user[0].strip()):
    raise UserError(f'{where}: the {name} has an empty last user message; write one.')
  return messages, images


def _message(item: Any, name: str, where: str, images: list[Any]) -> Message:
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
  what = f'content of a message of the {name}'
  if isinstance(fields['content'], list | tuple):
    return {'role': role, 'content': _parts(fields['content'], what, where, images)}
  content = _text(fields['content'], what, where)
  assert content is not None
  return {'role': role, 'content': content}


def _parts(items: Any, what: str, where: str, images: list[Any]) -> str | list[Message]:
  """Parts of a message, its images moved to `images`; plain text where all of them are text."""
  parts: list[Message] = []
  for item in items:
    fields = {k: v for k, v in item.items() if v is not None} if isinstance(item, Mapping) else {}
    if fields.get('type') == 'text' and set(fields) == {'type', 'text'}:
      parts.append({'type': 'text', 'text': _text(fields['text'], f'text in the {what}', where)})
      continue
    sources = [fields[key] for key in ('image', 'image_url', 'url', 'path') if key in fields]
    if fields.get('type') not in ('image', 'image_url') or len(sources) > 1:
      raise UserError(
        f"{where}: a part of the {what} is {{'type': 'text', 'text': ...}} or {{'type': 'image'}}, "
        f'not {_kind(item) if not fields else sorted(fields)}.'
      )
    for source in sources:
      source = source['url'] if isinstance(source, Mapping) and 'url' in source else source
      images += as_sources(source, f'{where}: an image in the {what}')
    parts.append({'type': 'image'})
  if all(part['type'] == 'text' for part in parts):
    return ''.join(part['text'] for part in parts)
  return parts


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
