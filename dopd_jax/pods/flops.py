"""FLOPs of a run's programs, counted from shapes: matmuls alone, every row at its full length.

A multiply and an add are two. Nothing is assumed to be skipped: completions run to their end, all
tokens carry loss, and causal attention multiplies its upper triangle too, as `models.layers` does.
"""

import jax

from dopd_jax.config import Config
from dopd_jax.models import DecoderConfig, Model, VisionConfig, layers
from dopd_jax.objectives import Objective
from dopd_jax.policies import Pair
from dopd_jax.rollout.caches import lengths
from dopd_jax.step import OWN


def count(
  config: Config, objective: Objective, pair: Pair, prompt: dict[str, int]
) -> dict[str, int]:
  """Of rollout, score and update, over all devices. `prompt`: tokens of each rendering."""
  r, student = config.rollout, pair.student.model
  b, N = r.prompts, r.max_new_tokens
  B = b if objective.source == 'data' else b * r.samples
  P = prompt[objective.student.prompt]
  length = lambda view: prompt[view.prompt] + N
  vision = student.config.vision
  patches = config.data.max_pixels // vision.patch_size**2 if vision else 0

  columns = lengths(P, N)
  # What a completion's queries meet: every step reads all columns that the cache then has.
  pairs = sum((end - start) * end for start, end in zip([P, *columns], columns))
  rollout = forward(student, b, P, P) + head(student, b) + see(student, b, patches)
  rollout += B * (N - 1) * 2 * matrices(student) + B * attention(student.config, pairs)
  rollout += head(student, B * (N - 1))

  score = 0
  for view in objective.views.values():
    model = student if view.weights in OWN else next(iter(pair.models[view.weights].values()))
    T = length(view)
    score += forward(model, B, T, T) + head(model, B * N) + see(model, b, patches)

  T = P + N
  passes = 4 if config.remat else 3  # forward, backward twice, and forward again
  again = lambda tokens: tokens > layers.BLOCK  # scores in blocks are made once more
  sources = [pair.models[v.weights][''] for v in objective.views.values() if v.weights not in OWN]
  source = max([head(m, B * N) for m in (student, *sources)])
  update = passes * forward(student, B, T, T) + 3 * head(student, B * N) + source
  update += again(T) * B * attention(student.config, T * T)
  seen = 1 if config.freeze == 'vision' else passes
  update += seen * see(student, b, patches)
  if vision and seen > 1 and again(patches):
    update += b * attend(vision, patches)
  return {'rollout': rollout, 'score': score, 'update': update}


def matrices(model: Model) -> int:
  """Numbers in the matrices of the decoder's blocks."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))['layers']
  return sum(x.size for x in jax.tree.leaves(shapes) if x.ndim > 2)


def forward(model: Model, rows: int, T: int, S: int) -> int:
  """Of the blocks, without the head."""
  return rows * (2 * T * matrices(model) + attention(model.config, T * S))


def attention(config: DecoderConfig, pairs: int) -> int:
  """Scores and sums of so many pairs of query and key position, in all layers."""
  return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def head(model: Model, tokens: int) -> int:
  """One matmul with the head."""
  return 2 * tokens * model.config.vocab_size * model.config.hidden_size


def see(model: Model, images: int, patches: int) -> int:
  """Of the vision tower, forward."""
  v = model.config.vision
  if v is None:
    return 0
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))['vision']
  blocks = sum(x.size for x in jax.tree.leaves(shapes['blocks']) if x.ndim > 2)
  mergers = {k: x for k, x in shapes.items() if 'merger' in k}
  merged = sum(x.size for x in jax.tree.leaves(mergers) if x.size > v.hidden_size**2)
  merge = 2 * patches // v.merged * merged
  return images * (2 * patches * blocks + attend(v, patches) + merge)


def attend(vision: VisionConfig, patches: int) -> int:
  """Scores and sums of one image, in all blocks of the tower."""
  return 4 * vision.depth * vision.hidden_size * patches**2
