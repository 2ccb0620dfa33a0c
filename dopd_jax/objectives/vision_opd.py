r"""Vision-OPD: the student sees the evidence up close and teaches itself (arXiv 2605.18740).

    y ~ S(.|image),   loss = min(r, 2) JSD_b( S(.|image), F(.|crop) )  on top_100(S) + tail
    r = S(y) / S_old(y), detached;   F = running mean of the student

The published weight is the product of two capped ratios, trainer to trainer before the update and
that to the sampler; the ratio to the sampler's log-prob is both at once. Needs a crop to the
evidence.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import SAMPLER, Objective, View, one_regime
from dopd_jax.objectives.settings import SelfGuided


@dataclasses.dataclass(frozen=True)
class VisionOpd(SelfGuided):
  """Settings of the `vision_opd` objective; the defaults are those of VisionOPD/Vision-OPD."""

  name: str = 'vision_opd'
  teacher: str = 'ema'
  teacher_context: str = 'plain'
  mixture: float = 0.5  # b, their alpha
  k: int = 100
  ratio_cap: float = 2.0  # 0 is off
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    cap = self.ratio_cap or None
    rule = rules.Rule(
      'Fc', 'generalised_js', 'top_k', k=self.k, mixture=self.mixture, ratio_cap=cap
    )
    return Objective(
      **self.shared(),
      views={'Fc': View(self.teacher, self.teacher_context, 'crop')},
      regimes=('all',),
      rules=((rule,),),
      router=one_regime,
      old_logp=SAMPLER,
    )
