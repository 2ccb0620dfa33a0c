r"""DOPD that routes by whole distributions instead of the sampled token: a repair, not the paper's.

    A = JS(Tp, Sp),   C = -H(Sp) - H(Tp),   bars: trimmed means,   else as `dopd`
    HT  A >= Abar, H(Tp) <= H(Sp)           HS  A >= Abar, H(Tp) > H(Sp)

In DOPD a wrong sampled token has a huge gap in the student's favour: it goes to the student's own
hinted distribution, which repeats it, and such gaps inflate the threshold. JS is at most log 2, and
nothing here depends on which token was drawn. As many forwards as `dopd`.
"""

import dataclasses

import jax.numpy as jnp

from dopd_jax.losses import routing
from dopd_jax.objectives.dopd import Dopd
from dopd_jax.objectives.grammar import Compare, Routed, Seen


@dataclasses.dataclass(frozen=True)
class DopdDistributional(Dopd):
  """Settings of the `dopd_distributional` objective: those of `dopd`."""

  name: str = 'dopd_distributional'

  def pairs(self) -> dict[str, Compare]:
    """The gap of the two privileged policies."""
    return {'gap': Compare('Sp', 'Tp', 'js')}

  def router(self, seen: Seen) -> Routed:
    """Divergence and entropies, held against their trimmed means."""
    mask, axis = seen.mask, routing.axis_of(self.scope)
    entropy = {name: jnp.where(mask, seen.signals[name].entropy, 0.0) for name in ('Sp', 'Tp')}
    values = {
      'gap': jnp.where(mask, seen.pairs['gap'], 0.0),
      'certainty': -entropy['Sp'] - entropy['Tp'],
    }
    bars = {name: routing.trimmed_mean(x, mask, self.trim, axis) for name, x in values.items()}
    regime = routing.regimes(
      values['gap'],
      bars['gap'],
      values['certainty'],
      bars['certainty'],
      entropy['Tp'] <= entropy['Sp'],
      mask,
    )
    count = jnp.maximum(jnp.sum(mask), 1)
    scalars = {name: jnp.sum(x) / count for name, x in values.items()}
    scalars |= {f'{name}_threshold': jnp.mean(x) for name, x in bars.items()}
    return Routed(regime, scalars, {'gap': values['gap']})
