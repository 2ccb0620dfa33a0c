"""Rows are read strictly: every mistake is one sentence that names its place."""

import pytest

from dopd_jax.data import Record, parse_record
from dopd_jax.errors import UserError

ROW = {'prompt': 'Why?', 'privileged_context': 'Because.'}
CHAT = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Why?'}]


def parse(row, **options):
  return parse_record(row, 'train.jsonl line 3', default_id='x-3', **options)


def test_all_columns():
  row = {
    'id': 'a1',
    'prompt': CHAT,
    'privileged_context': 'Because.',
    'completion': '',
    'answer': '4',
    'verifier': 'exact',
    'teacher': 'maths',
    'source': 'book',
    'level': 3,
  }
  assert parse(row) == Record(
    id='a1',
    prompt=CHAT,
    privileged_context='Because.',
    completion='',
    answer='4',
    verifier='exact',
    teacher='maths',
    extra={'source': 'book', 'level': 3},
  )


def test_absent_columns_are_none_and_the_id_comes_from_the_place():
  assert parse(ROW) == Record('x-3', 'Why?', 'Because.')


def test_null_is_absent():
  assert parse({**ROW, 'answer': None, 'id': None}) == Record('x-3', 'Why?', 'Because.')


def test_numbers_are_good_ids_and_answers():
  record = parse({**ROW, 'id': 7, 'answer': 2.5})
  assert (record.id, record.answer) == ('7', '2.5')


def test_privileged_none_empties_the_column_too():
  assert parse(ROW, privileged='none').privileged_context == ''
  assert parse({'prompt': 'Why?'}, privileged='none').privileged_context == ''


def test_a_blank_context_is_a_context():
  assert parse({**ROW, 'privileged_context': ''}).privileged_context == ''


def test_columns_are_mapped():
  row = {'question': 'Why?', 'hint': 'Because.', 'answer': 'x', 'prompt': 'not this'}
  record = parse(row, columns={'prompt': 'question', 'privileged_context': 'hint'})
  assert (record.prompt, record.privileged_context, record.answer) == ('Why?', 'Because.', 'x')
  assert record.extra == {'prompt': 'not this'}


def test_table_messages_may_hold_nulls():
  message = {'role': 'user', 'content': 'Why?', 'tool_calls': None}
  assert parse({**ROW, 'prompt': [message]}).prompt == [{'role': 'user', 'content': 'Why?'}]


@pytest.mark.parametrize(
  'row, words',
  [
    ('text', ['object', 'not text']),
    ([1], ['object', 'a list']),
    ({'privileged_context': 'x'}, ['no prompt', 'data.columns']),
    ({**ROW, 'prompt': ''}, ['prompt is empty']),
    ({**ROW, 'prompt': ' \n'}, ['prompt is empty']),
    ({**ROW, 'prompt': []}, ['prompt is empty']),
    ({**ROW, 'prompt': 3}, ['prompt', 'a number']),
    ({**ROW, 'prompt': {'role': 'user'}}, ['prompt', 'an object']),
    ({**ROW, 'prompt': ['Why?']}, ['message', 'not text']),
    ({**ROW, 'prompt': [{'role': 'user'}]}, ['role and content']),
    ({**ROW, 'prompt': [{'role': 'user', 'content': 3}]}, ['content', 'a number']),
    ({**ROW, 'prompt': [{'role': 'human', 'content': 'Why?'}]}, ["'human'", 'user']),
    ({**ROW, 'prompt': [{'role': 'user', 'content': ' '}]}, ['last user message']),
    ({**ROW, 'prompt': [*CHAT, {'role': 'assistant', 'content': 'x'}]}, ['ends', 'assistant']),
    ({'prompt': 'Why?'}, ['no privileged_context', "data.privileged='none'"]),
    ({**ROW, 'privileged_context': ['x']}, ['privileged_context', 'a list']),
    ({**ROW, 'completion': 3}, ['completion', 'a number']),
    ({**ROW, 'answer': True}, ['answer', 'truth value']),
    ({**ROW, 'id': ''}, ['id is empty']),
    ({**ROW, 'prompt': 'a\ud800'}, ['prompt', 'surrogate']),
  ],
)
def test_a_mistake_names_its_place(row, words):
  with pytest.raises(UserError) as error:
    parse(row)
  message = str(error.value)
  assert message.startswith('train.jsonl line 3: ')
  assert '\n' not in message
  for word in words:
    assert word in message


def test_unknown_options():
  with pytest.raises(UserError, match=r'data.privileged'):
    parse(ROW, privileged='maybe')
  with pytest.raises(UserError, match='question'):
    parse(ROW, columns={'question': 'prompt'})
