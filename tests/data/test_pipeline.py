"""Each record once an epoch, whatever the process count, the stage and the number of restarts."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopd_jax.data import Dropped, Pipeline, Record, Tokenised, make_pipeline, pad_batch, tokenise
from dopd_jax.data.pipeline import Example
from dopd_jax.errors import UserError


class FakeTokenizer:
  unk_token_id = None
  eos_token_id = bos_token_id = 1


class FakeRenderer:
  """A token a character; the privileged prompt is longer by the context."""

  tokenizer = FakeTokenizer()

  def plain_batch(self, records):
    return [[ord(c) for c in r.prompt] for r in records]

  def privileged_batch(self, records):
    return [[ord(c) for c in r.prompt + (r.privileged_context or '')] for r in records]

  def completion_batch(self, records):
    return [None if r.completion is None else [ord(c) for c in r.completion] + [1] for r in records]


def data(size, name='d', dropped=()):
  """A source of which some positions were dropped."""
  kept = [i for i in range(size) if i not in dropped]
  examples = [Example(i, Record(f'{name}{i}', 'x'), [i], [i, i], draw=i) for i in kept]
  return Tokenised(examples, Dropped(prompt=len(dropped)), size, name)


def take(pipeline, count):
  return [next(pipeline) for _ in range(count)]


def flat(batches):
  return [example for batch in batches for example in batch]


def ids(batches):
  return [[e.record.id for e in batch] for batch in batches]


# grain shuffles a few records much more slowly than many: not too many draws of few.
sizes = st.sampled_from([1, 2, 7, 40, 61])


@given(size=sizes, batch=st.integers(1, 13), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_every_record_once_an_epoch(size, batch, seed):
  count = 2 * size // batch + 1
  order = flat(take(Pipeline([(data(size), None)], batch_size=batch, seed=seed), count))
  assert len(order) == count * batch
  for epoch in range(2):
    window = order[epoch * size : (epoch + 1) * size]
    assert sorted(e.index for e in window) == list(range(size))
    assert [e.draw for e in window] == [e.index + epoch * size for e in window]


def test_epochs_and_seeds_and_stages_have_orders_of_their_own():
  def order(seed, stages=1):
    pipeline = Pipeline([(data(50), 2)] * stages, batch_size=50, seed=seed)
    return [[e.index for e in batch] for batch in pipeline]

  first, second = order(0)
  assert first != second != sorted(first) != first
  assert order(0) == [first, second]
  assert order(1)[0] != first
  assert order(0, stages=2)[2] != first


def test_a_record_drawn_twice_into_a_batch_differs_by_its_draw():
  (batch,) = take(Pipeline([(data(3), None)], batch_size=9, seed=0), 1)
  assert Counter(e.index for e in batch) == {0: 3, 1: 3, 2: 3}
  assert sorted(e.draw for e in batch) == list(range(9))


def test_draws_stay_apart_where_records_were_dropped():
  # Two are left of six: an epoch has two draws, and positions reach 5.
  source = data(6, dropped=(0, 2, 3, 4))
  order = flat(take(Pipeline([(source, None)], batch_size=2, seed=0), 4))
  assert {e.index for e in order} == {1, 5}
  assert sorted(e.draw for e in order) == [1, 5, 7, 11, 13, 17, 19, 23]


def test_stages_switch_exactly():
  stages = [(data(5, 'a'), 3), (data(4, 'b'), 2), (data(5, 'a'), None)]
  pipeline = Pipeline(stages, batch_size=2, seed=0)
  names = [{e.record.id[0] for e in batch} for batch in take(pipeline, 8)]
  assert names == [{'a'}] * 3 + [{'b'}] * 2 + [{'a'}] * 3
  assert pipeline.length is None
  assert [e.record.id[0] for e in pipeline.examples()].count('a') in (5, 10)


def test_the_last_stage_may_end():
  pipeline = Pipeline([(data(5), 2), (data(4), 1)], batch_size=2, seed=0)
  assert pipeline.length == 3
  assert len(list(pipeline)) == 3
  assert next(pipeline, None) is None


@pytest.mark.parametrize('stop', [0, 2, 3, 4, 5, 7, 8])
def test_resumes_exactly_across_stages(stop):
  def fresh(**options):
    return Pipeline(
      [(data(50, 'a'), 3), (data(40, 'b'), 2), (data(9, 'c'), 3)], batch_size=4, seed=3, **options
    )

  whole = list(fresh())
  first = fresh()
  take(first, stop)
  state = json.loads(json.dumps(first.get_state()))
  second = fresh()
  take(second, 2)  # wherever it stood
  second.set_state(state)
  assert list(second) == whole[stop:] == list(first)


@pytest.mark.parametrize(
  'other',
  [
    {'batch_size': 2},
    {'seed': 1},
    {'stages': [(data(6), None)]},
    {'stages': [(data(5, dropped=(3,)), None)]},
    {'stages': [(data(5), 9)]},
  ],
)
def test_a_state_of_something_else_is_refused(other):
  options = {'stages': [(data(5), None)], 'batch_size': 4, 'seed': 0}
  state = Pipeline(**options).get_state()
  Pipeline(**options).set_state(state)
  with pytest.raises(UserError, match='position in the data'):
    Pipeline(**{**options, **other}).set_state(state)


@pytest.mark.parametrize(
  'options, words',
  [
    ({'batch_size': 0}, 'at least 1'),
    ({'seed': -1}, 'seed'),
    ({'stages': []}, 'empty'),
    ({'stages': [(data(2), None), (data(2), 1)]}, 'Stage 0'),
    ({'stages': [(data(2), 0)]}, 'at least 1'),
  ],
)
def test_impossible_numbers(options, words):
  with pytest.raises(UserError, match=words):
    Pipeline(**{'stages': [(data(5), None)], 'batch_size': 4, 'seed': 0, **options})


RECORDS = [
  Record('fits', 'abcd', 'x', 'yy'),
  Record('prompt', 'abcdef', '', 'yy'),
  Record('context', 'abcd', 'xyz', 'yy'),
  Record('completion', 'abcd', '', 'yyy'),
  Record('edge', 'abcde', '', 'yy'),
]


def test_too_long_is_dropped_and_counted():
  kept = tokenise(RECORDS, FakeRenderer(), max_prompt_tokens=5, max_completion_tokens=3)
  assert [e.record.id for e in kept.examples] == ['fits', 'edge']
  assert [e.index for e in kept.examples] == [0, 4]
  assert kept.dropped == Dropped(prompt=1, privileged=1, completion=1)
  assert kept.dropped.total == 3
  assert kept.size == 5
  assert kept.examples[0].privileged_ids == [ord(c) for c in 'abcdx']
  assert kept.examples[0].completion_ids == [ord('y'), ord('y'), 1]


def test_given_completions_may_be_left_aside():
  kept = tokenise(RECORDS, FakeRenderer(), max_prompt_tokens=5)
  assert [e.record.id for e in kept.examples] == ['fits', 'completion', 'edge']
  assert kept.examples[0].completion_ids is None


@pytest.mark.parametrize(
  'index, words',
  [
    (1, 'Record prompt: the prompt has 6 tokens and data.max_prompt_tokens is 5'),
    (2, 'Record context: the privileged prompt has 7 tokens and data.max_prompt_tokens is 5'),
    (3, 'Record completion: the completion has 4 tokens and rollout.max_new_tokens is 3'),
  ],
)
def test_too_long_is_an_error_by_config(index, words):
  records = [RECORDS[0], RECORDS[index]]
  with pytest.raises(UserError) as error:
    tokenise(
      records, FakeRenderer(), max_prompt_tokens=5, max_completion_tokens=3, on_too_long='error'
    )
  assert str(error.value).startswith(words)


def test_nothing_left_is_an_error():
  with pytest.raises(UserError, match=r'All 5 records of mine .*data.max_prompt_tokens'):
    tokenise(RECORDS, FakeRenderer(), max_prompt_tokens=1, name='mine')
  with pytest.raises(UserError, match='on_too_long'):
    tokenise(RECORDS, FakeRenderer(), max_prompt_tokens=9, on_too_long='cut')


def test_completion_masks():
  def mask(value):
    records = [Record('r', 'a', '', 'yy', extra={'completion_mask': value})]
    kept = tokenise(records, FakeRenderer(), max_prompt_tokens=9, max_completion_tokens=9)
    return kept.examples[0].completion_mask

  assert mask(None) is None
  assert mask([1, 0]) == [True, False, True]  # the stop token is trained on
  assert mask([0, 1, 0]) == [False, True, False]
  for bad in ([1], [1, 0, 1, 1], 'yy', [2, 0]):
    with pytest.raises(UserError, match='Record r: completion_mask'):
      mask(bad)


def test_unknown_words_are_told(monkeypatch, caplog):
  monkeypatch.setattr(FakeTokenizer, 'unk_token_id', ord('?'))
  records = [Record('good', 'ab', ''), Record('odd', 'a?', '')]
  logging.getLogger('absl').propagate = True
  with caplog.at_level(logging.WARNING):
    tokenise(records, FakeRenderer(), max_prompt_tokens=9, name='mine')
  assert '1 of 2 records of mine' in caplog.text
  assert 'odd' in caplog.text


def test_made_from_specs(tmp_path):
  path = tmp_path / 'rows.jsonl'
  rows = [{'id': f'r{i}', 'prompt': 'a' * i, 'privileged_context': 'h'} for i in range(1, 7)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  loaders = {'mine': lambda rest: [{'id': rest, 'prompt': 'b', 'privileged_context': ''}]}
  pipeline = make_pipeline(
    [(str(path), 1), ('mine:z', 1), (str(path), None)],
    FakeRenderer(),
    batch_size=4,
    seed=0,
    max_prompt_tokens=5,
    loaders=loaders,
  )
  batches = ids(take(pipeline, 3))
  assert sorted(batches[0]) == sorted(batches[2]) == ['r1', 'r2', 'r3', 'r4']
  assert batches[1] == ['z'] * 4
  assert pipeline.dropped == Dropped(prompt=1, privileged=1)  # counted once, though staged twice


rows_of_ids = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4)


@given(rows=rows_of_ids, room=st.integers(0, 3), side=st.sampled_from(['left', 'right']))
@settings(max_examples=60, deadline=None)
def test_padding_round_trip(rows, room, side):
  length = max(map(len, rows)) + room
  tokens, valid = pad_batch(rows, length, 9, side)
  assert tokens.shape == valid.shape == (len(rows), length)
  assert tokens.dtype == np.int32 and valid.dtype == bool
  assert [t[v].tolist() for t, v in zip(tokens, valid)] == rows
  assert (tokens[~valid] == 9).all()
  edge = valid[:, ::-1] if side == 'left' else valid
  assert (np.diff(edge.astype(int), axis=1) <= 0).all()


def test_padding_never_cuts():
  with pytest.raises(ValueError, match='row 1 has 3 ids'):
    pad_batch([[1], [1, 2, 3]], 2, 0)
  with pytest.raises(ValueError, match='side'):
    pad_batch([[1]], 2, 0, 'middle')
