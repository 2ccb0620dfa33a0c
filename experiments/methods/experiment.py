"""Every method at the same effort on the tiny pair of the quickstart.

  python -m experiments.run methods --jobs=2

The pair is the same in all runs; a seed decides prompts and sampling. The learning rate is chosen
on problems of the training split, which a run may also meet in training; the test split, where no
problem is one of training, is looked at only in the final runs.
"""

from experiments.grid import Arm, Experiment

METHODS = (
  *('opd', 'thinking_machines', 'gkd', 'opcd', 'exopd', 'uni_opd', 'sdft', 'opsd', 'sdpo', 'eopd'),
  *('tip', 'dopd'),
)

EXPERIMENT = Experiment(
  question=(
    'Which method raises the accuracy without the hint most, on the tiny pair of the quickstart, '
    'when each has its best learning rate of one grid?'
  ),
  base='configs/quickstart.py',
  arms={
    **{method: Arm(f'method={method}') for method in METHODS},
    'opd_privileged': Arm('method=opd', {'objective.teacher_context': 'privileged'}),
  },
  seeds=(0, 1, 2),
  learning_rates=(2e-4, 5e-4, 1e-3),
  tuning_seeds=(100, 101),
  tuning_changes={
    'data.eval': 'task:plan_execute?steps=2&definitions=4&modulus=7&size=500&seed=77&split=train',
    'evaluation.every': 0,
    'evaluation.teacher': False,
  },
)
