"""How the policies of a run see: their common image processor, and images as arrays of a batch."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dopd_jax import models, sharding
from dopd_jax.data import (
  Example,
  ImageInputs,
  Renderer,
  example_images,
  image_buckets,
  pad_images,
  view_grids,
)
from dopd_jax.errors import UserError
from dopd_jax.objectives import Objective


class Sight(NamedTuple):
  """What turns the images of records into what every policy of a run reads."""

  inputs: ImageInputs
  config: models.DecoderConfig  # of the student: where placeholders stand and how positions count
  bucket: int  # patches: an image is padded to a multiple

  @property
  def banned_ids(self) -> tuple[int, ...]:
    """Ids that no completion may hold: they would ask for features that are not there."""
    c = self.config
    found = (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id)
    return tuple(i for i in found if i is not None)


def check(objective: Objective, sight: Sight | None) -> None:
  """Raises `UserError` if the objective looks at images and the policies can't see."""
  special = sorted(objective.images - {'full'})
  if special and sight is None:
    raise UserError(
      f'{objective.name} looks at the {" and ".join(special)} image of a record, and these models '
      'read text alone: choose a pair that reads images, or another objective'
    )


def ids(
  examples: Sequence[Example], name: str, sight: Sight | None, renderer: Renderer | None
) -> list[list[int]]:
  """The prompts of a rendering `context`, or `context+image` where the image is not the full one.

  Only a crop has other ids than the full image: it is another number of features.
  """
  context, _, image = name.partition('+')
  if image == 'crop':
    assert sight is not None and renderer is not None
    grids = [view_grids(e, sight.inputs.processor, image) for e in examples]
    render = renderer.plain_batch if context == 'plain' else renderer.privileged_batch
    return render([e.record for e in examples], grids=grids)
  return [e.prompt_ids if context == 'plain' else e.privileged_ids for e in examples]


def positions(
  examples: Sequence[Example], name: str, tokens: Any, valid: Any, sight: Sight | None
) -> Any:
  """Rotary positions [b, P, 3] int32 of padded prompts; None where no record has an image."""
  if sight is None or not any(e.images for e in examples):
    return None
  view = name.partition('+')[2] or 'full'
  grids = [view_grids(e, sight.inputs.processor, view) for e in examples]
  I, _ = image_buckets(grids, sight.bucket)
  grid = np.zeros((len(tokens), I, 3), np.int32)
  for row, shapes in enumerate(grids):
    grid[row, : len(shapes)] = np.array(shapes, np.int32).reshape(-1, 3)
  return models.vision_positions(tokens, valid, grid, sight.config)


def images(
  examples: Sequence[Example],
  views: Collection[str],
  sight: Sight | None,
  mesh: jax.sharding.Mesh,
  fill: int = 0,
) -> dict[str, Any] | None:
  """`models.Images` [b, ...] on the host, by view; None where no record has an image.

  Rows past the examples, up to `fill`, show nothing; nor do those that other processes hold, whose
  images are not read.
  """
  if sight is None or not any(e.images for e in examples):
    return None
  found, processor = {}, sight.inputs.processor
  count = max(fill, len(examples))
  own = [row for row in sharding.own_rows(mesh, count) if row < len(examples)]
  for view in sorted(views):
    rows: list[Any] = [([], [])] * count
    for row in own:
      rows[row] = example_images(examples[row], processor, view)
    I, P = image_buckets([view_grids(e, processor, view) for e in examples], sight.bucket)
    arrays: Any = pad_images(rows, I, P, processor.channels)  # they become arrays in `collate.put`
    found[view] = models.Images(*arrays)
  return found
