r"""The grammar that every objective is a sentence of.

    View     whose weights, on which prompt         S = (student, plain), Tp = (teacher, privileged)
    signals  what scoring a view says of each sampled token
    router   what was seen of a rollout batch -> the regime of each token
    rules    regime -> the rules that supervise its tokens   (`losses.rules.Rule`)
    plan     regime, coef, advantage [B, N]: everything that is fixed before the first update

A plan exists before any gradient, over the whole global rollout batch: neither micro-batches nor
the number of devices can change it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dopd_jax.losses import reduction, rules

WEIGHTS = ('student', 'ema', 'frozen', 'teacher', 'reference')
CONTEXTS = ('plain', 'privileged', 'sibling')
IMAGES = ('full', 'crop', 'boxed', 'degraded')
SOURCES = ('student', 'data', 'mixed')
SAMPLER = 'sampler'  # an `old_logp` that is the sampler's own


class View(NamedTuple):
  """A policy that is asked about the sampled tokens: whose weights read which prompt.

  `weights`: `student` (live), `ema` or `frozen` (a running mean, or the first copy, of the
  student), `teacher`, `reference` (a second model that is given). `context`: `plain`, `privileged`
  (the record's), or `sibling` (made after the rollout: another completion of the same prompt that
  was right). `image`: the `full` one, its `crop` to the evidence, the one with the evidence
  `boxed` (framed), or a `degraded` one.
  """

  weights: str
  context: str = 'plain'
  image: str = 'full'

  @property
  def prompt(self) -> str:
    """The name of the rendering that it reads."""
    return self.context if self.image == 'full' else f'{self.context}+{self.image}'


class Signals(NamedTuple):
  """What one view says of the sampled tokens; [B, N] float32, nats."""

  logp_y: Float[Array, 'B N']  # log-prob of the sampled token
  lse: Float[Array, 'B N']  # log-sum-exp of the logits over the live vocabulary
  entropy: Float[Array, 'B N']


class Compare(NamedTuple):
  """A signal of two views: a divergence of `student` from `source` over the whole vocabulary."""

  student: str
  source: str
  divergence: str  # 'reverse_kl', 'forward_kl' or 'js'


class Seen(NamedTuple):
  """What a router is told of a whole global rollout batch. B = prompts * samples, side by side."""

  signals: Mapping[str, Signals]
  mask: Bool[Array, 'B N']  # the tokens that may carry loss
  pairs: Mapping[str, Float[Array, 'B N']] = {}  # by the names of `Objective.pairs`, nats
  logp: Float[Array, 'B N'] | None = None  # the sampler's log-prob of its tokens, nats
  reward: Float[Array, 'B'] | None = None  # the verifier's, in [0, 1], where the objective asks
  samples: int = 1  # completions of one prompt
  key: Key[Array, ''] | None = None  # of this rollout batch


class Routed(NamedTuple):
  """A router's answer: regimes (-1 where masked), and scalars worth a line in the log.

  `coef` [B, N] replaces the objective's reduction over the mask; `advantage` [B, N] is for
  policy-gradient rules.
  """

  regime: Int[Array, 'B N']
  scalars: Mapping[str, Float[Array, '']] = {}
  token: Mapping[str, Float[Array, 'B N']] = {}
  coef: Float[Array, 'B N'] | None = None
  advantage: Float[Array, 'B N'] | None = None


class Plan(NamedTuple):
  """`loss = sum(coef * token_loss)`; constants for autodiff."""

  regime: Int[Array, 'B N']  # index into the objective's rules, -1 where masked
  coef: Float[Array, 'B N']  # token weight / normaliser, 0 where masked
  scalars: Mapping[str, Float[Array, '']]
  token: Mapping[str, Float[Array, 'B N']]
  advantage: Float[Array, 'B N'] | None = None
  old_logp: Float[Array, 'B N'] | None = None


Router = Callable[[Seen], Routed]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A whole method. `rules[r]` supervises the tokens of `regimes[r]`; its sources name `views`."""

  name: str
  student: View  # rolled out, and trained
  views: Mapping[str, View]  # scored without gradient
  regimes: tuple[str, ...]
  rules: rules.Table
  router: Router
  temperature: float = 1.0
  reduction: str = 'sequence'
  source: str = 'student'  # who writes the completions: the student, the data, or both in turn
  on_policy_share: float = 1.0  # rollout batches of a 'mixed' source that the student writes
  ema_rate: float = 0.0  # share of the student that enters the running mean at each update
  privileged_share: float = 0.0  # rows of a 'data' source whose prompt shows the privileged context
  pairs: Mapping[str, Compare] = dataclasses.field(default_factory=dict)  # signals of two views
  # Sources made of views: their logits are these weighted sums of the views'.
  blends: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
  old_logp: str = ''  # which log-prob a ratio divides by: 'sampler', a view, or '' where none does
  updates: int = 1  # optimizer updates a rollout batch, each on its own share of the rows
  rewards: bool = False  # whether verifiers judge the completions before the plan
  least_samples: int = 1  # completions a prompt that the method needs
  right_at: float = 0.5  # reward from which a completion can be a sibling's hint

  def __post_init__(self):
    if len(self.rules) != len(self.regimes):
      raise ValueError(f'{len(self.regimes)} regimes but rules for {len(self.rules)}')
    for view in (self.student, *self.views.values()):
      if not (view.weights in WEIGHTS and view.context in CONTEXTS and view.image in IMAGES):
        raise ValueError(f'no such view: {view}; {WEIGHTS}, {CONTEXTS}, {IMAGES}')
    for rule in (rule for table in self.rules for rule in table):
      rules.check(rule)
      known = {*self.views, *self.blends}
      if rule.divergence not in rules.SOURCELESS and rule.source not in known:
        raise ValueError(f'rule source {rule.source!r} is none of the views {tuple(self.views)}')
      ratio = rule.divergence == rules.POLICY_GRADIENT or rule.ratio_cap is not None
      if ratio and self.old_logp not in (SAMPLER, *self.views):
        raise ValueError(f'{rule} needs old_logp, which is {self.old_logp!r}')

  @property
  def weights(self) -> frozenset[str]:
    """Whose weights the views need."""
    return frozenset(view.weights for view in self.views.values())

  @property
  def contexts(self) -> frozenset[str]:
    """Which contexts must be rendered."""
    named = {view.context for view in (self.student, *self.views.values())}
    return frozenset(named | ({'privileged'} if self.privileged_share else set()))

  @property
  def prompts(self) -> frozenset[str]:
    """The names of the renderings that the views read."""
    named = {view.prompt for view in (self.student, *self.views.values())}
    return frozenset(named | ({'privileged'} if self.privileged_share else set()))

  @property
  def images(self) -> frozenset[str]:
    """Which forms of a record's image are looked at."""
    return frozenset(view.image for view in (self.student, *self.views.values()))

  @property
  def sources(self) -> frozenset[str]:
    """The views whose distributions the rules compare the student with."""
    named = {
      r.source for table in self.rules for r in table if r.divergence not in rules.SOURCELESS
    }
    return frozenset(view for name in named for view in self.blends.get(name, {name: 1.0}))


