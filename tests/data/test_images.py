"""Every image is read as people see it or refused in a sentence; sizes tell patches."""

import base64
import json
import pathlib
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dopd_jax.data import ImageProcessor, read_image
from dopd_jax.data.images import PIXEL_LIMIT, image_digest, image_size
from dopd_jax.errors import UserError
from tests.data.pictures import PROCESSOR, encoded, picture, png

QWEN3_VL = ImageProcessor()


def same(image, other):
  assert image.mode == 'RGB' and image.size == other.size
  np.testing.assert_array_equal(np.asarray(image), np.asarray(other))


def exif(orientation):
  tags = Image.Exif()
  tags[0x0112] = orientation
  return tags


# What may be read


def test_every_kind_of_source_is_the_same_image(tmp_path):
  wanted = picture(20, 12)
  data = encoded(wanted)
  path = tmp_path / 'a.png'
  path.write_bytes(data)
  uri = 'data:image/png;base64,' + base64.b64encode(data).decode()
  lines = uri[:40] + '\n' + uri[40:]
  for source in (
    str(path),
    path,
    data,
    uri,
    lines,
    wanted,
    np.asarray(wanted),
    {'bytes': data, 'path': 'not looked at'},
    {'bytes': None, 'path': str(path)},
  ):
    same(read_image(source), wanted)
    assert image_size(source) == (20, 12)


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'TIFF', 'WEBP', 'MPO'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_applied_once_and_known_from_the_head(format, orientation):
  image = Image.new('RGB', (32, 16), 'black')
  image.paste('white', (0, 0, 8, 8))
  data = encoded(image, format, exif=exif(orientation))
  read = read_image(data)
  # Where the white corner of the stored picture is seen, by the definition of the orientations.
  corner = {1: 'TL', 2: 'TR', 3: 'BR', 4: 'BL', 5: 'TL', 6: 'TR', 7: 'BR', 8: 'BL'}[orientation]
  assert read.size == ((32, 16) if orientation < 5 else (16, 32)) == image_size(data)
  x = 2 if 'L' in corner else read.width - 3
  y = 2 if 'T' in corner else read.height - 3
  assert read.getpixel((x, y))[0] > 128
  assert np.asarray(read)[..., 0].mean() == pytest.approx(255 / 8, abs=8)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_a_damaged_exif_block_is_no_orientation():
  data = encoded(picture(24, 16), 'JPEG', exif=b'Exif\x00\x00MM\x00*\xff\xff\xff\xff')
  assert read_image(data).size == image_size(data) == (24, 16)


def test_a_pil_image_is_left_as_it_is_and_turned_in_the_copy():
  image = picture(20, 10)
  image.getexif()[0x0112] = 6
  before = image.tobytes()
  assert read_image(image).size == image_size(image) == (10, 20)
  assert image.size == (20, 10) and image.tobytes() == before
  plain = picture(5, 5)
  read_image(plain).putpixel((0, 0), (1, 2, 3))
  same(plain, picture(5, 5))


def test_modes_become_rgb():
  grey = picture(8, 8, mode='L')
  same(read_image(grey), Image.merge('RGB', [grey] * 3))
  same(read_image(np.asarray(grey)[..., None]), Image.merge('RGB', [grey] * 3))
  palette = picture(8, 8).quantize(16)
  same(read_image(encoded(palette)), palette.convert('RGB'))
  bits = grey.convert('1')
  same(read_image(encoded(bits)), bits.convert('RGB'))
  cmyk = picture(16, 16).convert('CMYK')
  same(read_image(encoded(cmyk, 'TIFF')), cmyk.convert('RGB'))
  jpeg = np.asarray(read_image(encoded(Image.new('CMYK', (16, 16), (0, 255, 255, 0)), 'JPEG')))
  assert (jpeg[..., 0] > 200).all() and (jpeg[..., 1:] < 60).all()  # red


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA', 'P', 'RGB', 'L', '1'])
def test_what_is_transparent_is_white(mode):
  if mode in ('RGBA', 'LA', 'PA'):
    image = Image.new('RGBA', (8, 8), (0, 0, 0, 255)).convert(mode)
    image.paste(Image.new('RGBA', (4, 8), (0, 0, 0, 0)).convert(mode), (0, 0))
    source = image
  else:
    image = Image.new(mode, (8, 8), 0 if mode != 'RGB' else (9, 9, 9))
    image.paste({'P': 1, 'RGB': (250, 5, 5), 'L': 77, '1': 1}[mode], (0, 0, 4, 8))
    if mode == 'P':
      image.putpalette([0, 0, 0, 200, 10, 10])
    key = {'P': 1, 'RGB': (250, 5, 5), 'L': 77, '1': 1}[mode]
    source = encoded(image, transparency=key)
  pixels = np.asarray(read_image(source))
  assert (pixels[:, :4] == 255).all()
  assert (pixels[:, 4:] < 10).all()


