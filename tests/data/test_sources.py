"""Every source gives the same records, with random access and errors that name the place."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dopd_jax.data import open_source, write_array_record
from dopd_jax.errors import UserError

CHAT = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hello {x} 中'}]
ROWS = [
  {'id': 'a', 'prompt': 'One?', 'privileged_context': 'h1', 'answer': '1', 'level': 1},
  {'id': 'b', 'prompt': 'Two?', 'privileged_context': '', 'answer': '2', 'level': 2},
  {'id': 'c', 'prompt': 'Drei ä?', 'privileged_context': 'h3', 'answer': '3', 'level': 3},
]


def write_jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return str(path)


def write_parquet(path, rows):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return str(path)


def write_json_array_record(path, rows):
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for row in rows:
    writer.write(json.dumps(row).encode())
  writer.close()
  return str(path)


def write_msgpack_array_record(path, rows):
  assert write_array_record(rows, str(path)) == len(rows)
  return str(path)


WRITERS = {
  'rows.jsonl': write_jsonl,
  'rows.parquet': write_parquet,
  'rows.array_record': write_msgpack_array_record,
  'rows_json.array_record': write_json_array_record,
}


@pytest.mark.parametrize('name', WRITERS)
def test_every_format_gives_the_same_records(tmp_path, name):
  source = open_source(WRITERS[name](tmp_path / name, ROWS))
  assert len(source) == 3
  assert [r.id for r in source] == ['a', 'b', 'c']
  assert source[2].prompt == 'Drei ä?'
  assert source[-1] == source[2]
  assert source[1].privileged_context == ''
  assert source[1:] == [source[1], source[2]]
  assert source[0].extra == {'level': 1}
  with pytest.raises(IndexError):
    source[3]


@pytest.mark.parametrize('name', WRITERS)
def test_chat_messages_in_every_format(tmp_path, name):
  rows = [{'prompt': CHAT, 'privileged_context': 'h'}]
  assert open_source(WRITERS[name](tmp_path / name, rows))[0].prompt == CHAT


@pytest.mark.parametrize('name', WRITERS)
def test_mistakes_name_file_and_row(tmp_path, name):
  path = WRITERS[name](tmp_path / name, [ROWS[0], {**ROWS[1], 'prompt': ' '}])
  with pytest.raises(UserError) as error:
    open_source(path)
  row = {'rows.jsonl': 'line 2', 'rows.parquet': 'row 1'}.get(name, 'record 1')
  assert f'{name} {row}, record {ROWS[1]["id"]}: the prompt is empty' in str(error.value)


def test_records_survive_the_array_record_writer(tmp_path):
  first = open_source(write_jsonl(tmp_path / 'rows.jsonl', ROWS))
  path = str(tmp_path / 'rows.array_record')
  assert write_array_record(first, path) == 3
  assert list(open_source(path)) == list(first)


def test_several_files_in_order_of_name(tmp_path):
  write_jsonl(tmp_path / 'part-1.jsonl', ROWS[2:])
  write_jsonl(tmp_path / 'part-0.jsonl', ROWS[:2])
  (tmp_path / 'part-2.jsonl').write_text('')
  source = open_source(str(tmp_path / 'part-*.jsonl'))
  assert [r.id for r in source] == ['a', 'b', 'c']
  assert source.place(2) == 'part-1.jsonl line 1'


def test_ids_are_made_from_the_place(tmp_path):
  rows = [{'prompt': 'x', 'privileged_context': ''}] * 2
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n\n'.join(json.dumps(row) for row in rows))
  assert [r.id for r in open_source(str(path))] == ['rows.jsonl-line-1', 'rows.jsonl-line-3']


@pytest.mark.parametrize(
  'line, words',
  [
    ('{"prompt": "x"', ['line 2', 'not JSON']),
    ('{"prompt": "x"} {"prompt": "y"}', ['line 2', 'not JSON']),
    ('[1, 2]', ['line 2', 'object']),
    ('{"prompt": "x"}', ['line 2', 'privileged_context']),
    ('{"question": "x", "privileged_context": ""}', ['line 2', 'no prompt']),
    ('{"id": "a", "prompt": "x", "privileged_context": ""}', ['line 2', 'line 1', "'a'"]),
  ],
)
def test_broken_lines(tmp_path, line, words):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps(ROWS[0]) + '\n' + line + '\n')
  with pytest.raises(UserError) as error:
    open_source(str(path))
  assert '\n' not in str(error.value)
  for word in ['rows.jsonl', *words]:
    assert word in str(error.value)


def test_text_that_is_not_utf8(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"prompt": "x", "privileged_context": ""}\n{"prompt": "\xff"}\n')
  with pytest.raises(UserError, match=r'rows.jsonl line 2: this is not UTF-8'):
    open_source(str(path))


def test_a_byte_order_mark_is_no_fault(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'\xef\xbb\xbf' + json.dumps(ROWS[0]).encode() + b'\r\n')
  assert open_source(str(path))[0].id == 'a'


@pytest.mark.parametrize('name', ['broken.parquet', 'broken.array_record'])
def test_unreadable_files(tmp_path, name):
  (tmp_path / name).write_bytes(b'not at all' * 100)
  with pytest.raises(UserError, match=f'{name} is not a readable'):
    open_source(str(tmp_path / name))


def test_an_entry_that_is_neither_msgpack_nor_json(tmp_path):
  from array_record.python.array_record_module import ArrayRecordWriter

  path = str(tmp_path / 'rows.array_record')
  writer = ArrayRecordWriter(path, 'group_size:1')
  writer.write(b'\xc1\xff\x00')
  writer.close()
  with pytest.raises(UserError, match=r'rows.array_record record 0: this is neither'):
    open_source(path)


@pytest.mark.parametrize('spec', ['nowhere.jsonl', 'no/such/*.parquet', 'http:x', '', 'tfds:mnist'])
def test_no_such_source(spec):
  with pytest.raises(UserError):
    open_source(spec)


def test_unknown_format_and_empty_file(tmp_path):
  (tmp_path / 'rows.csv').write_text('prompt\nx\n')
  with pytest.raises(UserError, match=r'rows.csv is unknown'):
    open_source(str(tmp_path / 'rows.csv'))
  (tmp_path / 'rows.jsonl').write_text('\n')
  with pytest.raises(UserError, match='holds no records'):
    open_source(str(tmp_path / 'rows.jsonl'))


def test_loaders_bring_schemes():
  loaders = {'task': lambda rest: [{**ROWS[0], 'prompt': rest}]}
  assert open_source('task:thing?size=1', loaders=loaders)[0].prompt == 'thing?size=1'
  with pytest.raises(UserError, match='task:'):
    open_source('tusk:thing', loaders=loaders)


def test_privileged_none_and_columns(tmp_path):
  path = write_jsonl(tmp_path / 'rows.jsonl', [{'question': 'x', 'privileged_context': 'h'}])
  source = open_source(path, privileged='none', columns={'prompt': 'question'})
  assert (source[0].prompt, source[0].privileged_context) == ('x', '')


TFDS_SCRIPT = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Riddles(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    text = tfds.features.Text()
    message = {'role': tfds.features.Text(), 'content': tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      'id': text, 'prompt': tfds.features.Sequence(message), 'privileged_context': text,
      'level': tfds.features.Scalar(dtype=np.int32)}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(3):
      chat = [{'role': 'system', 'content': 'ä'}, {'role': 'user', 'content': f'what is {i}?'}]
      yield i, {'id': f'r{i}', 'prompt': chat, 'privileged_context': f'h{i}', 'level': i}

directory = sys.argv[1]
Riddles(data_dir=directory, file_format='array_record').download_and_prepare()

from dopd_jax.data import open_source
from dopd_jax.errors import UserError

source = open_source(f'tfds:riddles:train?data_dir={directory}')
by_id = {record.id: record for record in source}
assert sorted(by_id) == ['r0', 'r1', 'r2'], by_id
assert by_id['r2'].prompt == [
  {'role': 'system', 'content': 'ä'}, {'role': 'user', 'content': 'what is 2?'}], by_id['r2']
assert by_id['r2'].privileged_context == 'h2'
assert by_id['r2'].extra == {'level': 2}
assert len(open_source(f'tfds:riddles:1.0.0:train[:2]?data_dir={directory}')) == 2
for bad in ('tfds:riddles:test', 'tfds:no_such_thing:train'):
  try:
    open_source(f'{bad}?data_dir={directory}')
  except UserError as error:
    assert 'array_record' in str(error) and chr(10) not in str(error), error
  else:
    raise AssertionError(bad)
assert not [name for name in sys.modules if name.split('.')[0] == 'tensorflow']
"""


def test_tensorflow_datasets_without_tensorflow(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', TFDS_SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
