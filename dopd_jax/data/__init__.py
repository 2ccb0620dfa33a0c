"""Records, where they come from, how they become token ids, and in which order they are trained on.

records          one example as its columns, strictly parsed
sources          JSONL, parquet, array_record, tensorflow-datasets, and loaders that the caller adds
images           reading an image whatever it comes as
image_processor  cutting it into patches
boxes            boxes and labels: checks, units, and the privileged context made of them
image_inputs     what is known of a record's images before any step
chat             the plain and the privileged rendering of a prompt, by the student's chat template
pipeline         shuffled, staged, sharded batches that resume exactly; padding
views            the full image, its evidence or too little of it, as patches; padding
"""

from dopd_jax.data.boxes import KINDS as KINDS
from dopd_jax.data.boxes import privileged_text as privileged_text
from dopd_jax.data.chat import DEFAULT_TEMPLATE as DEFAULT_TEMPLATE
from dopd_jax.data.chat import Renderer as Renderer
from dopd_jax.data.image_inputs import ImageInputs as ImageInputs
from dopd_jax.data.image_processor import ImageProcessor as ImageProcessor
from dopd_jax.data.images import read_image as read_image
from dopd_jax.data.pipeline import Dropped as Dropped
from dopd_jax.data.pipeline import Example as Example
from dopd_jax.data.pipeline import Pipeline as Pipeline
from dopd_jax.data.pipeline import Tokenised as Tokenised
from dopd_jax.data.pipeline import make_pipeline as make_pipeline
from dopd_jax.data.pipeline import pad_batch as pad_batch
from dopd_jax.data.pipeline import tokenise as tokenise
from dopd_jax.data.records import Record as Record
from dopd_jax.data.records import parse_record as parse_record
from dopd_jax.data.sources import open_source as open_source
from dopd_jax.data.sources import write_array_record as write_array_record
from dopd_jax.data.views import crop as crop
from dopd_jax.data.views import degraded as degraded
from dopd_jax.data.views import draw_boxes as draw_boxes
from dopd_jax.data.views import example_images as example_images
from dopd_jax.data.views import image_buckets as image_buckets
from dopd_jax.data.views import pad_images as pad_images
from dopd_jax.data.views import view_grids as view_grids
