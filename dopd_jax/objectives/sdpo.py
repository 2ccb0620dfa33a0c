r"""SDPO: a right completion of the same prompt is the hint (arXiv 2601.20802).

    y ~ S,   loss = min(r, 2) JSD_b( S(.|x), F(.|x, sibling) )  on top_100(S) + tail
    r = S(y) / S_old(y), detached;   F = running mean of the student

The sibling is another completion of the prompt with a reward of at least `right_at`; its text is
rendered as the hint. A completion without one carries no loss. b = 0 is the forward, 1 the reverse
KL (the published runs with rich feedback). Needs a verifier and several completions a prompt.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import SAMPLER, Objective, one_regime
from dopd_jax.objectives.settings import SelfGuided, need


@dataclasses.dataclass(frozen=True)
class Sdpo(SelfGuided):
  """Settings of the `sdpo` objective; the defaults are those of lasgroup/SDPO."""

  name: str = 'sdpo'
  teacher: str = 'ema'
  teacher_context: str = 'sibling'
  mixture: float = 0.5  # b, their alpha
  k: int = 100
  ratio_cap: float = 2.0  # 0 is off
  right_at: float = 0.5
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need(0.0 < self.right_at <= 1.0, f'objective.right_at must be in (0, 1], not {self.right_at}')
    guide, view = self.guide(self.teacher)
    cap = self.ratio_cap or None
    rule = rules.Rule(
      guide, 'generalised_js', 'top_k', k=self.k, mixture=self.mixture, ratio_cap=cap
    )
    return Objective(
      **self.shared(),
      views={guide: view},
      regimes=('all',),
      rules=((rule,),),
      router=one_regime,
      old_logp=SAMPLER,
      right_at=self.right_at,
    )
