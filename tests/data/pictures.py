"""Pictures, image files and a tokenizer of images for the tests of the data."""

import io

import numpy as np
from PIL import Image

from dopd_jax.data import ImageInputs, ImageProcessor, Renderer
from dopd_jax.tasks.words import IMAGE_TOKEN, word_tokenizer

# One token for 8 x 8 pixels: small pictures, short prompts.
PROCESSOR = ImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
WORDS = ('what', 'is', 'this', 'and', 'dog', 'cat', '<image>', *'0123456789')


def picture(width=16, height=16, seed=0, mode='RGB'):
  """A picture in which no two places are alike."""
  channels = {'RGB': (3,), 'RGBA': (4,), 'L': ()}[mode]
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
  return Image.fromarray(pixels)


def encoded(image, format='PNG', **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def png(width=16, height=16, seed=0):
  return encoded(picture(width, height, seed))


def tokenizer():
  return word_tokenizer(WORDS, images=True)


def image_inputs(**options):
  return ImageInputs(PROCESSOR, tokenizer().convert_tokens_to_ids(IMAGE_TOKEN), **options)


def renderer(**options):
  return Renderer(tokenizer(), images=image_inputs(**options))