def test_half_transparent_is_half_white():
  pixels = np.asarray(read_image(Image.new('RGBA', (4, 4), (0, 0, 0, 128))))
  assert abs(int(pixels[0, 0, 0]) - 127) <= 1


def test_sixteen_bits_are_scaled_not_cut():
  values = np.array([[0, 257, 32768, 65535]], np.uint16).repeat(4, 0)
  wanted = [0, 1, 128, 255]
  for source in (
    encoded(Image.fromarray(values)),
    encoded(Image.fromarray(values), 'TIFF'),
    Image.fromarray(values.astype(np.int32)),
    values,
  ):
    pixels = np.asarray(read_image(source))
    assert pixels[0, :, 0].tolist() == pixels[3, :, 2].tolist() == wanted


@pytest.mark.parametrize('format', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_the_first_frame_counts(format):
  frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue', 'lime')]
  options = {'lossless': True} if format == 'WEBP' else {}
  data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
  assert read_image(data).getpixel((4, 4)) == (255, 0, 0)


# What may not


def cut(data, share):
  return data[: int(len(data) * share)]


NOISE = picture(64, 64)
BAD = {
  'nothing': (b'', 'empty'),
  'text': (b'hello, world', 'broken'),
  'half a PNG': (cut(encoded(NOISE), 0.5), 'broken, cut short'),
  'half a JPEG': (cut(encoded(NOISE, 'JPEG'), 0.5), 'broken, cut short'),
  'half a GIF': (cut(encoded(NOISE, 'GIF'), 0.5), 'broken, cut short'),
  'half a WEBP': (cut(encoded(NOISE, 'WEBP'), 0.5), 'broken, cut short'),
  'half a TIFF': (cut(encoded(NOISE, 'TIFF'), 0.5), 'broken, cut short'),
  'a head only': (encoded(NOISE)[:40], 'broken, cut short'),
  'an SVG': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'unknown format'),
  'an EPS': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n', 'unknown format'),
  'no width': (Image.new('RGB', (0, 5)), 'no pixels, 0 x 5'),
  'no rows': (np.zeros((0, 4, 3), np.uint8), 'no pixels'),
  'a line': (picture(2001, 10), '200 times'),
  'a column': (png(1, 201), '200 times'),
  'floats': (np.zeros((4, 4, 3), np.float32), 'float32'),
  'two channels': (np.zeros((4, 4, 2), np.uint8), r'\[4, 4, 2\]'),
  'float TIFF': (encoded(Image.new('F', (4, 4)), 'TIFF'), 'floating-point'),
  'web': ('https://example.org/a.png', 'download it first'),
  'bucket': ('s3://bucket/a.png', 'download it first'),
  'web in a mapping': ({'bytes': None, 'path': 'http://example.org/a.png'}, 'download it first'),
  'nowhere': ('no/such/file.png', "'no/such/file.png' cannot be opened"),
  'a directory': (str(pathlib.Path(__file__).parent), 'broken|cannot be opened'),
  'an odd name': ('a\0b', 'cannot be opened'),
  'a very long name': ('a' * 5000, 'cannot be opened'),
  'no mapping': ({'url': 'x'}, 'neither bytes nor a path'),
  'no base64': ('data:image/png,abc', 'not base64'),
  'broken base64': ('data:image/png;base64,abc$', 'broken'),
  'empty base64': ('data:image/png;base64,', 'empty'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_a_bad_image_is_one_sentence_with_its_record(name):
  source, words = BAD[name]
  with pytest.raises(UserError, match=words) as error:
    read_image(source, 'Record r7')
  message = str(error.value)
  assert message.startswith('Record r7: ') and '\n' not in message
  assert len(message) < 400


def test_an_empty_file_is_said_to_be_empty(tmp_path):
  path = tmp_path / 'a.png'
  path.write_bytes(b'')
  with pytest.raises(UserError, match=r'^Record r7: the image .*a.png. is empty, 0 bytes; '):
    read_image(str(path), 'Record r7')


def test_bombs_are_refused_before_they_are_decoded():
  with pytest.raises(UserError, match='64 x 64 pixels is over the limit of 4095'):
    read_image(NOISE, pixel_limit=4095)
  read_image(NOISE, pixel_limit=4096)
  bomb = bytearray(encoded(Image.new('1', (8, 8))))
  bomb[16:24] = (60000).to_bytes(4, 'big') * 2
  bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, 'big')
  with pytest.raises(UserError, match='pixels'):
    read_image(bytes(bomb))
  assert Image.MAX_IMAGE_PIXELS > PIXEL_LIMIT  # Pillow does not warn before we refuse


@pytest.mark.filterwarnings('ignore::UserWarning')
@given(st.binary(max_size=200), st.sampled_from(['PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP']))
@settings(max_examples=150, deadline=None)
def test_noise_never_crashes(noise, format):
  data = bytearray(encoded(picture(9, 9), format))
  start = 4 + len(noise) % 40
  for source in (noise, bytes(data[:start]) + noise, bytes(data[:-20]) + noise):
    try:
      assert read_image(source).mode == 'RGB'
    except UserError as error:
      assert '\n' not in str(error)


# Patches


def test_a_digest_tells_one_pixel():
  image = picture(8, 8)
  other = image.copy()
  other.putpixel((3, 3), (0, 0, 0))
  for kind in (lambda i: i, np.asarray, encoded):
    assert image_digest(kind(image)) == image_digest(kind(image.copy()))
    assert image_digest(kind(image)) != image_digest(kind(other))
  assert image_digest(np.zeros((2, 8), np.uint8)) != image_digest(np.zeros((8, 2), np.uint8))


def test_published_sizes():
  # With the patch of 16 and the merge of 2 of Qwen3-VL; 14 would give 121.
  assert QWEN3_VL.grid((320, 320)) == (1, 20, 20)
  assert QWEN3_VL.tokens((1, 20, 20)) == 100
  assert QWEN3_VL.factor == 32 and QWEN3_VL.channels == 3 * 2 * 16 * 16
  assert QWEN3_VL.grid((1, 1)) == (1, 16, 16)  # enlarged to the least number of pixels
  assert PROCESSOR.grid((32, 24)) == (1, 6, 8)  # height before width


SIZES = [(w, h) for w in (1, 2, 3, 5, 31, 32, 33, 47, 48, 64, 199) for h in (1, 3, 16, 40, 95, 200)]
SIZES = [size for size in SIZES if max(size) <= 200 * min(size)]
PROCESSORS = [
  PROCESSOR,
  ImageProcessor(patch_size=16, merge_size=2, min_pixels=1024, max_pixels=16384),
  ImageProcessor(patch_size=14, merge_size=2, min_pixels=3136, max_pixels=50176),
  ImageProcessor(patch_size=2, merge_size=1, temporal_patch_size=1, min_pixels=1, max_pixels=400),
]


@pytest.mark.parametrize('processor', PROCESSORS, ids=['4x2', '16x2', '14x2', '2x1'])
def test_the_size_alone_tells_the_patches(processor):
  for size in SIZES:
    patches = processor.patches(Image.new('RGB', size))
    assert patches.dtype == np.float32
    grid = processor.grid(size)
    assert patches.shape == (np.prod(grid), processor.channels), size
    assert grid[1] % processor.merge_size == grid[2] % processor.merge_size == 0
    assert processor.tokens(grid) * processor.merge_size**2 == len(patches)


@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from(PROCESSORS))
@settings(max_examples=60, deadline=None)
def test_the_size_alone_tells_the_patches_of_any_size(width, height, processor):
  if max(width, height) > 200 * min(width, height):
    with pytest.raises(UserError, match='200 times'):
      processor.grid((width, height))
    return
  patches = processor.patches(Image.new('RGB', (width, height)))
  assert len(patches) == np.prod(processor.grid((width, height)))


