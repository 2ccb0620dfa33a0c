r"""On-policy distillation as policy gradient on the sampled token (Thinking Machines, 2025).

    y ~ S,   A = -c (log S_old(y) - log T(y)),   loss = -S(y) / S_old(y) * A

The reward is the negative reverse KL of the sampled token; there is no discount, baseline or clip.
Its gradient is that of the reverse KL in expectation, tokens after this one left aside. Source:
tinker-cookbook's `distillation` recipe, with its `importance_sampling` loss.
"""

import dataclasses

from dopd_jax.objectives.grammar import Objective, Routed, all_tokens, old_logp
from dopd_jax.objectives.settings import Surrogate


@dataclasses.dataclass(frozen=True)
class ThinkingMachines(Surrogate):
  """Settings of the `thinking_machines` objective."""

  name: str = 'thinking_machines'
  coefficient: float = 1.0  # c, `kl_penalty_coef` of the recipe

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    teacher, view = self.guide()
    shared = self.shared()

    def router(seen):
      gain = seen.signals[teacher].logp_y - old_logp(shared['old_logp'], seen)
      return Routed(all_tokens(seen.mask), advantage=self.coefficient * gain)

    return Objective(
      **shared,
      views={**self.old_view, teacher: view},
      regimes=('all',),
      rules=((self.surrogate(),),),
      router=router,
    )
