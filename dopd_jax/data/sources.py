"""Where records come from: files, tensorflow-datasets, and schemes that the caller brings.

Public data with boxes map to our columns (id, prompt, images, boxes, labels, answer) as follows; a
loader of ten lines does it, `open_source('coco:...', loaders={'coco': load})`.

COCO, instances_*.json: images = the path of `images[i].file_name`; boxes and labels of the
`annotations` with this image_id and iscrowd 0, as [x, y, x + w, y + h] of their bbox [x, y, w, h],
in pixels, with the name of their category_id; caption = one of captions_*.json. The question is
yours.

RefCOCO, tensorflow-datasets `ref_coco` (manual download): images = `image`, already pixels; one
record for each raw text of `objects/refexp`, which the prompt asks for; labels = [that text]; boxes
from `objects/bbox`, which is [ymin, xmin, ymax, xmax] in 0 to 1, as [1000 * v for v in (xmin, ymin,
xmax, ymax)] with box_format 'thousand'. The same holds of every tfds BBoxFeature (coco, voc).

GQA: prompt = `question`, answer = `answer`, images = images/IMAGEID.jpg; the values of
`annotations.question` and `annotations.answer` are object ids, which the scene graph of that image
has under `objects` with name, x, y, w, h: boxes = [x, y, x + w, y + h], labels = [name].
"""

import glob
import io
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dopd_jax.data.images import read_image
from dopd_jax.data.records import Record, check_columns, parse_record
from dopd_jax.errors import UserError, first_line

Loader = Callable[[str], Sequence[Mapping[str, Any]]]
# A split may hold colons of its own: train[:10%].
_TFDS = re.compile(r'([^:?]+(?::[\d*]+(?:\.[\d*]+)+)?):([^?]+)(?:\?data_dir=(.+))?')
FORMATS = 'a .jsonl, .parquet or .array_record file, or tfds:NAME:SPLIT'


class Rows(NamedTuple):
  """Rows with random access, what they are called, what one row is called in errors, and where."""

  rows: Sequence[Any]
  name: str
  place: Callable[[int], str]
  folder: str = ''  # of a file: where paths in its rows start and end


class Source(Sequence[Record]):
  """Records with random access; a row is read and parsed when it is asked for."""

  def __init__(self, parts: Sequence[Rows], image_folder: str = '', **options: Any):
    self._image_folder = [image_folder] if image_folder else []
    self._parts = [part for part in parts if len(part.rows)]
    self._ends = list(accumulate(len(part.rows) for part in self._parts))
    self._options = options

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index):  # pyrefly: ignore[bad-override]
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    part, row = self._locate(index % len(self))
    place = part.place(row)
    return parse_record(
      part.rows[row],
      place,
      default_id=place.replace(' ', '-'),
      folders=[part.folder, *self._image_folder] if part.folder else [],
      **self._options,
    )

  def place(self, index: int) -> str:
    """Where the record comes from: 'train.jsonl line 3'."""
    part, row = self._locate(index)
    return part.place(row)

  def _locate(self, index: int) -> tuple[Rows, int]:
    which = bisect_right(self._ends, index)
    return self._parts[which], index - (self._ends[which - 1] if which else 0)


def open_source(
  spec: str,
  *,
  privileged: str = 'column',
  columns: Mapping[str, str] | None = None,
  loaders: Mapping[str, Loader] | None = None,
  privileged_kind: str = 'column',
  box_format: str = 'absolute',
  image_folder: str = '',
) -> Source:
  """Opens a source and checks all of its records.

  Args:
    spec: the path of a .jsonl, .parquet or .array_record file, with * and ? for several files in
      order of name; `tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR]`, prepared as array_record;
      or `SCHEME:REST` for a scheme of `loaders`.
    privileged: 'column', or 'none' for empty privileged contexts.
    columns: our column name -> the name it has in these data, {'prompt': 'question'}.
    loaders: scheme -> function from REST to rows (mappings with our columns).
    privileged_kind: 'column' wants the contexts in the data; a key of `boxes.KINDS` wants what it
      takes instead, and `tokenise` (with the same option) makes the contexts of it.
    box_format: of boxes in rows without that column: 'absolute' (pixels) or 'thousand' (0 to 1000).
    image_folder: where images of a file's rows may lie besides the folder of that file; '/' is
      anywhere.

  Raises:
    UserError: no such source, a broken row (with its line or number), two records with one id, an
      image that lies elsewhere.
  """
  check_columns(columns)
  source = Source(
    _open(spec, loaders or {}),
    privileged=privileged,
    columns=columns,
    privileged_kind=privileged_kind,
    box_format=box_format,
    image_folder=image_folder,
  )
  if not len(source):
    raise UserError(f'{spec} holds no records.')
  first: dict[str, int] = {}
  for index, record in enumerate(source):
    other = first.setdefault(record.id, index)
    if other != index:
      raise UserError(
        f'{source.place(index)}: the id {record.id!r} is also that of {source.place(other)}; '
        'ids must differ.'
      )
  return source


def write_array_record(records: Iterable[Record | Mapping[str, Any]], path: str) -> int:
  """Writes records as msgpack maps of their columns, one an entry; returns how many.

  Images given as pixels become PNG; those given as paths stay paths.
  """
  import msgpack
  from array_record.python.array_record_module import ArrayRecordWriter

  # One record a group: records are read in shuffled order.
  writer = ArrayRecordWriter(os.fspath(path), 'group_size:1')
  count = 0
  for record in records:
    if isinstance(record, Record):
      own = {k: v for k, v in vars(record).items() if k != 'extra' and v not in (None, ())}
      if record.images:
        own['images'] = [_packable(image) for image in record.images]
      record = {**record.extra, **own}
    writer.write(msgpack.packb(dict(record), use_bin_type=True))
    count += 1
  writer.close()
  return count


