"""How right models are with a hint in the prompt."""

import pytest

from dopd_jax import config as configs
from experiments import grid, hinted
from experiments.grid import Arm, Experiment


def test_each_kind_of_hint_is_asked_once_and_every_model():
  arms = {
    'opd': Arm('method=opd'),  # shows none
    'steps': Arm('method=dopd,hint=steps'),
    'again': Arm('method=hint_routing,hint=steps'),
    'answer': Arm('method=dopd,hint=answer,teacher=other'),
    'none': Arm('method=dopd,hint=full', {'data.privileged': 'none'}),
  }
  experiment = Experiment('?', 'configs/study.py', arms, seeds=(3, 4), models_in='there')
  found = hinted.asked(experiment)
  assert {kind: plain for kind, (_, plain) in found.items()} == {
    'none': True,
    'steps': False,
    'answer': False,
  }
  assert 'hint=answer' in found['answer'][0].data.eval
  paths = ['there/teacher', 'there/other', 'there/student_3', 'there/student_4']
  assert hinted.models(experiment) == paths


@pytest.mark.parametrize(
  'path, arg, start, misled', [('quickstart.py', '', 0.568, 0.1), ('vlm.py', 'smoke', 0.586, 0.45)]
)
def test_a_hint_stands_in_the_prompt(path, arg, start, misled):
  """The students of the package: without one, as a run begins; another problem's misleads them."""
  config = grid.module(grid.ROOT / 'configs' / path).get_config(arg)
  config.data.eval += '&hint=shuffled'
  config = configs.validate(config)
  right = lambda plain: hinted.accuracy(config.student.path, config, plain)
  assert right(plain=True) == pytest.approx(start, abs=0.005)  # as the README has it
  assert right(plain=False) < misled


def test_the_page_has_a_column_a_model():
  page = hinted.page({'none': {'a': 0.5, 'b': 0.25}, 'box': {'a': 1.0, 'b': 0.125}})
  assert '| none | 50.0 | 25.0 |' in page and '| box | 100.0 | 12.5 |' in page
