r"""Writes the trained student of a run as a Hugging Face directory with its tokenizer.

python -m dopd_jax.export --workdir=runs/quickstart --out=student
"""

import os

from absl import flags, logging

from dopd_jax import checkpoint, cli, models, policies, sharding, workdirs
from dopd_jax import state as states
from dopd_jax.errors import UserError

FLAGS = flags.FLAGS


def export(workdir: str, out: str, which: str = 'last') -> int:
  """Writes the student to `out`, which must not exist; returns the step that it is of.

  Args:
    workdir: of a run with a checkpoint.
    out: directory to make.
    which: 'last', 'best', or the number of a saved step.

  Raises:
    UserError: no run, no such checkpoint, or `out` exists.
  """
  config = workdirs.read_config(workdir)
  if os.path.exists(out):
    raise UserError(f'{out} exists: choose another --out, or remove it first')
  saves = checkpoint.Checkpoints(
    os.path.join(workdir, 'checkpoints'),
    config.checkpoint.keep,
    config.checkpoint.best,
    config.checkpoint.lower_is_better,
  )
  if not saves.steps():
    raise UserError(f'{workdir} has no finished checkpoint: let the run reach its first save')
  named = {'last': saves.newest()} if which == 'last' else {'best': saves.best_step()}
  steps = saves.steps()
  step = named[which] if which in named else int(which) if which.isdigit() else None
  if step not in steps:
    raise UserError(f'--step={which} is none of last, best or the saved steps {steps}')
  mesh = sharding.make_mesh(1, -1, 1)  # whatever devices are here: Orbax reads onto any mesh
  pair = policies.load_pair(config, mesh)
  objective = config.objective.build()
  tx = states.optimizer(config.optimizer, config.steps, objective.updates, config.freeze)
  like = states.place(states.create(pair.student.params, tx, objective), mesh)
  state, _ = saves.restore(step, states.abstract(like))
  models.save(out, pair.student.model.config, state.params, tokenizer=pair.tokenizer)
  if pair.sight:
    pair.sight.inputs.processor.save(out)
  logging.info('Wrote step %d of %s to %s', step, workdir, out)
  return step


def main() -> None:
  """The command."""
  export(FLAGS.workdir, FLAGS.out, FLAGS.step)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'The run to export from.')
  flags.DEFINE_string('out', None, 'The directory to write.')
  flags.DEFINE_string('step', 'last', 'last, best, or a saved step.')
  flags.mark_flags_as_required(['workdir', 'out'])
  cli.run(main)
