"""The grammar (`grammar.py`) and one file a method; each file is one equation."""

from dopd_jax.objectives.dense import objective_loss as objective_loss
from dopd_jax.objectives.dopd import Dopd as Dopd
from dopd_jax.objectives.dopd_distributional import DopdDistributional as DopdDistributional
from dopd_jax.objectives.dopd_random import DopdRandom as DopdRandom
from dopd_jax.objectives.dopd_signed import DopdSigned as DopdSigned
from dopd_jax.objectives.drop_by_gap import DropByGap as DropByGap
from dopd_jax.objectives.eopd import Eopd as Eopd
from dopd_jax.objectives.exopd import Exopd as Exopd
from dopd_jax.objectives.gkd import Gkd as Gkd
from dopd_jax.objectives.grammar import Compare as Compare
from dopd_jax.objectives.grammar import Objective as Objective
from dopd_jax.objectives.grammar import Plan as Plan
from dopd_jax.objectives.grammar import Seen as Seen
from dopd_jax.objectives.grammar import Signals as Signals
from dopd_jax.objectives.grammar import View as View
from dopd_jax.objectives.grammar import make_plan as make_plan
from dopd_jax.objectives.grammar import one_regime as one_regime
from dopd_jax.objectives.hint_routing import HintRouting as HintRouting
from dopd_jax.objectives.opcd import Opcd as Opcd
from dopd_jax.objectives.opd import Opd as Opd
from dopd_jax.objectives.opsd import Opsd as Opsd
from dopd_jax.objectives.sdft import Sdft as Sdft
from dopd_jax.objectives.sdpo import Sdpo as Sdpo
from dopd_jax.objectives.sft import Sft as Sft
from dopd_jax.objectives.thinking_machines import ThinkingMachines as ThinkingMachines
from dopd_jax.objectives.tip import Tip as Tip
from dopd_jax.objectives.uni_opd import UniOpd as UniOpd
from dopd_jax.objectives.va_opd import VaOpd as VaOpd
from dopd_jax.objectives.vision_opd import VisionOpd as VisionOpd

# The word that a config uses -> its settings, in the order of the paper's tables.
METHODS = {
  settings().name: settings
  for settings in (
    Opd,
    ThinkingMachines,
    Gkd,
    Opcd,
    Exopd,
    UniOpd,
    Sdft,
    Opsd,
    Sdpo,
    Eopd,
    Tip,
    VisionOpd,
    VaOpd,
    Dopd,
    DopdSigned,
    DopdDistributional,
    DopdRandom,
    HintRouting,
    DropByGap,
    Sft,
  )
}
