r"""Every rule's loss and gradient in closed form, on the columns of a tile of rows.

With s = log p of the student, `u_j = dl/ds_j` and z = the student's logits, every rule has one
gradient:  dl/dz_j = u_j - p_j sum_i u_i.

    reverse KL        u = p (s - t)          (+ p where the classes do not sum to 1)
    forward KL        u = -q                 (0 where the term is clipped)
    generalised JS    u = (1-b) p log(p/m)
    on K tokens       the same on K; a bucket of the rest hands its u to its tokens by their
                      probability in it; renormalised, the sum is over K alone
    at one token      u = dl/ds_y at the sampled token y, 0 elsewhere

`measure` reduces over the vocabulary first, `gradient` then gives u of any block of columns. The
functions of `rules` and `support` on whole log-probabilities are the definition of each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dopd_jax.losses import divergences, policy_gradient, rules, support
from dopd_jax.losses.columns import Block, Columns


class Tokens(NamedTuple):
  """What is known of the sampled tokens of C rows before any rule; [C], nats."""

  ids: Int[Array, 'C']
  lse: Float[Array, 'C']  # of the student's logits
  logp: Float[Array, 'C']
  source_lse: Float[Array, 'C'] | None = None
  advantage: Float[Array, 'C'] | None = None
  old_logp: Float[Array, 'C'] | None = None


class Measured(NamedTuple):
  """What `gradient` needs of the whole vocabulary; [C] float32, `last` int32."""

  value: Float[Array, 'C']  # the loss, nats
  total: Float[Array, 'C']  # sum of u that is taken back by p over the whole vocabulary
  student: Float[Array, 'C']  # subtracted from logits to make the log-probs that the rule compares
  source: Float[Array, 'C']
  least: Float[Array, 'C']  # the K-th largest logit of the policy that chooses, and its id
  last: Int[Array, 'C']
  rest: Float[Array, 'C']  # log-sum-exp of the student's other logits
  spread: Float[Array, 'C']  # u of the bucket; renormalised: sum of u over K
  at_y: Float[Array, 'C']


def measure(rule: rules.Rule, columns: Columns, tokens: Tokens, vocab: int) -> Measured:
  """The loss of one rule, its `weight` and `ratio_cap` left aside, and what its gradient needs.

  Args:
    rule: its `source` is that of the columns' blocks.
    columns: of C rows.
    tokens: of these rows.
    vocab: how many ids are alive; from K = vocab on a top K is the full vocabulary.
  """
  if _of_one_token(rule):
    return _at_token(rule, columns, tokens)
  inside, student, source, chosen = _classes(rule, columns, tokens, vocab)
  assert source is not None
  least, last = chosen
  whole = rule.tail != 'truncate' or not _limited(rule, vocab)

  def terms(block):
    found = pointwise(
      rule, block.student - student[:, None], source_of(block) - source[:, None], whole
    )
    return tuple(jnp.where(inside(block), x, 0.0) for x in found)

  value, total = columns.total(terms)
  nothing = jnp.zeros_like(value)
  rest = spread = nothing
  if _limited(rule, vocab) and rule.tail == 'bucket':
    rest, source_rest = (
      columns.log_sum_exp(lambda b, of=of: jnp.where(inside(b), -jnp.inf, of(b)))
      for of in (lambda b: b.student, source_of)
    )
    more, spread = pointwise(rule, rest - student, source_rest - source, whole)
    value, total = value + more, total + spread
  elif _limited(rule, vocab) and rule.tail == 'renormalise':
    spread, total = total, nothing
  return Measured(value, total, student, source, least, last, rest, spread, nothing)


def gradient(
  rule: rules.Rule, m: Measured, block: Block, tokens: Int[Array, 'C'], vocab: int
) -> Float[Array, 'C J']:
  """u of one block of columns: `dl/dz = u - p * m.total`."""
  if _of_one_token(rule):
    return jnp.where(block.ids == tokens[:, None], m.at_y[:, None], 0.0)
  limited = _limited(rule, vocab)
  s = block.student - m.student[:, None]
  whole = rule.tail != 'truncate' or not limited
  u = pointwise(rule, s, source_of(block) - m.source[:, None], whole)[1]
  if not limited:
    return u
  outside = 0.0
  if rule.tail == 'bucket':
    outside = m.spread[:, None] * jnp.exp(block.student - m.rest[:, None])
    outside = jnp.where((m.spread != 0)[:, None], outside, 0.0)
  elif rule.tail == 'renormalise':
    u -= jnp.exp(s) * m.spread[:, None]
  return jnp.where(_inside(rule, block, m.least, m.last), u, outside)


def pointwise(rule: rules.Rule, s: Array, t: Array, whole: bool = True) -> tuple[Array, Array]:
  """Each class's share of the divergence and its u, from log-probs s of the student, t of a source.

  `whole`: the student's classes sum to 1, so that a constant in u / p changes nothing and is left
  out. A class to which a policy gives probability 0 adds exactly 0 wherever that is the limit.
  """
  b = rule.mixture if rule.divergence == 'generalised_js' else 0.5
  p, q, ratio = jnp.exp(s), jnp.exp(t), s - t
  if rule.divergence == 'reverse_kl' or (rule.divergence == 'generalised_js' and b == 1.0):
    value = jnp.where(p > 0, p * ratio, 0.0)
    return value, value if whole else value + p
  if rule.divergence == 'forward_kl' or (rule.divergence == 'generalised_js' and b == 0.0):
    value = jnp.where(q > 0, -q * ratio, 0.0)
    if rule.divergence == 'forward_kl' and rule.term_clip is not None:
      return jnp.minimum(value, rule.term_clip), jnp.where(value < rule.term_clip, -q, 0.0)
    return value, -q
  log_p, log_q = divergences.logs_over_mixture(ratio, b)
  u = jnp.where(p > 0, (1.0 - b) * p * log_p, 0.0)
  return u + jnp.where(q > 0, b * q * log_q, 0.0), u


def _at_token(rule: rules.Rule, columns: Columns, tokens: Tokens) -> Measured:
  """A rule that looks at the sampled token alone: its derivative is autodiff's, of one number."""
  nothing = jnp.zeros_like(tokens.logp)
  source = None
  if rule.divergence not in rules.SOURCELESS:
    at_y = lambda b: (jnp.where(b.ids == tokens.ids[:, None], source_of(b), 0.0),)
    source = columns.total(at_y)[0] - tokens.source_lse

  def loss(logp):
    if rule.divergence == rules.CROSS_ENTROPY:
      return -logp
    if rule.divergence == rules.POLICY_GRADIENT:
      assert tokens.old_logp is not None and tokens.advantage is not None, rule
      return policy_gradient.clipped_surrogate(
        logp, tokens.old_logp, tokens.advantage, rule.clip_low, rule.clip_high
      )
    assert source is not None
    return support.sampled_score(rule.divergence, logp, source, rule.clip)

  value, vjp = jax.vjp(loss, tokens.logp)
  (u,) = vjp(jnp.ones_like(value))
  last = jnp.zeros_like(tokens.ids)
  return Measured(value, u, *(nothing,) * 3, last, nothing, nothing, u)


