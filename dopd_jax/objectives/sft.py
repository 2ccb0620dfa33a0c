r"""Supervised fine-tuning: cross-entropy on the completions of the data.

    y from the data,   loss = -log S(y)

The completions are fixed, so nothing is sampled and nobody is asked. `privileged_share` of the rows
show the hint in the prompt: this is how a teacher is made that can use one and does not need it.
"""

import dataclasses

from dopd_jax.losses import reduction as reductions
from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, View, need, need_one_of, one_regime


@dataclasses.dataclass(frozen=True)
class Sft:
  """Settings of the `sft` objective."""

  name: str = 'sft'
  privileged_share: float = 0.0
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    need_one_of('reduction', self.reduction, reductions.REDUCTIONS)
    share = self.privileged_share
    need(0.0 <= share <= 1.0, f'objective.privileged_share must be in [0, 1], not {share}')
    return Objective(
      name=self.name,
      student=View('student', 'plain'),
      views={},
      regimes=('all',),
      rules=((rules.Rule('', rules.CROSS_ENTROPY),),),
      router=one_regime,
      reduction=self.reduction,
      source='data',
      privileged_share=share,
    )
