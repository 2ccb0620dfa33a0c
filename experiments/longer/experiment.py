"""The arms of the primary contrasts on text, four times as long.

  python -m experiments.run longer --jobs=2

Each at the learning rate that it was given in `text`, with the models of `exploratory`; nothing is
tuned anew. Prompts come four times. Three students: differences of less than about six points are
not to be told apart.
"""

import dataclasses

from experiments import study
from experiments.grid import Experiment

# Arm of `text` -> that, and the rate that its tuning chose.
RATES = {
  'opd': (study.OPD, 5e-4),
  'opd_privileged': (study.OPD_PRIVILEGED, 5e-4),
  'dopd': (study.DOPD, 2e-4),
  'hint_routing': (study.HINT_ROUTING, 1e-3),
}

EXPERIMENT = Experiment(
  question='How far do the arms of the primary contrasts on text get in four times as many steps?',
  base=study.BASE,
  arms={
    name: dataclasses.replace(arm, changes={**arm.changes, 'optimizer.learning_rate': rate})
    for name, (arm, rate) in RATES.items()
  },
  models=study.MODELS,
  models_in=study.KEPT,
  changes={'steps': 600, 'evaluation.every': 100},
  also=('eval/accuracy/longer',),
)