def _classes(rule: rules.Rule, columns: Columns, tokens: Tokens, vocab: int):
  """Which columns a rule compares, what to subtract from both logits, and the K-th of them."""
  nothing = jnp.zeros_like(tokens.lse)
  if not _limited(rule, vocab):
    everything = lambda block: jnp.ones((), bool)
    return everything, tokens.lse, tokens.source_lse, (nothing, jnp.zeros_like(tokens.ids))
  chosen = columns.kth(lambda b: _chooser(rule, b), rule.k)
  inside = lambda block: _inside(rule, block, *chosen)
  if rule.tail != 'renormalise':
    return inside, tokens.lse, tokens.source_lse, chosen
  student, source = (
    columns.log_sum_exp(lambda b, of=of: jnp.where(inside(b), of(b), -jnp.inf))
    for of in (lambda b: b.student, source_of)
  )
  return inside, student, source, chosen


def _of_one_token(rule: rules.Rule) -> bool:
  return rule.divergence in rules.SOURCELESS or rule.region == 'sampled'


def _limited(rule: rules.Rule, vocab: int) -> bool:
  return rule.region == 'top_k' and rule.k < vocab


def _chooser(rule: rules.Rule, block: Block) -> Array:
  return block.student if rule.support == 'student' else source_of(block)


def _inside(rule: rules.Rule, block: Block, least: Array, last: Array) -> Array:
  x, least = _chooser(rule, block), least[:, None]
  tie = jnp.abs(x - least) <= 1e-6 * jnp.abs(least) if block.made_again else x == least
  return jnp.where(tie, block.ids <= last[:, None], x > least)


def source_of(block: Block) -> Array:
  """The source's logits of a block that has a source."""
  assert block.source is not None
  return block.source
