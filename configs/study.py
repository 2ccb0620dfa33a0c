r"""The text study: plan-execute with hints that tell what cannot be inferred; a student a seed.

  python -m experiments.run text --jobs=2                             # makes the models as well
  python -m dopd_jax.train --config=configs/study.py:smoke --workdir=runs/smoke

Device: 2 CPU cores, half a minute. `rho` is the share of problems in which two chains lead to the
query and the hint tells which one the reference takes: log 2 nats that the student never gets.
With task=chain_sum the problems are reasoning_gym's, and the hint tells nothing that is not in the
problem. `configs/study_sft.py` made the models; a smoke run of plan-execute takes the pair of the
quickstart instead.
"""

from dopd_jax import config
from dopd_jax.errors import UserError

MODELS = 'runs/experiments/models'
PACKAGE = 'package:dopd_jax/assets/quickstart'
CHAIN_SUM = 'task:chain_sum?min_terms=4&max_terms=4&min_digits=1&max_digits=1&verifier=exact'


def get_config(arg=''):
  a = config.parse_arg(
    arg,
    smoke=False,
    task='plan_execute',
    method='dopd',
    seed=0,
    rho=0.5,
    hint='steps',
    student='student',
    teacher='teacher',
    size=0,
    models=MODELS,
    staged=False,
    tuning=False,
  )
  c = config.default(a.method)
  c.seed = a.seed
  if a.task not in ('plan_execute', 'chain_sum') or (a.staged and a.task != 'plan_execute'):
    raise UserError('task must be plan_execute, or chain_sum without staged')
  chain_sum = a.task == 'chain_sum'
  packaged = a.smoke and not chain_sum
  c.student.path = f'{PACKAGE}/student' if packaged else f'{a.models}/{a.student}_{a.seed}'
  c.teacher.path = f'{PACKAGE}/teacher' if packaged else f'{a.models}/{a.teacher}'
  few = lambda size: 64 if a.smoke else size
  world = f'task:plan_execute?letters=6&modulus=7&rho={a.rho}&hint={a.hint}'
  task = f'{CHAIN_SUM}&hint={a.hint}' if chain_sum else f'{world}&steps=2&definitions=4'
  c.data.train = f'{task}&size={few(5000)}&seed={1000 + a.seed}'
  c.data.eval = f'{task}&size={few(a.size or 2000)}&seed=8&split=test'
  # Out of distribution: nobody has seen three steps.
  longer = f'{world}&steps=3&definitions=6&size={few(500)}&seed=8&split=test'
  c.data.evals = () if chain_sum else (('longer', longer),)
  if a.staged:  # one subject after the other, each measured at every look
    subjects = (('plus', '+'), ('minus', '-'), ('times', '*'))
    c.data.train = ''
    c.data.stages = tuple(
      (f'{task}&ops={op}&size={few(2000)}&seed={1000 + a.seed}', 1 if a.smoke else 50)
      for _, op in subjects
    )
    c.data.evals += tuple(
      (name, f'{task}&ops={op}&size={few(1000)}&seed=8&split=test') for name, op in subjects
    )
  c.data.max_prompt_tokens = 64
  c.data.prompt_bucket = 16
  c.rollout.prompts = 32
  c.rollout.samples = 4
  c.rollout.max_new_tokens = 24 if chain_sum else 8
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 10
  c.microbatch = 128
  c.steps = 150 if not a.smoke else 3 if a.staged else 2
  c.evaluation.every = 25
  c.checkpoint.every = 75
  c.log.every = 10
  if a.tuning:  # a learning rate is chosen: the test split does not take part
    c.data.eval = f'{task}&size={few(a.size or 1000)}&seed=77&split=train'
    c.data.evals = ()
    c.evaluation.every = 0
    c.evaluation.teacher = False
  if a.smoke:
    c.optimizer.warmup_steps = 0
    c.rollout.prompts = 4
    c.microbatch = 16
    c.evaluation.records = 16
    c.log.every = 1
  return c
