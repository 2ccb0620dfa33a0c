"""What tells one set of records from another between two starts of a run."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from dopd_jax import config as configs
from dopd_jax import dataset
from dopd_jax.data import Example, parse_record
from dopd_jax.errors import UserError
from tests import pairs

ROW = {'id': 'a', 'prompt': 'What?', 'privileged_context': 'x', 'answer': '1', 'more': {'b': [1]}}


def example(digest='', ids=(1, 2), **changes):
  record = parse_record({**ROW, **changes}, 'here', default_id='a')
  return Example(0, record, list(ids), list(ids), digest=digest)


def digests(train, held_out=()):
  config = configs.validate(pairs.config())
  return dataset.digests(config, SimpleNamespace(examples=lambda: iter(train)), {'': held_out})


@pytest.mark.parametrize(
  'changes',
  [
    *({key: 'other'} for key in ('id', 'prompt', 'privileged_context', 'answer', 'verifier')),
    {'completion': 'y'},
    {'teacher': 'math'},
    {'more': {'b': [2]}},
    {'digest': 'of other pixels'},
    {'ids': (1, 3)},
  ],
)
def test_whatever_a_record_says_counts(changes):
  before = digests([example()], [example()])
  dataset.check_same(before, digests([example()], [example()]))
  with pytest.raises(UserError, match=r'records of data\.train are not'):
    dataset.check_same(before, digests([example(**changes)], [example()]))
  with pytest.raises(UserError, match=r'records of data\.eval are not'):
    dataset.check_same(before, digests([example()], [example(**changes)]))
  with pytest.raises(UserError):  # and how many there are
    dataset.check_same(before, digests([example(), example(**changes)], [example()]))


def test_what_json_has_no_word_for_is_the_same_in_every_process():
  given = {'a': np.arange(3), 'b': {'x', 'y'}, 'c': b'1', 'd': object(), 'e': np.float32(1)}
  found = [digests([example(more=dict(given, d=object()))]) for _ in range(2)]
  assert found[0] == found[1]
  assert found[0] != digests([example(more={**given, 'a': np.arange(4)})])


def test_checkpoints_from_before_there_were_digests_are_taken():
  dataset.check_same({}, digests([example()]))


def test_where_an_image_lies_does_not_count():
  moved = dataclasses.replace(example(digest='d'), images=('elsewhere.png',))
  assert digests([moved]) == digests([example(digest='d')])
