r"""DOPD with its regimes dealt to the tokens at random: a control, not the paper's.

Each batch has as many tokens of every regime as DOPD would give it, so that sources, divergences
and weights have the same shares; which token gets which is drawn. What DOPD gains over this is
what its routing gains.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dopd_jax.objectives.dopd import Dopd
from dopd_jax.objectives.grammar import Routed, Seen


@dataclasses.dataclass(frozen=True)
class DopdRandom(Dopd):
  """Settings of the `dopd_random` objective: those of `dopd`."""

  name: str = 'dopd_random'

  def router(self, seen: Seen) -> Routed:
    """DOPD's regimes in a random order; -1 stays where there is no token."""
    assert seen.key is not None
    found = super().router(seen)
    regime, mask = found.regime.reshape(-1), seen.mask.reshape(-1)
    drawn = jnp.where(mask, jax.random.uniform(seen.key, mask.shape), 2.0)
    # Tokens first, in both: in a drawn order, and as they stand.
    source, target = jnp.argsort(drawn), jnp.argsort(~mask, stable=True)
    dealt = jnp.full_like(regime, -1).at[target].set(regime[source])
    return found._replace(regime=dealt.reshape(found.regime.shape))
