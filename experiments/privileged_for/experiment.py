"""The paper's Fig. 3: OPD with the hint for the teacher, the student, or both.

  python -m experiments.run privileged_for --jobs=2

A student with the hint also answers with it; what counts is its accuracy without.
"""

from experiments import study
from experiments.grid import Arm

STUDENT = {'objective.student_context': 'privileged'}

EXPERIMENT = study.study(
  'What does the hint do to OPD when the teacher alone sees it, the student alone, or both?',
  {
    'opd': study.OPD,
    'opd_privileged': study.OPD_PRIVILEGED,
    'opd_student_hinted': Arm('method=opd', STUDENT),
    'opd_both_hinted': Arm('method=opd', study.PRIVILEGED | STUDENT),
  },
  pool=study.TEXT,
)
