"""The paper's Table 3: five pairs of a teacher and a student.

  python -m experiments.run sizes --jobs=2

Every student is trained to the same accuracy: other than in the paper, whose small student starts
lower. Widths and layers are in configs/study_sft.py.
"""

from experiments import study
from experiments.grid import Arm

# Name of the pair -> the argument's words.
PAIRS = {
  'large_small': 'student=student_small',
  'large_large': 'student=student_large',
  'small_base': 'teacher=teacher_small',
  'small_small': 'teacher=teacher_small,student=student_small',
}

EXPERIMENT = study.study(
  'Does the advantage of DOPD over OPD grow with the distance between teacher and student?',
  {
    'opd': study.OPD,  # the large teacher, the student of the other tables
    'dopd': study.DOPD,
    **{
      f'{method}_{pair}': Arm(f'method={method},{words}')
      for pair, words in PAIRS.items()
      for method in ('opd', 'dopd')
    },
  },
  references={f'{method}_{pair}': f'opd_{pair}' for pair in PAIRS for method in ('opd', 'dopd')},
  models=study.MODELS
  | {
    'teacher_small': 'configs/study_sft.py:model=teacher_small',
    'student_small': 'configs/study_sft.py:model=student_small,seed={seed}',
    'student_large': 'configs/study_sft.py:model=student_large,seed={seed}',
  },
)
