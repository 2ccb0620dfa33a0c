"""How dopd_jax is installed; tools are set in pyproject.toml, tested versions in constraints."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
ABOUT = (HERE / 'dopd_jax' / '__init__.py').read_text()


def about(name):
  """A constant of the package, read without importing it."""
  return re.search(rf"^{name} = '(.*)'", ABOUT, re.MULTILINE).group(1)


setuptools.setup(
  name='dopd_jax',
  version=about('__version__'),
  description='Dual On-policy Distillation (DOPD) of language models in JAX and Flax',
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  url=about('REPOSITORY'),
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['dopd_jax', 'dopd_jax.*']),
  package_data={'dopd_jax': ['assets/*', 'assets/*/*/*']},
  install_requires=[
    'jax>=0.10.2,<0.13',  # arrays, compilation, sharding
    'flax>=0.12.8',  # module definitions (NNX)
    'optax>=0.2.8',  # AdamW, schedules, clipping
    'orbax-checkpoint>=0.12.8',  # asynchronous checkpoints on any mesh
    'transformers>=5.24',  # tokenizers and chat templates; its models are the reference in tests
    'ml_collections>=1.1',  # configs and their flags
    'tensorflow-datasets>=4.9.10',  # a source of records; TensorFlow itself is never imported
    'absl-py>=2.3',  # flags and logging
    'grain>=0.2.16',  # the seeded, checkpointable pipeline
    'array_record>=0.8.3',  # random access to records on disk
    'safetensors>=0.6',  # weights in and out
    'tokenizers>=0.22',  # tokenizers of the task and of GGUF files
    'huggingface_hub>=1.0',  # models named on the hub
    'tensorboardX>=2.6.4',  # event files without TensorFlow
    'rich>=14',  # progress bar, tables
    'matplotlib>=3.10',  # report.png
    'Jinja2>=3.1',  # samples.html
    'pyarrow>=20',  # parquet
    'msgpack>=1.1',  # records in array_record files
    'numpy>=2.0',
    'scipy>=1.15',  # Wilson intervals, permutation tests
    'Pillow>=10.4',  # images
    'jaxtyping>=0.3',  # shapes in signatures
    'etils[epath]>=1.12',  # paths on disks and buckets alike
  ],
  extras_require={
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'tasks': [
      'reasoning_gym>=0.1.25',  # procedural problems with verifiers
      'scikit-learn>=1.5',  # real handwritten digits for the image task
    ],
    'gguf': ['gguf>=0.17'],  # llama.cpp's files in
    'test': [
      'pytest>=8',
      'pytest-xdist>=3.8',  # two cores, two processes
      'hypothesis>=6.100',
      'torch>=2.9',  # with transformers, the reference that weights and logits are held against
      'reasoning_gym>=0.1.25',
      'scikit-learn>=1.5',
      'gguf>=0.17',
      'tensorboard>=2.19',  # reads the event files back
      'nbclient>=0.10',  # runs the notebooks of colab/
      'nbformat>=5.10',
      'ipykernel>=6.29',
    ],
    'dev': ['ruff>=0.12', 'pyrefly>=1.0'],
  },
  classifiers=[
    'License :: OSI Approved :: Apache Software License',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