def _packable(source: Any) -> Any:
  """An image as msgpack can hold it."""
  if isinstance(source, Image.Image | np.ndarray):
    file = io.BytesIO()
    read_image(source).save(file, 'PNG')
    return file.getvalue()
  return os.fspath(source) if isinstance(source, os.PathLike) else source


def _open(spec: str, loaders: Mapping[str, Loader]) -> list[Rows]:
  if not isinstance(spec, str) or not spec:
    raise UserError(f'A data source is {FORMATS}, not {spec!r}.')
  scheme, colon, rest = spec.partition(':')
  if colon and scheme in loaders:
    return [Rows(loaders[scheme](rest), spec, lambda i: f'{spec} record {i}')]
  if colon and scheme == 'tfds':
    return [_tfds(spec, rest)]
  paths = [spec] if os.path.exists(spec) else sorted(glob.glob(spec))
  if not paths:
    schemes = ''.join(f', or {name}:...' for name in loaders)
    raise UserError(f'There is no data source {spec!r}: name {FORMATS}{schemes}.')
  return [_file(path)._replace(folder=os.path.dirname(path) or '.') for path in paths]


def _file(path: str) -> Rows:
  name = os.path.basename(path)
  if name.endswith(('.jsonl', '.ndjson')):
    return _jsonl(path, name)
  if name.endswith('.parquet'):
    return _parquet(path, name)
  if '.array_record' in name:
    return _array_record(path, name)
  raise UserError(f'The format of {path} is unknown: name {FORMATS}.')


def _jsonl(path: str, name: str) -> Rows:
  rows, numbers = [], []
  with open(path, 'rb') as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        rows.append(json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8')))
      except UnicodeDecodeError:
        raise UserError(
          f'{name} line {number}: this is not UTF-8 text; convert the file.'
        ) from None
      except json.JSONDecodeError as error:
        raise UserError(
          f'{name} line {number}: this is not JSON ({error.msg} at column {error.colno}); '
          'every line holds one object.'
        ) from None
      except RecursionError:
        raise UserError(f'{name} line {number}: the JSON is nested too deeply.') from None
      numbers.append(number)
  return Rows(rows, name, lambda i: f'{name} line {numbers[i]}')


class _ParquetRows(Sequence[Any]):
  """A table that gives Python rows one by one; the columns stay in Arrow memory."""

  def __init__(self, table):
    self._table = table

  def __len__(self):
    return self._table.num_rows

  def __getitem__(self, index):
    return self._table.slice(index, 1).to_pylist()[0]


def _parquet(path: str, name: str) -> Rows:
  import pyarrow
  import pyarrow.parquet

  try:
    table = pyarrow.parquet.read_table(path)
  except (pyarrow.ArrowException, OSError) as error:
    raise UserError(f'{name} is not a readable parquet file: {first_line(error)}.') from None
  return Rows(_ParquetRows(table), name, lambda i: f'{name} row {i}')


class _ArrayRecordRows(Sequence[Any]):
  """Entries of one array_record file, decoded from msgpack or JSON."""

  def __init__(self, path: str, name: str):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self._name = name
    self._data = ArrayRecordDataSource([path])

  def __len__(self):
    return len(self._data)

  def __getitem__(self, index):
    import msgpack

    try:
      entry = bytes(self._data[index])
    except (RuntimeError, ValueError, OSError) as error:  # pages carry hashes
      raise UserError(
        f'{self._name} record {index} is damaged ({first_line(error)}): copy the file again.'
      ) from None
    try:
      # An object in JSON starts with a brace; a map in msgpack never does.
      if entry.lstrip()[:1] == b'{':
        return json.loads(entry.decode())
      return msgpack.unpackb(entry, raw=False)
    except Exception:
      raise UserError(
        f'{self._name} record {index}: this is neither msgpack nor JSON; '
        'write the file with dopd_jax.data.write_array_record.'
      ) from None


def _array_record(path: str, name: str) -> Rows:
  try:
    rows = _ArrayRecordRows(path, name)
    len(rows)
  except (RuntimeError, ValueError, OSError) as error:
    raise UserError(f'{name} is not a readable array_record file: {first_line(error)}.') from None
  return Rows(rows, name, lambda i: f'{name} record {i}')


class _TfdsRows(Sequence[Any]):
  """A tensorflow-datasets data source with plain Python values."""

  def __init__(self, data):
    self._data = data

  def __len__(self):
    return len(self._data)

  def __getitem__(self, index):  # pyrefly: ignore[bad-override]
    row = {key: _plain(value) for key, value in self._data[index].items()}
    # A sequence of messages comes as one list a key.
    for key, value in row.items():
      if isinstance(value, dict) and set(value) == {'role', 'content'}:
        row[key] = [
          {'role': role, 'content': content}
          for role, content in zip(value['role'], value['content'], strict=True)
        ]
    return row


def _tfds(spec: str, rest: str) -> Rows:
  parts = _TFDS.fullmatch(rest)
  if not parts:
    raise UserError(
      f'A tfds source is tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=DIR], not {spec!r}.'
    )
  name, split, data_dir = parts.groups()
  try:
    # builder(...).as_data_source() finds local data that tfds.data_source misses, and needs no
    # TensorFlow where the data were prepared as array_record.
    import tensorflow_datasets as tfds

    data = tfds.builder(name, data_dir=data_dir).as_data_source(split=split)
  except Exception as error:
    raise UserError(
      f'{spec} cannot be opened ({first_line(error)}): prepare it with '
      "file_format='array_record', and name its directory by ?data_dir=DIR."
    ) from None
  return Rows(_TfdsRows(data), spec, lambda i: f'{spec} record {i}')


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
    value = value.item()
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return value
  return value
