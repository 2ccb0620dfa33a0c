r"""DOPD with a gap threshold for each sign of the gap: a repair, not the paper's.

    A = |log Tp(y) - log Sp(y)|,   Abar over the tokens with Tp >= Sp for those, over the others for
    the others,   else as `dopd`

In DOPD the huge gaps of wrong sampled tokens, all in the student's favour, inflate the one
threshold, so that the strong teacher is rarely asked. As many forwards as `dopd`.
"""

import dataclasses

import jax.numpy as jnp

from dopd_jax.losses import routing
from dopd_jax.objectives.dopd import Dopd, routed
from dopd_jax.objectives.grammar import Routed, Seen


@dataclasses.dataclass(frozen=True)
class DopdSigned(Dopd):
  """Settings of the `dopd_signed` objective: those of `dopd`."""

  name: str = 'dopd_signed'

  def router(self, seen: Seen) -> Routed:
    """As DOPD's, but for the gap threshold, which is that of the token's sign."""
    mask, axis = seen.mask, routing.axis_of(self.scope)
    s, t = seen.signals['Sp'].logp_y, seen.signals['Tp'].logp_y
    found = routing.route(s, t, mask, self.trim, self.scope)
    bar = lambda side: routing.trimmed_mean(found.gap, mask & side, self.trim, axis)
    teacher, student = bar(t >= s), bar(t < s)
    regime = routing.regimes(
      found.gap,
      jnp.where(t >= s, teacher, student),
      found.confidence,
      found.confidence_threshold,
      t >= s,
      mask,
    )
    told = routed(found._replace(regime=regime), mask)
    scalars = {name: x for name, x in told.scalars.items() if name != 'gap_threshold'} | {
      'gap_threshold_teacher': jnp.mean(teacher),
      'gap_threshold_student': jnp.mean(student),
    }
    return told._replace(scalars=scalars)
