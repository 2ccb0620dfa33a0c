r"""Supervised fine-tuning on the completions of the data: the main job with a fixed rollout.

python -m dopd_jax.sft --config=configs/quickstart_sft.py:model=teacher --workdir=runs/teacher
"""

from absl import flags
from ml_collections import config_flags

from dopd_jax import cli, train
from dopd_jax.errors import UserError

FLAGS = flags.FLAGS


def main() -> None:
  """The command."""
  config = cli.config_of(_CONFIG)
  if config.objective.name != 'sft':
    raise UserError(
      f'this config trains with {config.objective.name}, not on completions: run it with '
      'python -m dopd_jax.train'
    )
  train.train(config, FLAGS.workdir)


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', None, 'What to run.')
  flags.DEFINE_string('workdir', 'runs/sft', 'Where the run lives; it goes on from there.')
  cli.run(main, several=True)
