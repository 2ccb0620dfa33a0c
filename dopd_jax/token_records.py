"""One completion as a person reads it: ids, pieces of text, and what the policies say of each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dopd_jax.data import Example
from dopd_jax.objectives import Objective
from dopd_jax.step import Batch, Scored, TokenView

# The log-prob of the sampled token under each view, by the names of samples.html and tokens.jsonl.
COLUMNS = {
  'Sp': 'privileged_student_logp',
  'Tp': 'privileged_teacher_logp',
  'T': 'teacher_logp',
}


def describe(
  tokenizer: Any,
  objective: Objective,
  examples: Sequence[Example],
  batch: Batch,
  scored: Scored,
  token: TokenView,
  stop_reason: np.ndarray,
  rewards: np.ndarray,
  step: int | None = None,
) -> list[dict[str, Any]]:
  """A record for each row, everything already on the host.

  Returns:
    Mappings with `id`, `prompt`, `privileged_context`, `completion_ids`, `tokens` (text pieces),
    `student_logp`, `privileged_student_logp`, `privileged_teacher_logp` (nats; those that the
    objective scores), `gap`, `regime` (names), `loss` (nats, weighted), `stop_reason`, `reward`.
  """
  regimes = [*objective.regimes, 'MASKED']  # -1 reads the last
  arrays = {'student_logp': token.logp, 'loss': token.loss, **scored.plan.token}
  for name, signals in scored.signals.items():
    arrays[COLUMNS.get(name, f'{name}_logp')] = signals.logp_y
  records = []
  for b, example in enumerate(examples):
    keep = batch.mask[b]
    ids = batch.tokens[b][keep].tolist()
    records.append(
      {
        'id': example.record.id,
        'step': step,
        'prompt': _text(example.record.prompt),
        'privileged_context': example.record.privileged_context,
        'completion_ids': ids,
        'tokens': [tokenizer.decode([i]) for i in ids],
        **{name: values[b][keep].astype(float).tolist() for name, values in arrays.items()},
        'regime': [regimes[r] for r in scored.plan.regime[b][keep]],
        'stop_reason': int(stop_reason[b]),
        'reward': None if np.isnan(rewards[b]) else float(rewards[b]),
      }
    )
  return records


def _text(prompt: Any) -> str:
  if isinstance(prompt, str):
    return prompt
  return '\n\n'.join(f'{message["role"]}: {message["content"]}' for message in prompt)
