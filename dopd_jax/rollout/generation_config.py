"""What a model's `generation_config.json` would do, said aloud: it never changes sampling."""

from collections.abc import Mapping, Sequence
from typing import Any

from dopd_jax.rollout.types import Sampling

# Settings that the sampler doesn't have, and the values under which `transformers` ignores them.
_NOT_APPLIED: Mapping[str, tuple] = {
  'repetition_penalty': (1.0,),
  'no_repeat_ngram_size': (0,),
  'typical_p': (1.0,),
  'epsilon_cutoff': (0.0,),
  'eta_cutoff': (0.0,),
  'top_h': (),
  'min_length': (0,),
  'min_new_tokens': (0,),
  'num_beams': (1,),
  'num_beam_groups': (1,),
  'penalty_alpha': (0.0,),
  'guidance_scale': (1.0,),
  'bad_words_ids': ([],),
  'suppress_tokens': ([],),
  'begin_suppress_tokens': ([],),
  'sequence_bias': ({}, []),
  'forced_bos_token_id': (),
  'forced_eos_token_id': (),
  'exponential_decay_length_penalty': (),
  'stop_strings': ([],),
  'watermarking_config': (),
}


def sampling_notes(generation_config: Mapping[str, Any], sampling: Sampling) -> list[str]:
  """A line for each setting of `generation_config.json` that differs from what will be used.

  Only what the file sets is compared: a missing or null setting says nothing.
  """
  used = {
    'do_sample': not sampling.greedy,
    'temperature': sampling.temperature,
    'top_k': sampling.top_k,
    'top_p': sampling.top_p,
    'min_p': sampling.min_p,
    'max_new_tokens': sampling.max_new_tokens,
    'num_return_sequences': sampling.num_samples,
  }
  words = {
    'do_sample': 'sampling' if used['do_sample'] else 'greedy decoding (temperature=0)',
    'top_k': 'off (top_k=0)' if sampling.top_k == 0 else None,
    'top_p': 'off (top_p=1)' if sampling.top_p == 1 else None,
    'min_p': 'off (min_p=0)' if sampling.min_p == 0 else None,
  }
  notes = []
  for name, value in generation_config.items():
    if value is None:
      continue
    if name in used and value != used[name]:
      notes.append(_note(name, value, words.get(name) or used[name]))
    elif name in _NOT_APPLIED and value not in _NOT_APPLIED[name]:
      notes.append(_note(name, value, 'none, the sampler has no such setting'))
  return notes


def stop_ids_from(
  eos_token_id: int | Sequence[int] | None, generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
  """Stop ids of a model, sorted: the tokenizer's and those of `generation_config.json`, together.

  A family ends its turns with several ids (Qwen3 with 151643 and 151645), and one source often
  names only one of them. Each source is an id, several, or none.
  """
  listed = (generation_config or {}).get('eos_token_id')
  return tuple(sorted({*_ids(eos_token_id), *_ids(listed)}))


def stop_ids_warning(student: Sequence[int], teacher: Sequence[int]) -> str | None:
  """A sentence if student and teacher stop at different ids, else None.

  A teacher that ends with an id at which the student isn't stopped teaches it to write on.
  """
  if set(student) == set(teacher):
    return None
  return (
    f'The student stops at ids {sorted(set(student))} and the teacher at {sorted(set(teacher))}: '
    'completions may never end unless both sets are the same.'
  )


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
  if value is None:
    return ()
  return (value,) if isinstance(value, int) else tuple(i for i in value if i is not None)


def _note(name: str, value: Any, used: Any) -> str:
  return f'generation_config.json says {name}={value!r}; used here: {used}.'
