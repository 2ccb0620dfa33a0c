r"""VA-OPD: weight completions and tokens by how much the image matters (arXiv 2605.21924).

    a_n = max(log T(y_n | image) - log T(y_n | degraded image), 0)
    w_k = softmax over a prompt's completions of zscore(mean_n a_n) / tau
    loss = sum_k w_k [ lambda mean_{V_k} D + (1 - lambda) mean_{rest of k} D ],   D = RKL(S || T)

V_k are the `top_share` of the tokens of completion k by a. The standard deviation is the
population's, which reproduces the paper's example. The loss is the mean over prompts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dopd_jax.losses import rules, selection
from dopd_jax.objectives.grammar import Objective, Routed, View
from dopd_jax.objectives.settings import Guided, need_one_of


@dataclasses.dataclass(frozen=True)
class VaOpd(Guided):
  """Settings of the `va_opd` objective."""

  name: str = 'va_opd'
  top_share: float = 0.2
  mix: float = 0.5  # lambda, the part of the loss that V_k has
  softmax_temperature: float = 1.0  # tau
  region: str = 'sampled'  # of D, as the one port has it; or 'full'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('region', self.region, ('sampled', 'full'))
    teacher, view = self.guide()

    def router(seen):
      gain = seen.signals[teacher].logp_y - seen.signals['Td'].logp_y
      attention = jnp.where(seen.mask, jnp.maximum(gain, 0.0), 0.0)
      length = jnp.sum(seen.mask, axis=1)
      mean = jnp.sum(attention, axis=1) / jnp.maximum(length, 1)
      groups = lambda x: x.reshape(-1, seen.samples)
      alive = groups(length > 0)
      weight = rollout_weights(groups(mean), alive, self.softmax_temperature)
      prompts = jnp.maximum(jnp.sum(jnp.any(alive, axis=1)), 1)
      top = selection.top_share(attention, seen.mask, self.top_share, axis=1)
      coef = self.mix * _mean_of(top) + (1.0 - self.mix) * _mean_of(seen.mask & ~top)
      return Routed(
        jnp.where(seen.mask, jnp.where(top, 0, 1), -1).astype(jnp.int32),
        {'image_gain': jnp.sum(attention) / jnp.maximum(jnp.sum(seen.mask), 1)},
        {'image_gain': attention},
        coef=coef * weight.reshape(-1, 1) / prompts,
      )

    rule = rules.Rule(teacher, 'reverse_kl', self.region)
    return Objective(
      **self.shared(),
      views={teacher: view, 'Td': View('teacher', self.teacher_context, 'degraded')},
      regimes=('looks', 'rest'),
      rules=((rule,), (rule,)),
      router=router,
    )


def rollout_weights(
  mean: Float[Array, 'G M'], alive: Bool[Array, 'G M'], temperature: float = 1.0
) -> Float[Array, 'G M']:
  """The share of each completion in its prompt's loss; sums to 1 over those `alive`, else 0."""
  count = jnp.maximum(jnp.sum(alive, axis=1, keepdims=True), 1)
  centre = jnp.sum(jnp.where(alive, mean, 0.0), axis=1, keepdims=True) / count
  deviation = jnp.where(alive, mean - centre, 0.0)
  spread = jnp.sqrt(jnp.sum(deviation**2, axis=1, keepdims=True) / count)
  zscore = deviation / jnp.where(spread > 0, spread, 1.0)
  return jax.nn.softmax(zscore / temperature, axis=1, where=alive)


def _mean_of(which: Bool[Array, 'B N']) -> Float[Array, 'B N']:
  """Coefficients of the mean over the tokens of each row that are in a set."""
  return which / jnp.maximum(jnp.sum(which, axis=1, keepdims=True), 1)
