r"""GKD: generalised JS on the student's own completions and on those of the data (2306.13649).

    L = lambda E_{y~S} JSD_b(T, S) + (1 - lambda) E_{y~data} JSD_b(T, S)
    JSD_b = b KL(T || m) + (1 - b) KL(S || m),   m = b T + (1 - b) S

A coin with `on_policy_share` = lambda decides who writes the completions of a whole rollout batch,
as in TRL; it is a function of the run's seed and the step. b = 0 is exactly the forward KL, b = 1
exactly the reverse KL.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, one_regime
from dopd_jax.objectives.settings import Guided


@dataclasses.dataclass(frozen=True)
class Gkd(Guided):
  """Settings of the `gkd` objective; the defaults are TRL's."""

  name: str = 'gkd'
  on_policy_share: float = 0.5  # lambda, TRL's `lmbda`
  mixture: float = 0.5  # b, TRL's `beta`
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    teacher, view = self.guide()
    return Objective(
      **self.shared(),
      views={teacher: view},
      regimes=('all',),
      rules=((rules.Rule(teacher, 'generalised_js', mixture=self.mixture),),),
      router=one_regime,
      source='student' if self.on_policy_share == 1.0 else 'mixed',
      on_policy_share=self.on_policy_share,
    )
