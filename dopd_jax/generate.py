r"""Samples completions of prompts with the native engine.

  python -m dopd_jax.generate --model=DIR --data=prompts.jsonl --out=completions.jsonl \
      --temperature=0 --max_new_tokens=256 [--num_samples=4 --seed=0]

Every line of the output repeats `id` and `prompt` and adds `sample`, `completion`,
`completion_ids`, `logp` (of each token, nats, the raw model's) and `stop_reason` ('stop' or
'length').
"""

import json
import sys

import jax
import numpy as np
from absl import flags
from rich.console import Console

from dopd_jax import (
  cli,
  collate,
  dataset,
  evaluation,
  metrics,
  policies,
  sharding,
  sight,
  workdirs,
)
from dopd_jax.config import Config, Policy
from dopd_jax.data import open_source, tokenise
from dopd_jax.errors import UserError
from dopd_jax.rollout import Sampling, StopReason, sampling_notes

FLAGS = flags.FLAGS


def generate(
  model: str,
  data: str,
  out: str,
  sampling: Sampling,
  *,
  seed: int = 0,
  batch: int = 32,
  image_folder: str = '',
) -> int:
  """Writes one JSON line a completion to `out`; returns how many.

  Raises:
    UserError: a model or data that can't be read, or `out` that can't be written. Nothing partial
      is left then.
  """
  mesh = sharding.make_mesh(1, -1, 1)
  config = Config(student=Policy(path=model), seed=seed)
  pair = policies.load_pair(config, mesh)
  room = pair.student.model.config.max_position_embeddings
  examples = tokenise(
    open_source(data, privileged='none', loaders=dataset.LOADERS, image_folder=image_folder),
    dataset.renderer(config, pair),
    max_prompt_tokens=sys.maxsize,
    on_too_long='error',
    name=data,
  ).examples
  longest = max(len(e.prompt_ids) for e in examples)
  if longest + sampling.max_new_tokens > room:
    raise UserError(
      f'the longest prompt has {longest} tokens, which with {sampling.max_new_tokens} new ones is '
      f'over the context of {room} tokens: shorten the prompts or lower --max_new_tokens'
    )
  console = Console(stderr=True)
  for note in sampling_notes(pair.student.generation_config, sampling):
    console.print(note, highlight=False)
  step = evaluation.make_generate(pair.student.model, sampling, pair)
  rows = evaluation.rows_at_once(min(batch, len(examples)), mesh)
  key = jax.random.key(seed)
  written = 0
  with workdirs.writing(out) as file, metrics.bar(console) as progress, jax.set_mesh(mesh):
    task = progress.add_task('generate', total=len(examples), rate='-')
    for i in range(0, len(examples), rows):
      chunk = examples[i : i + rows]
      prompt = collate.prompts(
        chunk, ['plain'], config.data.prompt_bucket, pair.pad_id, rows, pair.sight
      )
      images = (sight.images(chunk, ['full'], pair.sight, mesh, rows) or {}).get('full')
      index = np.resize(np.array([e.index for e in chunk], np.uint32), rows)
      prompt, index, images = collate.put((prompt['plain'], index, images), mesh)
      rollout = collate.fetch(step(pair.student.params, prompt, key, index, images))
      texts = evaluation.decode(pair.tokenizer, rollout.tokens, rollout.mask)
      for row in range(len(chunk) * sampling.num_samples):
        record, keep = chunk[row // sampling.num_samples].record, rollout.mask[row]
        line = {
          'id': record.id,
          'prompt': record.prompt,
          'sample': row % sampling.num_samples,
          'completion': texts[row],
          'completion_ids': rollout.tokens[row][keep].tolist(),
          'logp': rollout.logp[row][keep].astype(float).tolist(),
          'stop_reason': StopReason(int(rollout.stop_reason[row])).name.lower(),
        }
        file.write(json.dumps(line) + '\n')
        written += 1
      progress.advance(task, len(chunk))
  return written


def main() -> None:
  """The command."""
  sampling = Sampling(
    max_new_tokens=FLAGS.max_new_tokens,
    num_samples=FLAGS.num_samples,
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    min_p=FLAGS.min_p,
  )
  generate(
    FLAGS.model,
    FLAGS.data,
    FLAGS.out,
    sampling,
    seed=FLAGS.seed,
    batch=FLAGS.batch,
    image_folder=FLAGS.image_folder,
  )


if __name__ == '__main__':
  flags.DEFINE_string('model', None, 'Hugging Face directory or hub name.')
  flags.DEFINE_string('data', None, 'Records with a column prompt: .jsonl, .parquet, task:..., ...')
  flags.DEFINE_string('image_folder', '', 'Where images may lie besides the folder of the data.')
  flags.DEFINE_string('out', None, 'The .jsonl to write.')
  flags.DEFINE_float('temperature', 1.0, '0 is greedy.')
  flags.DEFINE_integer('top_k', 0, '0 is off.')
  flags.DEFINE_float('top_p', 1.0, '1 is off.')
  flags.DEFINE_float('min_p', 0.0, '0 is off.')
  flags.DEFINE_integer('max_new_tokens', 256, 'Longest completion, tokens.')
  flags.DEFINE_integer('num_samples', 1, 'Completions a prompt.')
  flags.DEFINE_integer('seed', 0, 'Of the draws.')
  flags.DEFINE_integer('batch', 32, 'Prompts at once.', lower_bound=1)
  flags.mark_flags_as_required(['model', 'data', 'out'])
  cli.run(main)
