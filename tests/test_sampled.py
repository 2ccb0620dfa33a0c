"""Answers at temperature 1: how many are right, and of how many problems one is."""

import pytest

from dopd_jax import config as configs
from dopd_jax.errors import UserError
from experiments import grid, sampled
from experiments.grid import Arm, Experiment


def test_a_problem_passes_where_one_answer_is_right():
  found = {'dopd': {'0': '4010', '1': '0000'}}  # right answers to four problems, of four each
  mean = lambda name: [
    each.mean() for each in sampled.problems(found, 'dopd', sampled.SCORES[name]).values()
  ]
  assert mean('avg@4') == [pytest.approx(5 / 16), 0] and mean('pass@4') == [pytest.approx(2 / 4), 0]


def test_answers_are_drawn_anew():
  """The student of the quickstart, right in 57 % greedily, in less when it samples."""
  config = grid.module(grid.ROOT / 'configs/quickstart.py').get_config()
  config.data.eval = config.data.eval.replace('size=1000', 'size=200')
  config = configs.validate(config)
  hits = sampled.draws(config.student.path, config)
  found = {'start': {'0': hits}}
  avg, passed = (
    sampled.problems(found, 'start', score)['0'].mean() for score in sampled.SCORES.values()
  )
  assert len(hits) == 200 and set(hits) == set('01234')  # some in part: the four answers differ
  assert 0.3 < avg < 0.57 < passed
  assert sampled.draws(config.student.path, config) == hits


def test_the_page_pairs_each_arm_with_its_reference():
  arms = {name: Arm() for name in ('opd', 'dopd', 'other')}
  experiment = Experiment('?', 'configs/study.py', arms, references={'other': 'dopd'})
  found = {
    'start': {'0': '01', '1': '10'},
    'opd': {'0': '44', '1': '44'},
    'dopd': {'0': '20', '1': '02'},
    'other': {'0': '11', '1': '11'},
  }
  page = sampled.page(experiment, found)
  assert '| start | 12.5 ± 0.0 | – | 50.0 ± 0.0 | – |' in page
  assert '| opd | 100.0 ± 0.0 | – | 100.0 ± 0.0 | – |' in page
  row = next(line for line in page.splitlines() if line.startswith('| dopd'))
  assert '| 25.0 ± 0.0 | -75.0 ± 0.0,' in row and '| 50.0 ± 0.0 | -50.0 ± 0.0,' in row
  row = next(line for line in page.splitlines() if line.startswith('| other'))
  assert '+0.0 ± 0.0,' in row and '+50.0 ± 0.0,' in row and row.count('(dopd)') == 2


def test_runs_that_are_not_there_are_told_before_anything_is_asked(tmp_path):
  experiment = Experiment('?', 'configs/quickstart.py', {'opd': Arm('method=opd')})
  with pytest.raises(UserError, match='is not there'):
    sampled.measure(experiment, tmp_path, tmp_path)
