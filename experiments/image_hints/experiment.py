"""The paper's Table 5: kinds of privileged input on images, digits and boxes.

  python -m experiments.run image_hints --jobs=2

Teacher and student have learnt to read every kind of hint that says something right; the pair is
the same in all runs, a seed decides pictures and sampling. A label is the name of the digit's
owner, which the question says as well. One learning rate for all, that of the config.
"""

from experiments import study
from experiments.grid import Arm, Experiment

KINDS = ('none', 'box', 'label', 'box+label', 'answer', 'shuffled')


def dopd(kind, **changes):
  """DOPD with a hint for both policies; none takes it from both."""
  hidden = {'data.privileged': 'none'} if kind == 'none' else {}
  return Arm(f'smoke,method=dopd,hint={kind}', hidden | changes)


EXPERIMENT = Experiment(
  question='Which privileged input serves DOPD best on images?',
  base='configs/vlm.py',
  arms={
    'opd': Arm('smoke,method=opd'),
    **{kind.replace('+', '_'): dopd(kind) for kind in KINDS},
    # Beside DOPD with boxes and labels.
    'opd_privileged': Arm('smoke,method=opd,hint=box+label', study.PRIVILEGED),
    'hint_routing': Arm('smoke,method=hint_routing,hint=box+label'),
    # Added when those above were known: is it the copy that HS follows?
    **{
      f'{kind.replace("+", "_")}_hs_to_teacher': dopd(kind, **study.HS_TO_TEACHER) for kind in KINDS
    },
  },
  seeds=(0, 1, 2),
  models={
    'digits_teacher': 'configs/vlm_sft.py:model=teacher,hint=mixed',
    'digits_student': 'configs/vlm_sft.py:model=student,hint=mixed',
  },
  models_in=study.KEPT,
)
