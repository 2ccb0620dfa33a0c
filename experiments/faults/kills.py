"""Processes that are killed or told to stop."""

import signal
import time
from collections.abc import Iterator
from signal import SIGABRT, SIGKILL, SIGTERM

from dopd_jax.errors import UserError
from experiments.faults import lab as labs
from experiments.faults.lab import EVERY, STEPS, Lab, Trial

CHAIN = 6  # kills of one run before it may end


def sigkill(lab: Lab, kills: int, done: int = 0) -> Iterator[Trial]:
  """Chains of kills: each run is killed up to `CHAIN` times, goes on, and then ends.

  A third of the moments are uniform over the first 15 seconds, start-up included, a third are up to
  40 ms into a save, and a third some rows after the start. After each the rows and checkpoints on
  the disk are looked at, and after the last of a chain the whole run is compared. `done` kills are
  behind it.
  """
  while done < kills:
    count = min(CHAIN, kills - done)
    workdir = lab.fresh('killed')
    chain = []
    for _ in range(count):
      chain.append(_one_kill(lab, workdir, done))
      done += 1
    ended = lab.run(workdir)
    same = ended.code == 0 and lab.same(workdir)
    for trial in chain:
      seen = f'{trial.seen}; in the end {"equal" if same else "NOT EQUAL"} to the unbroken run'
      yield trial._replace(seen=seen, ok=trial.ok and same)


def _one_kill(lab: Lab, workdir, number: int) -> Trial:
  saves, had = labs.saved(workdir), labs.last_row(workdir)
  kind = ('anywhere', 'in a save', 'between rows')[number % 3]
  process = lab.start(workdir)
  begun = time.monotonic()
  if kind == 'anywhere':
    delay = lab.random.uniform(0, 15)
    process.wait_for(lambda: time.monotonic() - begun > delay)
  else:
    wanted = (saves[-1] if saves else 0) + lab.random.randint(1, 9)
    process.wait_for(lambda: labs.last_row(workdir) >= min(wanted, STEPS - 1))
    if kind == 'in a save':
      process.wait_for(lambda: labs.saving(workdir))
    time.sleep(lab.random.uniform(0, 0.04))
  unfinished = labs.saving(workdir)
  process.signal(SIGKILL)
  ended = process.end()
  after, row = labs.saved(workdir), labs.last_row(workdir)
  # What was saved stays saved, and what is lost is younger than the last save.
  kept = not saves or bool(after and after[-1] >= saves[-1])
  lost = max(row, had) - (after[-1] if after else 0)
  good = kept and lost <= 2 * EVERY and lab.same(workdir, row) and 'Traceback' not in ended.log
  return Trial(
    f'SIGKILL {kind}',
    f'killed after row {row}, newest checkpoint {after[-1] if after else "none"}',
    good,
    {
      'seconds_after_start': round(time.monotonic() - begun, 3),
      'row': row,
      'checkpoints': after,
      'a_save_was_unfinished': unfinished,
      'steps_behind_the_newest_checkpoint': max(lost, 0),
      'ended_before_the_kill': ended.code != -SIGKILL,
    },
  )


def sigterm(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """The run saves the step that it is at, exits with 0, and goes on."""
  for after in (1, 6, 13)[done:]:
    workdir = lab.fresh('terminated')
    process = lab.start(workdir)
    process.wait_for(lambda at=workdir, after=after: labs.last_row(at) >= after)
    process.signal(SIGTERM)
    stopped = process.end()
    row, saves = labs.last_row(workdir), labs.saved(workdir)
    ended = lab.run(workdir)
    same = ended.code == 0 and lab.same(workdir)
    good = stopped.code == 0 and 'Stopped by a signal' in stopped.log and saves[-1:] == [row]
    seen = f'exit {stopped.code}, step {row} done, step {saves[-1] if saves else "none"} saved; '
    seen += 'then equal' if same else 'then NOT EQUAL'
    yield Trial(f'SIGTERM after row {after}', seen, good and same, {'row': row})


def one_of_two(lab: Lab, done: int = 0) -> Iterator[Trial]:
  """A signal to one of two processes: SIGTERM ends both at one step, SIGKILL takes the other down.

  Runs of two processes are compared with an unbroken one of two.
  """
  whole = lab.fresh('unbroken_both')
  codes = [process.end().code for process in lab.start_both(whole)]
  if any(codes):
    raise UserError('the unbroken run of two processes failed')
  for number, who in ((SIGTERM, 0), (SIGTERM, 1), (SIGKILL, 0), (SIGKILL, 1))[done:]:
    workdir = lab.fresh('one_of_two')
    both = lab.start_both(workdir)
    both[0].wait_for(lambda at=workdir: labs.last_row(at) >= 6)
    both[who].signal(number)
    sent = time.monotonic()
    ended = [process.end() for process in both]
    seconds = time.monotonic() - sent
    row, saves = labs.last_row(workdir), labs.saved(workdir)
    if number == SIGKILL:
      # Where process 0 is gone jax may be first to say so, and abort.
      other = ended[1 - who]
      by_jax = other.code == -SIGABRT and 'another task died' in other.log
      good = by_jax or other.told('another process of this run is gone', code=1)
      good &= bool(saves) and row - saves[-1] <= 2 * EVERY
    else:
      good = all(e.code == 0 for e in ended) and saves[-1:] == [row]
    again = [process.end() for process in lab.start_both(workdir)]
    same = all(e.code == 0 for e in again) and labs.rows(workdir) == labs.rows(whole)
    both_codes = ' and '.join(str(e.code) for e in ended)
    seen = (
      f'exit {both_codes} after {seconds:.1f} s, row {row}, step {saves[-1] if saves else "none"} '
    )
    seen += f'saved; then {"equal" if same else "NOT EQUAL"}'
    what = f'{signal.Signals(number).name} to process {who}'
    said = [e.sentence[:300] for e in ended]
    yield Trial(what, seen, good and same, {'row': row, 'seconds': seconds, 'said': said})
