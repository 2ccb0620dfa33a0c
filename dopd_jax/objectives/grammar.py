r"""The grammar that every objective is a sentence of.

    View     whose weights, on which prompt         S = (student, plain), Tp = (teacher, privileged)
    signals  what scoring a view says of each sampled token
    router   signals -> the regime of each token
    rules    regime -> the rules that supervise its tokens   (`losses.rules.Rule`)
    plan     regime [B, N] and coef [B, N]: everything that is fixed before the first update

A plan exists before any gradient, over the whole global rollout batch: neither micro-batches nor
the number of devices can change it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dopd_jax.errors import UserError
from dopd_jax.losses import reduction, rules

WEIGHTS = ('student', 'ema', 'frozen', 'teacher')
CONTEXTS = ('plain', 'privileged')


class View(NamedTuple):
  """A policy that is asked about the sampled tokens: whose weights read which prompt.

  `weights`: `student` (live), `ema` or `frozen` (a running mean, or the first copy, of the
  student), `teacher`. `context`: `plain` or `privileged`.
  """

  weights: str
  context: str = 'plain'


class Signals(NamedTuple):
  """What one view says of the sampled tokens; [B, N] float32, nats."""

  logp_y: Float[Array, 'B N']  # log-prob of the sampled token
  lse: Float[Array, 'B N']  # log-sum-exp of the logits over the live vocabulary
  entropy: Float[Array, 'B N']


class Routed(NamedTuple):
  """A router's answer: regimes (-1 where masked), and scalars worth a line in the log."""

  regime: Int[Array, 'B N']
  scalars: Mapping[str, Float[Array, '']]
  token: Mapping[str, Float[Array, 'B N']]


class Plan(NamedTuple):
  """`loss = sum(coef * token_loss)`; constants for autodiff."""

  regime: Int[Array, 'B N']  # index into the objective's rules, -1 where masked
  coef: Float[Array, 'B N']  # token weight / normaliser, 0 where masked
  scalars: Mapping[str, Float[Array, '']]
  token: Mapping[str, Float[Array, 'B N']]


Router = Callable[[Mapping[str, Signals], Bool[Array, 'B N']], Routed]


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
  source: str = 'student'  # who writes the completions: the student, or the data
  ema_rate: float = 0.0  # share of the student that enters the running mean at each update
  privileged_share: float = 0.0  # rows of a 'data' source whose prompt shows the privileged context

  def __post_init__(self):
    if len(self.rules) != len(self.regimes):
      raise ValueError(f'{len(self.regimes)} regimes but rules for {len(self.rules)}')
    for view in (self.student, *self.views.values()):
      if view.weights not in WEIGHTS or view.context not in CONTEXTS:
        raise ValueError(f'no such view: {view}; weights {WEIGHTS}, contexts {CONTEXTS}')
    for rule in (rule for table in self.rules for rule in table):
      rules.check(rule)
      if rule.divergence != rules.CROSS_ENTROPY and rule.source not in self.views:
        raise ValueError(f'rule source {rule.source!r} is none of the views {tuple(self.views)}')

  @property
  def weights(self) -> frozenset[str]:
    """Whose weights the views need."""
    return frozenset(view.weights for view in self.views.values())

  @property
  def contexts(self) -> frozenset[str]:
    """Which prompts must be rendered."""
    named = {view.context for view in (self.student, *self.views.values())}
    return frozenset(named | ({'privileged'} if self.privileged_share else set()))


def one_regime(signals: Mapping[str, Signals], mask: Bool[Array, 'B N']) -> Routed:
  """The router of a method that treats all tokens alike."""
  del signals
  return Routed(jnp.where(mask, 0, -1).astype(jnp.int32), {}, {})


def make_plan(
  objective: Objective, signals: Mapping[str, Signals], mask: Bool[Array, 'B N']
) -> Plan:
  """Thresholds, regimes and coefficients of one rollout batch.

  Args:
    objective: the method.
    signals: of each of its views.
    mask: [B, N] bool, the completion tokens of the whole global batch.
  """
  routed = objective.router(signals, mask)
  coef = reduction.coefficients(mask, objective.reduction)
  return Plan(routed.regime, coef, routed.scalars, routed.token)


def need(condition: bool, sentence: str) -> None:
  """Raises `UserError(sentence)` unless `condition` holds."""
  if not condition:
    raise UserError(sentence)


def need_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises `UserError` unless `value` is allowed."""
  need(value in allowed, f'objective.{name} must be one of {", ".join(allowed)}, not {value!r}')
