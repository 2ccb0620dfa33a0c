r"""ExOPD: on-policy distillation that goes on beyond the teacher (arXiv 2602.12125, G-OPD).

    A = (log T(y) - log S_old(y)) + (lambda - 1) (log T(y) - log R(y))
    loss = -min(r A, clip(r) A),   r = S(y) / S_old(y)

R is where the teacher is extrapolated from: the student as given, or, from strong to weak, the
teacher before its own training (`reference.path`). lambda = 1 is on-policy distillation. The
`full` form has the same optimum over the whole vocabulary: KL(S || softmax(lambda log T +
(1 - lambda) log R)).
"""

import dataclasses

from dopd_jax.losses import rules
from dopd_jax.objectives.grammar import Objective, Routed, View, all_tokens, old_logp, one_regime
from dopd_jax.objectives.settings import Surrogate, need_one_of


@dataclasses.dataclass(frozen=True)
class Exopd(Surrogate):
  """Settings of the `exopd` objective; the defaults are those of RUCBM/G-OPD."""

  name: str = 'exopd'
  extrapolation: float = 1.25  # lambda; 1.5 was unstable for its authors
  reference: str = 'frozen'  # R: the 'frozen' student, or the 'reference' model
  form: str = 'sampled'  # or 'full'
  clip_low: float = 0.2  # verl's default
  clip_high: float = 0.2

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('reference', self.reference, ('frozen', 'reference'))
    need_one_of('form', self.form, ('sampled', 'full'))
    teacher, view = self.guide()
    views = {teacher: view, 'R': View(self.reference)}
    shared = self.shared()

    def router(seen):
      log_T, log_R = seen.signals[teacher].logp_y, seen.signals['R'].logp_y
      beyond = (self.extrapolation - 1.0) * (log_T - log_R)
      advantage = log_T - old_logp(shared['old_logp'], seen) + beyond
      return Routed(all_tokens(seen.mask), advantage=advantage)

    if self.form == 'full':
      return Objective(
        **shared | {'old_logp': ''},
        views=views,
        blends={'X': {teacher: self.extrapolation, 'R': 1.0 - self.extrapolation}},
        regimes=('all',),
        rules=((rules.Rule('X', 'reverse_kl'),),),
        router=one_regime,
      )
    return Objective(
      **shared,
      views={**self.old_view, **views},
      regimes=('all',),
      rules=((self.surrogate(),),),
      router=router,
    )
