r"""Vanilla on-policy distillation: one divergence to the teacher on every sampled token.

    y ~ S,   loss = D(S, T)      D: reverse KL, forward KL or JS; full, top-K or sampled token

`teacher_context='privileged'` shows the hint to the teacher, `student_context='privileged'` to the
student that is rolled out and trained (its plain policy is what evaluation sees): together the
three cases of the paper's Fig. 3, and with the divergences and regions its Table 7.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, View, one_regime
from dopd_jax.objectives.settings import Guided, need_one_of


@dataclasses.dataclass(frozen=True)
class Opd(Guided):
  """Settings of the `opd` objective; reverse KL on the same top K as DOPD by default."""

  name: str = 'opd'
  divergence: str = 'reverse_kl'
  region: str = 'top_k'
  k: int = 128
  tail: str = 'bucket'
  support: str = 'student'
  clip: float = 0.0  # bound on T/S of the sampled-token forward KL; 0 is off
  student_context: str = 'plain'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('divergence', self.divergence, ('reverse_kl', 'forward_kl', 'js'))
    need_one_of('region', self.region, rules.REGIONS)
    teacher, view = self.guide()
    rule = rules.Rule(
      source=teacher,
      divergence=self.divergence,
      region=self.region,
      k=self.k,
      tail=self.tail,
      support=self.support,
      clip=self.clip or None,
    )
    return Objective(
      **self.shared() | {'student': View('student', self.student_context)},
      views={teacher: view},
      regimes=('all',),
      rules=((rule,),),
      router=one_regime,
    )
