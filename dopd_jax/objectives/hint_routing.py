r"""Routing between the plain and the hinted teacher by what the hint tells: a repair of DOPD.

    D = JS(Sp, S) or JS(Tp, T)        what the hint tells a policy about this token, nats
    w = 1 / (1 + D / Dbar)            trust in the hinted teacher; Dbar: the trimmed mean of D
    loss = w JS(S, Tp) + (1 - w) JS(S, T)

Whatever is made of privileged policies alone copies the hint; here the plain teacher takes over
where the hint is information that the student will never have. w is rounded to one of `levels`
values from 0 to 1, so that a level is a regime: two decide hard (D <= Dbar: the hinted teacher).
With `signal='none'` w is `mixture` everywhere, and no policy but the two teachers is asked.
With `signal='learned'` a logistic regression on three signals stands for the formula above:

    w = 1 / (1 + exp(c0 + c1 JS(Sp, S) + c2 JS(Tp, T) + c3 |log Tp(y) - log Sp(y)|))
"""

import dataclasses

import jax
import jax.numpy as jnp

from dopd_jax.losses import routing, rules
from dopd_jax.objectives.grammar import Compare, Objective, Routed, Seen, View, all_tokens
from dopd_jax.objectives.settings import Settings, need, need_one_of

# Signal -> what it compares, hinted and plain.
STUDENT, TEACHER = Compare('Sp', 'S', 'js'), Compare('Tp', 'T', 'js')
SIGNALS = {
  'student': {'hint': STUDENT},
  'teacher': {'hint': TEACHER},
  'learned': {'hint_student': STUDENT, 'hint_teacher': TEACHER},
  'none': {},
}
VIEWS = {
  'S': View('student'),
  'Sp': View('student', 'privileged'),
  'T': View('teacher'),
  'Tp': View('teacher', 'privileged'),
}


@dataclasses.dataclass(frozen=True)
class HintRouting(Settings):
  """Settings of the `hint_routing` objective."""

  name: str = 'hint_routing'
  signal: str = 'student'
  levels: int = 2
  mixture: float = 0.5  # w where there is no signal
  coefficients: tuple = ()  # c0 to c3 of what was learned
  divergence: str = 'js'
  trim: float = 0.05
  scope: str = 'batch'

  def build(self) -> Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""
    self.check()
    need_one_of('signal', self.signal, tuple(SIGNALS))
    need_one_of('divergence', self.divergence, ('reverse_kl', 'forward_kl', 'js'))
    need_one_of('scope', self.scope, routing.SCOPES)
    need(0.0 <= self.trim < 1.0, f'objective.trim must be in [0, 1), not {self.trim}')
    need(2 <= self.levels <= 101, f'objective.levels must be 2 to 101, not {self.levels}')
    wanted = 4 if self.signal == 'learned' else 0
    need(
      len(self.coefficients) == wanted and all(isinstance(c, float) for c in self.coefficients),
      f'objective.coefficients must be {wanted} numbers with signal={self.signal!r}, not '
      f'{self.coefficients!r}',
    )
    pairs = SIGNALS[self.signal]
    asked = dict.fromkeys(view for pair in pairs.values() for view in (pair.student, pair.source))
    weights = [i / (self.levels - 1) for i in range(self.levels)] if pairs else [self.mixture]
    return Objective(
      **self.shared(),
      student=View('student'),
      views={name: VIEWS[name] for name in dict.fromkeys((*asked, 'T', 'Tp'))},
      pairs=pairs,
      regimes=tuple(f'hinted_{round(100 * w)}' for w in weights),
      rules=tuple(
        tuple(
          rules.Rule(source, self.divergence, weight=part)
          for source, part in (('Tp', w), ('T', 1.0 - w))
          if part
        )
        for w in weights
      ),
      router=self.router,
    )

  def router(self, seen: Seen) -> Routed:
    """The level of every token."""
    mask = seen.mask
    if not SIGNALS[self.signal]:
      return Routed(all_tokens(mask))
    told, trust, scalars = (self.learned if self.signal == 'learned' else self.by_threshold)(seen)
    level = jnp.floor(trust * (self.levels - 1) + 0.5).astype(jnp.int32)
    scalars |= {'hint_told': jnp.sum(told) / jnp.maximum(jnp.sum(mask), 1)}
    return Routed(jnp.where(mask, level, -1), scalars, {'hint_told': told})

  def by_threshold(self, seen: Seen):
    """What the hint tells, the trust in the hinted teacher, and scalars."""
    told = jnp.where(seen.mask, jnp.maximum(seen.pairs['hint'], 0.0), 0.0)
    bar = routing.trimmed_mean(told, seen.mask, self.trim, routing.axis_of(self.scope))
    trust = jnp.where(told > 0, bar / jnp.where(told > 0, bar + told, 1.0), 1.0)
    return told, trust, {'hint_threshold': jnp.mean(bar)}

  def learned(self, seen: Seen):
    """The same by the coefficients; what the hint tells is here that of the student."""
    told = jnp.where(seen.mask, jnp.maximum(seen.pairs['hint_student'], 0.0), 0.0)
    gap = routing.privilege_advantage_gap(seen.signals['Sp'].logp_y, seen.signals['Tp'].logp_y)
    signals = (jnp.ones_like(told), told, jnp.maximum(seen.pairs['hint_teacher'], 0.0), gap)
    logit = sum(c * signal for c, signal in zip(self.coefficients, signals))
    return told, jax.nn.sigmoid(-logit), {}
