r"""Vision-OPD: the student sees the evidence up close and teaches itself (arXiv 2605.18740).

    y ~ S(.|image),   loss = min(r, 2) JSD_b( S(.|image), F(.|crop) )  on top_100(S) + tail
    r = S(y) / S_old(y), detached;   F = running mean of the student

The published weight is the product of two capped ratios, trainer to trainer before the update and
that to the sampler; the ratio to the sampler's log-prob is both at once. The evidence is what the
boxes of a record hold. With `evidence='boxed'` the copy sees the whole image with the boxes drawn
into it (Fb) in place of the crop.
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import SAMPLER, Objective, View, one_regime
from dopd_jax.objectives.settings import SelfGuided


@dataclasses.dataclass(frozen=True)
class VisionOpd(SelfGuided):
  """Settings of the `vision_opd` objective; the defaults are those of VisionOPD/Vision-OPD.

  evidence: how the copy is shown it: 'crop' (theirs) or 'boxed'.
  """

  name: str = 'vision_opd'
  teacher: str = 'ema'
  teacher_context: str = 'plain'
  evidence: str = 'crop'
  mixture: float = 0.5  # b, their alpha
  k: int = 100
  ratio_cap: float = 2.0  # 0 is off
  reduction: str = 'token'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    cap = self.ratio_cap or None
    view = 'Fc' if self.evidence == 'crop' else 'Fb'
    rule = rules.Rule(
      view, 'generalised_js', 'top_k', k=self.k, mixture=self.mixture, ratio_cap=cap
    )
    return Objective(
      **self.shared(),
      views={view: View(self.teacher, self.teacher_context, self.evidence)},
      regimes=('all',),
      rules=((rule,),),
      router=one_regime,
      old_logp=SAMPLER,
    )
