"""The primary contrasts with two other teachers, on ten students.

  python -m experiments.run teachers --jobs=2

The teachers have another start and another order of the same problems. `teacher_5` is the only seed
of 1 to 22 that got as right as the first; `teacher_1` is the first after it, whatever it became,
and near the median. Rates are those that the tuning with the first teacher chose.
"""

import dataclasses

from experiments import grid, study
from experiments.grid import Arm

OTHERS = ('teacher_5', 'teacher_1')
METHODS = {
  'opd': (study.OPD, 5e-4),
  'opd_privileged': (study.OPD_PRIVILEGED, 5e-4),
  'dopd': (study.DOPD, 2e-4),
}

TUNED = study.study(
  'Do the primary contrasts come out alike with two other teachers?',
  {
    f'{name}_{teacher}': Arm(f'{arm.arg},teacher={teacher}', {**arm.changes, grid.RATE: rate})
    for teacher in OTHERS
    for name, (arm, rate) in METHODS.items()
  },
  references={f'{name}_{teacher}': f'opd_{teacher}' for teacher in OTHERS for name in METHODS},
  seeds=range(10),
  contrasts=[
    (f'{arm}_{teacher}', f'{reference}_{teacher}')
    for teacher in OTHERS
    for arm, reference in (('dopd', 'opd'), ('dopd', 'opd_privileged'), ('opd_privileged', 'opd'))
  ],
  models={
    'student': study.MODELS['student'],
    'teacher_5': 'configs/study_sft.py:model=teacher,seed=5,until=0.92',
    'teacher_1': 'configs/study_sft.py:model=teacher,seed=1',
  },
)
EXPERIMENT = dataclasses.replace(TUNED, learning_rates=(), tuning_seeds=())
