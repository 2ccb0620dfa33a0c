"""Completions from the policy that is trained: the jitted sampler, and what another engine must do.

An engine turns prompts into a `Rollout`. It takes prompt ids and never text, samples `num_samples`
completions of each from exactly the weights that it is given, and returns the ids that it sampled:
they are the ids trained on, never re-rendered text. `Engine` is the call; `make_sampler` returns
the native one, a pure function that runs wherever JAX does. An engine in another process (an HTTP
client, say) wraps its answer in the same `Rollout` and has to get three things right: the stop
token is in `mask` once, nothing is added to the prompt, and `logp` is the raw model's at the loss
temperature. An engine that only knows `behaviour_logp` repeats it as `logp`: the trainer recomputes
`logp` anyway and reports the difference.
"""

from dopd_jax.rollout.batching import bucket_length
from dopd_jax.rollout.generation_config import sampling_notes, stop_ids_from, stop_ids_warning
from dopd_jax.rollout.sampler import make_sampler
from dopd_jax.rollout.types import Engine, Rollout, Sampling, StopReason

__all__ = [
  'Engine',
  'Rollout',
  'Sampling',
  'StopReason',
  'bucket_length',
  'make_sampler',
  'sampling_notes',
  'stop_ids_from',
  'stop_ids_warning',
]