def test_patches_are_those_of_transformers_and_of_a_plain_loop():
  wrapped = Qwen2VLImageProcessorPil(
    patch_size=4,
    merge_size=2,
    size={'shortest_edge': 64, 'longest_edge': 4096},
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
  )
  image = picture(37, 90)
  theirs = wrapped.preprocess([image], return_tensors='np')
  np.testing.assert_array_equal(PROCESSOR.patches(image), theirs['pixel_values'])
  # No resizing here, so the order of the patches can be told by hand.
  image = picture(24, 16)
  pixels = np.asarray(image, np.float32) / 127.5 - 1
  wanted = [
    np.repeat(pixels[y : y + 4, x : x + 4].transpose(2, 0, 1)[:, None], 2, 1).ravel()
    for block_y in range(0, 16, 8)
    for block_x in range(0, 24, 8)
    for y in (block_y, block_y + 4)
    for x in (block_x, block_x + 4)
  ]
  np.testing.assert_allclose(PROCESSOR.patches(image), wanted, atol=1e-6)


def test_one_resize_only():
  image = picture(50, 35)
  height, width = (side * 4 for side in PROCESSOR.grid(image.size)[1:])
  once = image.resize((width, height), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(PROCESSOR.patches(image), PROCESSOR.patches(once))


def test_a_processor_is_read_back_from_its_directory(tmp_path):
  PROCESSOR.save(str(tmp_path))
  read = ImageProcessor.from_directory(str(tmp_path))
  image = picture(37, 90)
  assert read.grid(image.size) == PROCESSOR.grid(image.size)
  np.testing.assert_array_equal(read.patches(image), PROCESSOR.patches(image))
  small = ImageProcessor.from_directory(str(tmp_path), max_pixels=256)
  assert np.prod(small.grid((64, 64))) == 16 == len(small.patches(picture(64, 64)))
  # The file as Qwen3-VL has it, and the newer one with everything in it.
  published = {
    'size': {'longest_edge': 16777216, 'shortest_edge': 65536},
    'patch_size': 16,
    'temporal_patch_size': 2,
    'merge_size': 2,
    'image_mean': [0.5, 0.5, 0.5],
    'image_std': [0.5, 0.5, 0.5],
    'processor_class': 'Qwen3VLProcessor',
    'image_processor_type': 'Qwen2VLImageProcessorFast',
  }
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(published))
  image = picture(320, 320)
  wanted = QWEN3_VL.patches(image)
  np.testing.assert_array_equal(ImageProcessor.from_directory(str(tmp_path)).patches(image), wanted)
  (tmp_path / 'preprocessor_config.json').unlink()
  (tmp_path / 'processor_config.json').write_text(json.dumps({'image_processor': published}))
  np.testing.assert_array_equal(ImageProcessor.from_directory(str(tmp_path)).patches(image), wanted)