def one_regime(seen: Seen) -> Routed:
  """The router of a method that treats all tokens alike."""
  return Routed(all_tokens(seen.mask))


def all_tokens(mask: Bool[Array, 'B N'], regime: int = 0) -> Int[Array, 'B N']:
  """One regime for every token, -1 where masked."""
  return jnp.where(mask, regime, -1).astype(jnp.int32)


def old_logp(name: str, seen: Seen) -> Float[Array, 'B N']:
  """Log-prob of the sampled tokens when they were sampled, by the name in `Objective.old_logp`."""
  found = seen.logp if name == SAMPLER else seen.signals[name].logp_y
  assert found is not None
  return found


def make_plan(objective: Objective, seen: Seen) -> Plan:
  """Thresholds, regimes, advantages and coefficients of one rollout batch.

  No comparison with NaN is true, so tokens of which a policy says NaN would be routed around it and
  have a finite loss: where a signal is not finite the coefficient is NaN, and with it the loss.
  """
  routed = objective.router(seen)
  coef = routed.coef
  if coef is None:
    coef = reduction.coefficients(seen.mask, objective.reduction)
  said = [x for signals in seen.signals.values() for x in (signals.logp_y, signals.entropy)]
  for signal in (*said, *seen.pairs.values()):
    coef = jnp.where(seen.mask & ~jnp.isfinite(signal), jnp.nan, coef)
  old = old_logp(objective.old_logp, seen) if objective.old_logp else None
  return Plan(routed.regime, coef, routed.scalars, routed.token, routed.advantage, old)
