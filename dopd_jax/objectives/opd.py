r"""Vanilla on-policy distillation: one divergence to the teacher on every sampled token.

    y ~ S,   loss = D(S, T)      D: reverse KL, forward KL or JS; full, top-K or sampled token

`teacher_context='privileged'` shows the hint to the teacher, `student_context='privileged'` to the
student that is rolled out and trained (its plain policy is what evaluation sees): together the
three cases of the paper's Fig. 3, and with the divergences and regions its Table 7.
"""

import dataclasses

from dopd_jax.losses import reduction as reductions
from dopd_jax.losses import rules, support
from dopd_jax.objectives.grammar import (
  CONTEXTS,
  Objective,
  View,
  need,
  need_one_of,
  one_regime,
)


@dataclasses.dataclass(frozen=True)
class Opd:
  """Settings of the `opd` objective; reverse KL on the same top K as DOPD by default."""

  name: str = 'opd'
  divergence: str = 'reverse_kl'
  region: str = 'top_k'
  k: int = 128
  tail: str = 'bucket'
  support: str = 'student'
  clip: float = 0.0  # bound on T/S of the sampled-token forward KL; 0 is off
  teacher_context: str = 'plain'
  student_context: str = 'plain'
  temperature: float = 1.0
  reduction: str = 'sequence'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    need_one_of('divergence', self.divergence, tuple(rules.DIVERGENCES))
    need_one_of('region', self.region, rules.REGIONS)
    need_one_of('tail', self.tail, support.TAILS)
    need_one_of('support', self.support, (*support.SUPPORTS, 'teacher'))
    need_one_of('teacher_context', self.teacher_context, CONTEXTS)
    need_one_of('student_context', self.student_context, CONTEXTS)
    need_one_of('reduction', self.reduction, reductions.REDUCTIONS)
    need(self.k >= 1, f'objective.k must be at least 1, not {self.k}')
    need(self.temperature > 0, f'objective.temperature must be positive, not {self.temperature}')
    teacher = 'Tp' if self.teacher_context == 'privileged' else 'T'
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
      name=self.name,
      student=View('student', self.student_context),
      views={teacher: View('teacher', self.teacher_context)},
      regimes=('all',),
      rules=((rule,),),
      router=one_regime,
      temperature=self.temperature,
      reduction=self.reduction,
    )
