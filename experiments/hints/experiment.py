"""The paper's Tables 4 and 5: what kind of privileged input helps.

  python -m experiments.run hints --jobs=2

Teacher and students of this table have learnt to read every kind of hint that says something right;
those of the other tables know the steps alone. With two steps the first alone says as much as both,
since the second is the query.
"""

from experiments import study
from experiments.grid import Arm

WHO = 'teacher=teacher_reader,student=reader'
HINTS = ('steps', 'answer', 'answer_steps', 'full', 'shuffled', 'none')

EXPERIMENT = study.study(
  'Which privileged input serves DOPD best: steps without results, the answer, both, the whole '
  "solution, another problem's steps, or none?",
  {
    'reader_opd': Arm(f'method=opd,{WHO}'),
    **{
      f'reader_{hint}': Arm(
        f'method=dopd,{WHO},hint={hint}', {'data.privileged': 'none'} if hint == 'none' else {}
      )
      for hint in HINTS
    },
  },
  models={
    'teacher_reader': 'configs/study_sft.py:model=teacher,hint=mixed',
    'reader': 'configs/study_sft.py:model=student,hint=mixed,seed={seed}',
  },
)
