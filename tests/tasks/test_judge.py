"""Answers that are programs: what the process that scores them may do."""

import os
import socket

import pytest

from dopd_jax.tasks import judge, make_records

QUEENS = 'n_queens'  # its scorer evaluates an answer that is not a board


@pytest.fixture(scope='module')
def entry():
  import reasoning_gym

  item = reasoning_gym.create_dataset(QUEENS, size=1, seed=0)[0]
  return {key: item[key] for key in ('question', 'answer', 'metadata')}


@pytest.fixture(scope='module')
def scores():
  made = judge.Judge(seconds=3.0)
  yield made
  made.close()


def test_answers_are_evaluated_at_all_and_a_right_one_is_right(scores, entry):
  board = [row.split() for row in entry['answer'].splitlines()]
  assert scores.score(QUEENS, entry['answer'], entry) == 1.0
  assert scores.score(QUEENS, str(board), entry) == 0.5  # that is the family's eval
  assert scores.score(QUEENS, 'no board', entry) == 0.0


def does(scores, entry, body):
  """Whether a program that is given as an answer comes to its end."""
  board = [row.split() for row in entry['answer'].splitlines()]
  answer = f'(exec({body!r}), {board})[1]'
  return scores.score(QUEENS, answer, entry) == 0.5


def test_what_a_program_cannot_do(scores, entry, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_secret')
  listener = socket.create_server(('127.0.0.1', 0))
  port = listener.getsockname()[1]
  assert does(scores, entry, 'x = sum(range(1000))')
  for body in (
    f'import socket; socket.create_connection(("127.0.0.1", {port}))',
    'import socket; socket.socket(socket.AF_UNIX)',
    'import subprocess; subprocess.run(["true"])',
    'import os; os.fork()',
    f'import os; os.kill({os.getpid()}, 0)',
    f'open({str(tmp_path / "x")!r}, "w").write("x" * 100000)',
    'x = bytearray(8 << 30)',
    'while True: pass',
    'import os; os.environ["HF_TOKEN"]',
    'import os; os._exit(0)',
    'import sys; sys.exit()',
  ):
    assert not does(scores, entry, body), body
  assert not list(tmp_path.rglob('*')) or (tmp_path / 'x').stat().st_size == 0
  # Nothing of it is left for the next answer.
  assert not does(scores, entry, 'import builtins; builtins.float = lambda x: 1.0; 1 / 0')
  assert scores.score(QUEENS, 'no board', entry) == 0.0
  assert does(scores, entry, 'pass')


def test_a_process_that_died_is_told_and_replaced(entry):
  own = judge.Judge()
  assert own.score(QUEENS, entry['answer'], entry) == 1.0
  own._process.kill()
  own._process.wait()
  assert own.score(QUEENS, entry['answer'], entry) == 1.0
  own.close()


@pytest.mark.parametrize('family, entry', [('no_such', {}), (QUEENS, {'metadata': {}})])
def test_what_cannot_be_scored_is_refused(scores, family, entry):
  with pytest.raises(judge.Refused):
    scores.score(family, '1', entry)


def test_records_are_judged_by_the_process():
  from dopd_jax.tasks import reasoning, verify

  record = make_records('chain_sum', 1, 0)[0]
  reasoning._score.cache_clear()
  # The record's own answer, written otherwise: that one needs no judge.
  assert verify(record, f'#### {record["answer"]}.0') == 1.0
  assert reasoning._JUDGE._process.poll() is None
