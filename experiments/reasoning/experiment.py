"""A second family of problems: chains of sums, of reasoning_gym.

  python -m experiments.run reasoning --jobs=2
  python -m experiments.signal --of=reasoning

The hint is the worked solution without its results, which follows from the problem: here it tells
nothing that the prompt does not. Plans are copied, values are worked out.
"""

from experiments import study
from experiments.grid import Arm

TASK = 'task=chain_sum'
MODEL = f'configs/study_sft.py:{TASK},model'

EXPERIMENT = study.study(
  'Do the contrasts, and what a large gap means, come out alike on a family of reasoning_gym?',
  {
    f'{name}_chains': Arm(f'{arm.arg},{TASK},teacher=teacher_chains,student=chains', arm.changes)
    for name, arm in {
      'opd': study.OPD,
      'opd_privileged': study.OPD_PRIVILEGED,
      'dopd': study.DOPD,
      'hs_to_teacher': Arm('method=dopd', study.HS_TO_TEACHER),
    }.items()
  },
  models={'teacher_chains': f'{MODEL}=teacher', 'chains': f'{MODEL}=student,seed={{seed}}'},
)
