"""What goes into a sampler and what comes out."""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, Key

from dopd_jax.errors import UserError

# Logits of a few tens, divided by less than this, lose the differences that float32 can hold.
_SMALLEST_TEMPERATURE = 1e-4

KV_CACHES = ('compute', 'int8')


class StopReason(enum.IntEnum):
  STOP = 0  # the last token of the mask is a stop id; or the row had no prompt and sampled nothing
  LENGTH = 1  # max_new_tokens came first: the completion is truncated


class Rollout(NamedTuple):
  """Completions: B = b * M rows, the M of one prompt adjacent. Log-probabilities in nats."""

  tokens: Int[Array, 'B N']  # int32, pad_id where not mask
  mask: Bool[Array, 'B N']  # the stop token counts as a token; a prefix of each row
  logp: Float[Array, 'B N']  # float32: raw model at the loss temperature, 0 where not mask
  behaviour_logp: Float[Array, 'B N']  # float32: what it was drawn from, 0 where not mask
  stop_reason: Int[Array, 'B']  # int32 `StopReason`


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample. Static: another value is another compilation.

  Filters apply in `transformers`' order: temperature, top-k, top-p, min-p.

  Raises: UserError for a value that means nothing.
  """

  max_new_tokens: int
  num_samples: int = 1  # M, completions a prompt
  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # 0 is off
  top_p: float = 1.0  # 1 is off
  min_p: float = 0.0  # 0 is off
  loss_temperature: float = 1.0  # of `Rollout.logp`
  slots: int = 0  # completions decoded at once, others wait; 0 is all
  kv_cache: str = 'compute'  # keys and values in the compute dtype, or 'int8': half the memory

  def __post_init__(self):
    def check(name, holds, rule):
      if not holds:
        raise UserError(f'{name}={getattr(self, name)} does not work for sampling: {rule}.')

    for name in ('max_new_tokens', 'num_samples'):
      check(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, 'use an integer >= 1')
    check('temperature', _is_temperature(self.temperature) or self.temperature == 0, _TEMPERATURE)
    check('top_k', _is_int(self.top_k) and self.top_k >= 0, 'use an integer >= 0 (0 is off)')
    check('slots', _is_int(self.slots) and self.slots >= 0, 'use an integer >= 0 (0 is all)')
    check('top_p', 0 < self.top_p <= 1, 'use a number above 0 and at most 1 (1 is off)')
    check('min_p', 0 <= self.min_p <= 1, 'use a number from 0 to 1 (0 is off)')
    check('loss_temperature', _is_temperature(self.loss_temperature), _LOSS_TEMPERATURE)
    check('kv_cache', self.kv_cache in KV_CACHES, f'use one of {", ".join(KV_CACHES)}')

  @property
  def greedy(self) -> bool:
    return self.temperature == 0

  @property
  def raw(self) -> bool:
    """Whether tokens are drawn from exactly the distribution of `Rollout.logp`."""
    filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
    return not filtered and self.temperature == self.loss_temperature


_LOSS_TEMPERATURE = f'use a finite number of at least {_SMALLEST_TEMPERATURE}'
_TEMPERATURE = f'{_LOSS_TEMPERATURE}, or 0 for greedy decoding'


class Decoder(Protocol):
  """The part of a model that sampling needs: pure functions of a parameter tree.

  `forward(params, tokens [B, T], valid [B, T], cache=...) -> (hidden [B, T, D], cache)`; the cache
  is a NamedTuple of k, v [L, B, S, K, H], valid [B, S], index [] and position [B]. A token fed
  alone (T = 1) sees all valid columns, also those after `index`.
  """

  @property
  def forward(self) -> Callable[..., tuple[Array, Any]]: ...

  @property
  def init_cache(self) -> Callable[[int, int], Any]: ...

  @property
  def head(self) -> Callable[[Any], Array]: ...

  @property
  def quantize(self) -> Callable[[Any], Any]: ...


class Engine(Protocol):
  """One call: prompts in, completions out.

  Args:
    params: weights to sample from.
    tokens: prompt ids, padded on either side.
    valid: which of them are real. A row without any is a filler: it samples nothing.
    key: the run's key, already folded with the number of the rollout.
    record_index: a stable number of each prompt's record. Draws depend on it and not on the batch.
  """

  def __call__(
    self,
    params: Any,
    tokens: Int[Array, 'b P'],
    valid: Bool[Array, 'b P'],
    key: Key[Array, ''],
    record_index: Int[Array, 'b'],
  ) -> Rollout: ...


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_temperature(value: float) -> bool:
  return math.isfinite(value) and value >= _SMALLEST_TEMPERATURE
