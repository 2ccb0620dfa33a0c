"""Decoders, the vision tower of Qwen3-VL, and Hugging Face weights in and out.

The same letters stand in shapes, einsums and sharding rules:

    B  rows                     D  model width             L  layers
    N  completion position      H  head width              R  regimes
    T  query position           Q  query heads             P  image patches
    S  key position             K  key-value heads         M  rollouts a prompt
    V  vocabulary               G  query heads a key head  F  feed-forward width
    I  images a row             W  width of the tower      C  numbers in a patch

`config` is what a model is, `decoder` its definition and pure functions, `vision` the tower,
`positions` of rows with images, `layers` and `parameters` the arithmetic that both share, `presets`
published sizes, `weights` and `names` Hugging Face directories, `gguf` llama.cpp's files.
"""

from dopd_jax.models.config import DecoderConfig
from dopd_jax.models.decoder import Cache, Model, Params, build, drop_layers
from dopd_jax.models.parameters import held
from dopd_jax.models.positions import vision_positions
from dopd_jax.models.presets import PRESETS
from dopd_jax.models.vision import Features, Images, VisionConfig
from dopd_jax.models.weights import load, resolve, save

__all__ = [
  'PRESETS',
  'Cache',
  'DecoderConfig',
  'Features',
  'Images',
  'Model',
  'Params',
  'VisionConfig',
  'build',
  'drop_layers',
  'held',
  'load',
  'resolve',
  'save',
  'vision_positions',
]