@pytest.mark.parametrize(
  'config, words',
  [
    (None, 'no preprocessor_config.json'),
    ('{', 'cannot be read'),
    ('{"size": {"height": 224, "width": 224}}', 'another family'),
    ('{"size": {"shortest_edge": 224}}', 'another family'),
    ('{"do_resize": false}', 'do_resize'),
  ],
)
def test_a_directory_that_does_not_fit(tmp_path, config, words):
  if config is not None:
    (tmp_path / 'preprocessor_config.json').write_text(config)
  with pytest.raises(UserError, match=words) as error:
    ImageProcessor.from_directory(str(tmp_path))
  assert '\n' not in str(error.value)


def test_impossible_processors():
  for options in (
    {'min_pixels': 0},
    {'max_pixels': 1023},
    {'patch_size': 0},
    {'min_pixels': 5000, 'max_pixels': 4096},
  ):
    with pytest.raises(UserError, match='image processor needs'):
      ImageProcessor(**options)


def test_images_need_no_torch():
  script = """
import sys
sys.modules['torch'] = sys.modules['torchvision'] = None
import numpy as np
from dopd_jax.data import ImageProcessor, read_image
patches = ImageProcessor().patches(read_image(np.zeros((40, 70, 3), np.uint8)))
assert patches.shape[1] == 1536 and patches.dtype == np.float32
"""
  subprocess.run([sys.executable, '-c', script], check=True, capture_output=True)
