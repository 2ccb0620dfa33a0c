"""Records, where they come from, how they become token ids, and in which order they are trained on.

records   one example as its columns, strictly parsed
sources   JSONL, parquet, array_record, tensorflow-datasets, and loaders that the caller adds
chat      the plain and the privileged rendering of a prompt, by the student's chat template
pipeline  shuffled, staged, sharded batches that resume exactly; padding
"""

from dopd_jax.data.chat import DEFAULT_TEMPLATE as DEFAULT_TEMPLATE
from dopd_jax.data.chat import Renderer as Renderer
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
