r"""Supervised fine-tuning: cross-entropy on the completions of the data.

    y from the data,   loss = -log S(y)

The completions are fixed, so nothing is sampled and nobody is asked. `privileged_share` of the rows
show the hint in the prompt: this is how a teacher is made that can use one and does not need it.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, View, one_regime
from dopd_jax.objectives.settings import Settings


@dataclasses.dataclass(frozen=True)
class Sft(Settings):
  """Settings of the `sft` objective."""

  name: str = 'sft'
  privileged_share: float = 0.0
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    return Objective(
      **self.shared(),
      student=View('student'),
      views={},
      regimes=('all',),
      rules=((rules.Rule('', rules.CROSS_ENTROPY),),),
      router=one_regime,
      source='data',
      privileged_share=self.privileged_share,
    )
