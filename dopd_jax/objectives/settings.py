"""What the settings of all methods share, and how they refuse a value that makes no sense."""

import abc
import dataclasses

from dopd_jax.errors import UserError
from dopd_jax.losses import reduction as reductions
from dopd_jax.losses import rules, support
from dopd_jax.objectives import grammar


def need(condition: bool, sentence: str) -> None:
  """Raises `UserError(sentence)` unless `condition` holds."""
  if not condition:
    raise UserError(sentence)


def need_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises `UserError` unless `value` is allowed."""
  need(value in allowed, f'objective.{name} must be one of {", ".join(allowed)}, not {value!r}')


_ONE_OF = {
  'reduction': reductions.REDUCTIONS,
  'tail': support.TAILS,
  'support': (*support.SUPPORTS, 'teacher'),
  'teacher_context': grammar.CONTEXTS,
  'student_context': grammar.CONTEXTS[:2],
  'old_logp': (grammar.SAMPLER, 'student'),
  'evidence': ('crop', 'boxed'),
  'teacher': ('teacher', 'frozen', 'ema', 'student'),
}
_SHARES = (
  'share',
  'ema_rate',
  'privileged_share',
  'on_policy_share',
  'mixture',
  'top_share',
  'mix',
)
_POSITIVE = ('temperature', 'softmax_temperature')
_NOT_NEGATIVE = ('clip', 'clip_low', 'clip_high', 'ratio_cap')


@dataclasses.dataclass(frozen=True)
class Settings(abc.ABC):
  """Settings that every method has. Subclasses add theirs and `build` the objective.

  temperature: divides every model's logits, once.
  reduction: 'sequence': mean over the tokens of a completion, then over completions. 'token': mean
    over all tokens.
  updates: optimizer updates a rollout batch, each on its own share of the rows.
  """

  name: str = ''
  temperature: float = 1.0
  reduction: str = 'sequence'
  updates: int = 1

  def check(self) -> None:
    """Raises `UserError` for a value outside of its range; the same names mean the same for all."""
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    for name, allowed in _ONE_OF.items():
      if name in values:
        need_one_of(name, values[name], allowed)
    for name in _SHARES:
      value = values.get(name, 0.0)
      need(0.0 <= value <= 1.0, f'objective.{name} must be in [0, 1], not {value}')
    for name in _POSITIVE:
      need(values.get(name, 1.0) > 0, f'objective.{name} must be positive, not {values.get(name)}')
    for name in _NOT_NEGATIVE:
      value = values.get(name, 0.0)
      need(value >= 0.0, f'objective.{name} must be at least 0 (0 is off), not {value}')
    for name in ('k', 'updates'):
      value = values.get(name, 1)
      need(value >= 1, f'objective.{name} must be at least 1, not {value}')

  @abc.abstractmethod
  def build(self) -> grammar.Objective:
    """The objective; raises `UserError` for a setting that makes no sense."""

  def shared(self) -> dict:
    """The fields of `Objective` that are set the same way for every method."""
    return {
      'name': self.name,
      'temperature': self.temperature,
      'reduction': self.reduction,
      'updates': self.updates,
    }


@dataclasses.dataclass(frozen=True)
class Guided(Settings):
  """Settings of a method with one guide: a teacher, or a copy of the student.

  teacher_context: what the guide sees besides the prompt: 'plain', 'privileged' (the record's
    hint), or 'sibling' (a right completion of the same prompt).
  """

  teacher_context: str = 'plain'

  def guide(self, weights: str = 'teacher') -> tuple[str, grammar.View]:
    """The guide's name and view: T or Tp, or F or Fp for a copy of the student."""
    name = 'T' if weights == 'teacher' else 'F'
    mark = {'plain': '', 'privileged': 'p', 'sibling': 's'}[self.teacher_context]
    return name + mark, grammar.View(weights, self.teacher_context)

  def shared(self) -> dict:
    """As `Settings.shared`; a sibling's hint needs rewards and at least two completions."""
    sibling = self.teacher_context == 'sibling'
    more = {'rewards': True, 'least_samples': 2} if sibling else {}
    return {**super().shared(), 'student': grammar.View('student'), **more}


@dataclasses.dataclass(frozen=True)
class SelfGuided(Guided):
  """Settings of a method whose guide is a copy of the student, or the teacher if one so wishes.

  teacher: whose weights guide: 'frozen' (the student as given), 'ema' (its running mean, which
    each update moves by `ema_rate`), 'student' (live) or 'teacher'.
  """

  teacher: str = 'frozen'
  teacher_context: str = 'privileged'
  ema_rate: float = 0.05

  def shared(self) -> dict:
    """As `Guided.shared`, and the rate of the running mean where one is the guide."""
    rate = self.ema_rate if self.teacher == 'ema' else 0.0
    return {**super().shared(), 'ema_rate': rate}


@dataclasses.dataclass(frozen=True)
class Surrogate(Guided):
  """Settings of a method that reinforces the sampled token by an advantage.

  old_logp: which log-prob of the sampled token the ratio divides by: the 'sampler' has given it
    already (and it is the trainer's own up to rounding); 'student' asks the trainer again before
    the first update, for one more forward.
  clip_low, clip_high: PPO's clips of the ratio; 0 is off.
  """

  reduction: str = 'token'
  old_logp: str = grammar.SAMPLER
  clip_low: float = 0.0
  clip_high: float = 0.0

  @property
  def old_view(self) -> dict[str, grammar.View]:
    """The view that `old_logp` needs, if it needs one."""
    return {} if self.old_logp == grammar.SAMPLER else {'S': grammar.View('student')}

  def surrogate(self) -> rules.Rule:
    """The rule of the clipped surrogate."""
    low, high = self.clip_low or None, self.clip_high or None
    return rules.Rule('', rules.POLICY_GRADIENT, clip_low=low, clip_high=high)

  def shared(self) -> dict:
    """As `Guided.shared`, and whose log-prob is the old one."""
    name = grammar.SAMPLER if self.old_logp == grammar.SAMPLER else 'S'
    return {**super().shared(), 'old_logp': name}
