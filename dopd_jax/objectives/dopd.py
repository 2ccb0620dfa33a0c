r"""DOPD: dual on-policy distillation (arXiv 2606.30626).

    y ~ S,   A = |log Tp(y) - log Sp(y)|,   C = Sp(y) + Tp(y),   bars: trimmed means

    LH  A <  Abar, C >= Cbar    beta_light * RKL_K(S || Tp)     light teacher
    LL  A <  Abar, C <  Cbar    beta_weak  * RKL_K(S || Sp)     weak self-regularisation
    HT  A >= Abar, Tp >= Sp     1          * JS(S, Tp)          strong teacher
    HS  A >= Abar, Tp <  Sp     beta_light * RKL_K(S || Sp)     light self-regularisation

Each cell is a config, so that every row of the paper's Tables 6 and 8 is one.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from dopd_jax.losses import routing, rules
from dopd_jax.losses.routing import Regime
from dopd_jax.objectives.grammar import Compare, Objective, Routed, Seen, View
from dopd_jax.objectives.settings import Settings, need, need_one_of

SELF_REFERENCES = {'live': 'student', 'ema': 'ema', 'frozen': 'frozen'}


@dataclasses.dataclass(frozen=True)
class Cell:
  """What supervises the tokens of one regime."""

  source: str  # 'teacher' or 'self', both with the privileged input
  divergence: str  # 'reverse_kl', 'forward_kl' or 'js'
  region: str  # 'full', 'top_k' or 'sampled'
  strength: str  # 'strong' (1), 'light' (beta_light), 'weak' (beta_weak) or 'none' (0)


@dataclasses.dataclass(frozen=True)
class Dopd(Settings):
  """Settings of the `dopd` objective; the defaults are the paper's."""

  name: str = 'dopd'
  LH: Cell = Cell('teacher', 'reverse_kl', 'top_k', 'light')
  LL: Cell = Cell('self', 'reverse_kl', 'top_k', 'weak')
  HT: Cell = Cell('teacher', 'js', 'full', 'strong')
  HS: Cell = Cell('self', 'reverse_kl', 'top_k', 'light')
  beta_light: float = 0.6
  beta_weak: float = 0.3
  k: int = 128
  tail: str = 'bucket'
  support: str = 'student'
  trim: float = 0.05
  scope: str = 'batch'
  self_reference: str = 'live'  # whose weights LL and HS pull to; the gap is always the live ones'
  ema_rate: float = 0.05  # of self_reference='ema'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('self_reference', self.self_reference, tuple(SELF_REFERENCES))
    need_one_of('scope', self.scope, routing.SCOPES)
    need(0.0 <= self.trim < 1.0, f'objective.trim must be in [0, 1), not {self.trim}')

    views = {'Sp': View('student', 'privileged'), 'Tp': View('teacher', 'privileged')}
    anchor = 'Sp'
    if self.self_reference != 'live':
      anchor = 'Sr'
      views[anchor] = View(SELF_REFERENCES[self.self_reference], 'privileged')
    strength = {'strong': 1.0, 'light': self.beta_light, 'weak': self.beta_weak, 'none': 0.0}

    def rules_of(regime: Regime) -> tuple[rules.Rule, ...]:
      cell: Cell = getattr(self, regime.name)
      need_one_of(f'{regime.name}.source', cell.source, ('teacher', 'self'))
      need_one_of(f'{regime.name}.divergence', cell.divergence, ('reverse_kl', 'forward_kl', 'js'))
      need_one_of(f'{regime.name}.region', cell.region, rules.REGIONS)
      need_one_of(f'{regime.name}.strength', cell.strength, tuple(strength))
      rule = rules.Rule(
        source='Tp' if cell.source == 'teacher' else anchor,
        divergence=cell.divergence,
        region=cell.region,
        weight=strength[cell.strength],
        k=self.k,
        tail=self.tail,
        support=self.support,
      )
      return (rule,) if rule.weight else ()

    regimes = (Regime.LH, Regime.LL, Regime.HT, Regime.HS)
    return Objective(
      **self.shared(),
      student=View('student', 'plain'),
      views=views,
      pairs=self.pairs(),
      regimes=tuple(regime.name for regime in regimes),
      rules=tuple(rules_of(regime) for regime in regimes),
      router=self.router,
      ema_rate=self.ema_rate if self.self_reference == 'ema' else 0.0,
    )

  def pairs(self) -> dict[str, Compare]:
    """The signals of two views that the router reads."""
    return {}

  def router(self, seen: Seen) -> Routed:
    """Gap and confidence of the sampled tokens, held against their trimmed means."""
    return routed(
      routing.route(
        seen.signals['Sp'].logp_y, seen.signals['Tp'].logp_y, seen.mask, self.trim, self.scope
      ),
      seen.mask,
    )


def routed(found: routing.Routing, mask: Bool[Array, 'B N']) -> Routed:
  """What the log and the pages are told of a routing."""
  count = jnp.maximum(jnp.sum(mask), 1)
  scalars = {
    'gap': jnp.sum(found.gap) / count,
    'gap_threshold': jnp.mean(found.gap_threshold),
    'confidence': jnp.sum(found.confidence) / count,
    'confidence_threshold': jnp.mean(found.confidence_threshold),
  }
  return Routed(found.regime, scalars, {'gap': found.gap})
