"""One completion as a person reads it: ids, pieces of text, and what the policies say of each."""

import base64
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dopd_jax.data import Example, read_image
from dopd_jax.data.boxes import to_pixels
from dopd_jax.data.chat import IMAGE_MARKER
from dopd_jax.losses.head import TokenView
from dopd_jax.objectives import Objective
from dopd_jax.step import Batch, Scored

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
    objective scores), `gap`, `regime` (names), `loss` (nats, weighted), `stop_reason`, `reward`,
    `pictures` (data URIs of the images with their boxes).
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
        'pictures': pictures(example),
        'completion_ids': ids,
        'tokens': pieces(tokenizer, ids),
        **{name: values[b][keep].astype(float).tolist() for name, values in arrays.items()},
        'regime': [regimes[r] for r in scored.plan.regime[b][keep]],
        'stop_reason': int(stop_reason[b]),
        'reward': None if np.isnan(rewards[b]) else float(rewards[b]),
      }
    )
  return records


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
  """What each id adds to the text: many tokenizers drop the space before a word that stands alone.

  An id that changes what stood before it (the second half of a character) has its own decoding.
  """
  alone = [tokenizer.decode([i]) for i in ids]
  found = alone[:1]
  for (first, before), (second, text) in itertools.pairwise(zip(ids, alone)):
    both = tokenizer.decode([first, second])
    found.append(both[len(before) :] if both.startswith(before) else text)
  return found


def pictures(example: Example, side: int = 512) -> list[dict[str, Any]]:
  """The images of a record for samples.html, at most `side` pixels long, with their boxes."""
  record, found = example.record, []
  for source in example.images:
    image = read_image(source, f'record {record.id}')
    boxes = to_pixels(record.boxes or (), record.box_format or 'absolute', image.size)
    scale = min(1.0, side / max(image.size))
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, 'PNG')
    found.append(
      {
        'src': f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}',
        'width': image.width,
        'height': image.height,
        'boxes': [[scale * v for v in box] for box in boxes],
        'labels': list(record.labels or [''] * len(boxes)),
      }
    )
  return found


def _text(prompt: Any) -> str:
  """A prompt for people; an image in it is a word."""
  if isinstance(prompt, str):
    return prompt
  content = lambda x: (
    x if isinstance(x, str) else ''.join(part.get('text', IMAGE_MARKER) for part in x)
  )
  return '\n\n'.join(f'{message["role"]}: {content(message["content"])}' for message in prompt)
