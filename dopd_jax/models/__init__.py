"""Decoders, and Hugging Face weights in and out.

The same letters stand in shapes, einsums and sharding rules:

    B  rows                     D  model width             L  layers
    N  completion position      H  head width              R  regimes
    T  query position           Q  query heads             P  image patches
    S  key position             K  key-value heads         M  rollouts a prompt
    V  vocabulary               G  query heads a key head  F  feed-forward width

`config` is what a decoder is, `decoder` its definition and pure functions, `layers` the arithmetic,
`presets` published sizes, `weights` Hugging Face directories, `gguf` llama.cpp's files.
"""

from dopd_jax.models.config import DecoderConfig
from dopd_jax.models.decoder import Cache, Model, Params, build, drop_layers
from dopd_jax.models.presets import PRESETS
from dopd_jax.models.weights import load, resolve, save

__all__ = [
  'PRESETS',
  'Cache',
  'DecoderConfig',
  'Model',
  'Params',
  'build',
  'drop_layers',
  'load',
  'resolve',
  'save',
]
