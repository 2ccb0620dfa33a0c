"""Answers at temperature 1: how many are right, and of how many problems one is."""

import numpy as np
import pytest

from dopd_jax import config as configs
from experiments import grid, sampled
from experiments.grid import Arm, Experiment


def test_a_problem_passes_where_one_answer_is_right():
  right = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])  # two answers to three problems
  assert sampled.scores(right) == {'avg@2': pytest.approx(1 / 2), 'pass@2': pytest.approx(2 / 3)}


def test_answers_are_drawn_anew():
  """The student of the quickstart, right in 57 % greedily, in less when it samples."""
  config = grid.module(grid.ROOT / 'configs/quickstart.py').get_config()
  config.data.eval = config.data.eval.replace('size=1000', 'size=200')
  config = configs.validate(config)
  right = sampled.draws(config.student.path, config, count=2)
  assert right.shape == (2, 200)
  assert (right[0] != right[1]).any()
  found = sampled.scores(right)
  assert 0.3 < found['avg@2'] < found['pass@2'] < 0.8


def test_the_page_pairs_each_arm_with_its_reference():
  arms = {name: Arm() for name in ('opd', 'dopd', 'other')}
  experiment = Experiment('?', 'configs/study.py', arms, references={'other': 'dopd'})
  each = lambda *values: {str(i): {'avg@4': v, 'pass@4': 1.0} for i, v in enumerate(values)}
  found = {
    'start': each(0.1, 0.2),
    'opd': each(0.3, 0.5),
    'dopd': each(0.2, 0.4),
    'other': each(0.5, 0.7),
  }
  page = sampled.page(experiment, found)
  assert '| dopd | 30.0 ± 127.1 | -10.0 ± 0.0 (opd) |' in page
  assert '| other | 60.0 ± 127.1 | +30.0 ± 0.0 (dopd) |' in page
  assert '| opd | 40.0 ± 127.1 | – |' in page and '| start | 15.0 ± 63.5 | – |' in page
