"""The grammar (`grammar.py`) and one file a method; each file is one equation."""

from dopd_jax.objectives.dopd import Dopd as Dopd
from dopd_jax.objectives.grammar import Objective as Objective
from dopd_jax.objectives.grammar import Plan as Plan
from dopd_jax.objectives.grammar import Signals as Signals
from dopd_jax.objectives.grammar import View as View
from dopd_jax.objectives.grammar import make_plan as make_plan
from dopd_jax.objectives.opd import Opd as Opd
from dopd_jax.objectives.sft import Sft as Sft

METHODS = {'dopd': Dopd, 'opd': Opd, 'sft': Sft}  # the word that a config uses -> its settings
