"""Accuracy on held-out prompts: greedy completions of the plain prompt, judged by verifiers."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from dopd_jax import collate, models, report, sharding, sight, tasks
from dopd_jax.data import Example
from dopd_jax.models import Model
from dopd_jax.policies import Pair
from dopd_jax.rollout import Sampling, make_sampler


def rewards(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
  """What each record's verifier says of its completion, in [0, 1]; NaN without a verifier."""
  return np.array(
    [
      tasks.verify(e.record, text) if e.record.verifier else np.nan
      for e, text in zip(examples, texts)
    ],
    np.float64,
  )


def own_rewards(
  tokenizer: Any, examples: Sequence[Example], tokens: Any, mask: Any, mesh: jax.sharding.Mesh
) -> tuple[np.ndarray, list[str], np.ndarray]:
  """Judges the completions that this process holds: which rows these are, their texts and rewards.

  Args:
    tokenizer: reads the completions.
    examples: at most B, one a row; rows past them are left out.
    tokens: [B, N], global.
    mask: [B, N], global.
    mesh: where rows lie.
  """
  own = sharding.own_rows(mesh, len(mask))
  own = own[own < len(examples)]
  texts = decode(tokenizer, *(x[: len(own)] for x in collate.mine((tokens, mask), mesh)))
  return own, texts, rewards([examples[row] for row in own], texts)


def whole(values: np.ndarray, own: np.ndarray, count: int, mesh: jax.sharding.Mesh) -> np.ndarray:
  """[count] from what each process knows of its `own` rows; NaN where nobody does."""
  result = np.full(count, np.nan)
  result[own] = values
  if jax.process_count() == 1:
    return result
  return collate.fetch(collate.put(result.astype(np.float32), mesh)).astype(np.float64)


def decode(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
  """The text of each completion, without special tokens."""
  return [
    tokenizer.decode(row[keep].tolist(), skip_special_tokens=True)
    for row, keep in zip(tokens, mask)
  ]


def make_generate(
  model: Model, sampling: Sampling, pair: Pair, gather: bool = False
) -> Callable[..., Any]:
  """The native sampler of one of a pair's models, jitted.

  Its arguments are (params, Prompt, key, record_index, images=None), and it returns a Rollout.
  With `gather` the weights are brought together over `fsdp` before the first token, in the compute
  dtype; else every token gathers them anew, layer by layer.
  """
  sample = make_sampler(
    model,
    sampling,
    stop_ids=pair.stop_ids,
    pad_id=pair.pad_id,
    live_vocab=len(pair.tokenizer),
    banned_ids=pair.banned_ids,
  )

  def generate(params, prompt, key, record_index, images=None):
    valid = np.arange(prompt.tokens.shape[1])[None, :] < prompt.length[:, None]
    if gather:
      params = sharding.gather(models.held(params, model.compute_dtype))
    seen = {}
    if images is not None:
      assert model.see is not None, 'images are for a model that sees'
      seen = {'positions': prompt.positions, 'features': model.see(params, images)}
    return sample(params, prompt.tokens, valid, key, record_index, **seen)

  return jax.jit(generate)


@dataclasses.dataclass
class Judge:
  """Measures accuracy, `rows` prompts at a time.

  Args:
    examples: held-out records, each with a verifier.
    pair: whose tokenizer and image processor make the prompts.
    mesh: where rows lie.
    rows: prompts a batch, a multiple of the row shards.
    bucket: tokens; prompts are padded to a multiple.
    seed: of the draws, where the temperature is above 0.
  """

  examples: Sequence[Example]
  pair: Pair
  mesh: jax.sharding.Mesh
  rows: int
  bucket: int
  seed: int = 0

  def accuracy(
    self, name: str, generate: Any, params: Any, progress: Progress, part: str = ''
  ) -> tuple[dict[str, float], np.ndarray]:
    """`{name}`, `{name}_low`, `{name}_high` (95 % Wilson), and seconds; {} for no data.

    Of one `part` of several, '/part' stands behind each name. With them what the verifier says of
    each record, [n].
    """
    if not self.examples:
      return {}, np.zeros(0)
    start, found = time.monotonic(), []
    part = f'/{part}' if part else ''
    task = progress.add_task(f'{name}{part}', total=len(self.examples), rate='')
    key = jax.random.key(self.seed)
    for i in range(0, len(self.examples), self.rows):
      chunk = self.examples[i : i + self.rows]
      pad_id, seen = self.pair.pad_id, self.pair.sight
      prompts = collate.prompts(chunk, ['plain'], self.bucket, pad_id, self.rows, seen)
      images = (sight.images(chunk, ['full'], seen, self.mesh, self.rows) or {}).get('full')
      index = np.resize(np.array([e.index for e in chunk], np.uint32), self.rows)
      prompt, index, images = collate.put((prompts['plain'], index, images), self.mesh)
      out = generate(params, prompt, key, index, images)
      own, _, judged = own_rewards(self.pair.tokenizer, chunk, out.tokens, out.mask, self.mesh)
      found.append(whole(judged, own, self.rows, self.mesh)[: len(chunk)])
      progress.advance(task, len(chunk))
    progress.remove_task(task)
    judged = np.concatenate(found)
    right, n = float(judged.sum()), len(judged)
    low, high = report.wilson_interval(round(right), n)
    seconds = time.monotonic() - start
    values = {
      f'{name}{part}': right / n,
      f'{name}_low{part}': low,
      f'{name}_high{part}': high,
      f'time/{name.split("/")[-1]}_seconds{part}': seconds,
    }
    return values, judged


def rows_at_once(wanted: int, mesh: jax.sharding.Mesh) -> int:
  """`wanted` rounded up to a multiple of the shards that rows are split into."""
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  return -(-wanted // shards) * shards
