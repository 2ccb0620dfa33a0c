r"""What a table of rules does to a token.

A `Rule` says where a token's supervision comes from and how it is measured; a table gives every
regime a tuple of rules, which are summed. DOPD is a table with one rule in each of four regimes,
vanilla on-policy distillation a table with one regime.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dopd_jax.losses import divergences, policy_gradient, support

DIVERGENCES = {
  'forward_kl': divergences.forward_kl,
  'reverse_kl': divergences.reverse_kl,
  'js': divergences.js_divergence,
  'generalised_js': divergences.generalised_js,
}
CROSS_ENTROPY = 'cross_entropy'
POLICY_GRADIENT = 'policy_gradient'
SOURCELESS = (CROSS_ENTROPY, POLICY_GRADIENT)  # they look at the sampled token alone
REGIONS = ('full', 'top_k', 'sampled')


class Rule(NamedTuple):
  """One term of a token's loss: `weight * divergence(student, source)` on a support.

  `source` names a distribution in the `sources` of `token_loss`. `divergence` is `'forward_kl'`
  (with `term_clip`, `clipped_forward_kl`), `'reverse_kl'`, `'js'`, `'generalised_js'` (with its
  `mixture` weight), or one that needs no source: `'cross_entropy'` (`-log p_y`, nats) or
  `'policy_gradient'` (`clipped_surrogate` of the token's advantage, with `clip_low`, `clip_high`).
  `region` is `'full'`, `'top_k'` (with `k`, `tail`, `support` as in `on_support`) or `'sampled'`
  (the score-function estimator of `support.sampled_token`, with its optional `clip`). `ratio_cap`
  multiplies the loss by the detached, capped ratio of the token's probability now and when sampled.
  """

  source: str
  divergence: str
  region: str = 'full'
  weight: float = 1.0
  k: int = 128
  tail: str = 'bucket'
  support: str = 'student'
  clip: float | None = None
  mixture: float = 0.5
  term_clip: float | None = None
  clip_low: float | None = None
  clip_high: float | None = None
  ratio_cap: float | None = None


Table = Sequence[Sequence[Rule]]  # the rules of regime r stand at index r


def check(rule: Rule) -> None:
  """Raises ValueError for a rule that names an unknown divergence, region, tail or support."""
  known = (*DIVERGENCES, *SOURCELESS)
  for field, value, allowed in (
    ('divergence', rule.divergence, known),
    ('region', rule.region, REGIONS),
    ('tail', rule.tail, support.TAILS),
    ('support', rule.support, (*support.SUPPORTS, 'teacher')),
  ):
    if value not in allowed:
      raise ValueError(f'{field} must be one of {tuple(allowed)}, got {value!r}')
  if rule.region == 'top_k' and rule.k < 1:
    raise ValueError(f'k must be at least 1, got {rule.k}')


def weights_of(table: Table) -> dict[Rule, tuple[float, ...]]:
  """The different rules of a table, at weight 1, each with its weight in every regime.

  A last entry of 0 is for regime -1. Rules of weight 0 are left out.
  """
  found: dict[Rule, list[float]] = {}
  for r, rules in enumerate(table):
    for rule in rules:
      if rule.weight:
        row = found.setdefault(rule._replace(weight=1.0), [0.0] * (len(table) + 1))
        row[r] += rule.weight
  return {rule: tuple(row) for rule, row in found.items()}


def loss_of(
  rule: Rule,
  student_logp: Float[Array, 'N V'],
  source_logp: Float[Array, 'N V'] | None,
  tokens: Int[Array, 'N'],
  advantage: Float[Array, 'N'] | None = None,
  old_logp: Float[Array, 'N'] | None = None,
) -> Float[Array, 'N']:
  """The loss of one rule for each token, its `weight` left aside; arguments as `token_loss`."""
  check(rule)
  logp_y = jnp.take_along_axis(student_logp, tokens[:, None], axis=-1)[:, 0]
  if rule.divergence == CROSS_ENTROPY:
    value = -logp_y
  elif rule.divergence == POLICY_GRADIENT:
    assert advantage is not None and old_logp is not None, rule
    value = policy_gradient.clipped_surrogate(
      logp_y, old_logp, advantage, rule.clip_low, rule.clip_high
    )
  else:
    assert source_logp is not None, rule
    value = _divergence(rule, student_logp, source_logp, tokens)
  if rule.ratio_cap is not None:
    assert old_logp is not None, rule
    value *= policy_gradient.capped_ratio(logp_y, old_logp, rule.ratio_cap)
  return value


def _divergence(rule: Rule, student_logp: Array, source_logp: Array, tokens: Array) -> Array:
  if rule.region == 'sampled':
    return support.sampled_token(rule.divergence, student_logp, source_logp, tokens, rule.clip)
  if rule.region == 'top_k':
    student_logp, source_logp, _ = support.on_support(
      student_logp, source_logp, rule.k, rule.tail, rule.support
    )
  if rule.divergence == 'generalised_js':
    return divergences.generalised_js(student_logp, source_logp, rule.mixture)
  if rule.divergence == 'forward_kl' and rule.term_clip is not None:
    return divergences.clipped_forward_kl(student_logp, source_logp, rule.term_clip)
  return DIVERGENCES[rule.divergence](student_logp, source_logp)


def token_loss(
  table: Table,
  student_logits: Float[Array, 'N V'],
  source_logits: Mapping[str, Float[Array, 'N V']],
  tokens: Int[Array, 'N'],
  regime: Int[Array, 'N'],
  temperature: float = 1.0,
  advantage: Float[Array, 'N'] | None = None,
  old_logp: Float[Array, 'N'] | None = None,
) -> Float[Array, 'N']:
  """The loss of each token of one sequence under a table of rules; vmap it over the batch.

  Args:
    table: the rules of each regime; a regime without rules carries no loss.
    student_logits: [N, V], with gradient. Any float dtype; the softmax runs in float32.
    source_logits: [N, V] for each source that the table names; constants.
    tokens: [N] int32, the sampled tokens.
    regime: [N] int32, index into `table`, or -1 where the token is masked.
    temperature: divides every model's logits, once.
    advantage: [N] of the sampled tokens, for policy-gradient rules; constants.
    old_logp: [N] nats, log-probs of the tokens when they were sampled, for those rules and for
      `ratio_cap`; constants.

  Returns:
    [N] nats, weighted by the rules' weights, unreduced, exactly 0 where masked or without a rule.

  Numerics: rules that differ only in weight share one pass over V, and a rule of weight 0 costs
  none. A token that a pass does not select enters it as all-zero logits and leaves it as 0, so that
  nothing non-finite at a masked token reaches the value or the gradient.
  """
  loss = jnp.zeros(tokens.shape, divergences.as_float(student_logits).dtype)
  for rule, row in weights_of(table).items():
    weight_R = jnp.asarray(row, loss.dtype)
    weight = weight_R[regime]
    selected = weight != 0

    def logp(logits, selected=selected):
      return divergences.log_probs(jnp.where(selected[:, None], logits, 0), temperature)

    def number(x, selected=selected):
      return None if x is None else jnp.where(selected, x, 0)

    source = None if rule.divergence in SOURCELESS else logp(source_logits[rule.source])
    value = loss_of(rule, logp(student_logits), source, tokens, number(advantage), number(old_logp))
    loss += jnp.where(selected, weight * jnp.where(selected, value, 0.0), 0.0)
  return loss


def batched_token_loss(
  table: Table,
  student_logits,
  source_logits,
  tokens,
  regime,
  temperature=1.0,
  advantage=None,
  old_logp=None,
):
  """`token_loss` vmapped: [B, N, V] logits, [B, N] of each token -> [B, N] nats."""

  def one(student_logits, source_logits, tokens, regime, advantage, old_logp):
    return token_loss(
      table, student_logits, source_logits, tokens, regime, temperature, advantage, old_logp
    )

  return jax.vmap(one)(student_logits, dict(source_logits), tokens, regime, advantage, old_logp)
