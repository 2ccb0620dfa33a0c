r"""DOPD on the plan-execute task with the tiny Qwen3-shaped pair that the package carries.

  python -m dopd_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m dopd_jax.train --config=configs/quickstart.py:smoke --workdir=runs/smoke
  python -m dopd_jax.train --config=configs/quickstart.py:method=opd --workdir=runs/opd

Device: 2 CPU cores, under 5 minutes. The pair was made by `configs/quickstart_sft.py`.
"""

from dopd_jax import config

TASK = 'task:plan_execute?steps=2&definitions=4&modulus=7'


def get_config(arg=''):
  a = config.parse_arg(arg, smoke=False, method='dopd', seed=0)
  c = config.default(a.method)
  c.seed = a.seed
  c.student.path = 'package:dopd_jax/assets/quickstart/student'
  c.teacher.path = 'package:dopd_jax/assets/quickstart/teacher'
  c.data.train = f'{TASK}&size=20000&seed={1000 + a.seed}'
  c.data.eval = f'{TASK}&size=1000&seed=8&split=test'
  c.data.max_prompt_tokens = 64
  c.data.prompt_bucket = 16
  c.rollout.prompts = 32
  c.rollout.samples = 4
  c.rollout.max_new_tokens = 8
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 10
  c.microbatch = 128
  c.steps = 100
  c.evaluation.every = 25
  c.checkpoint.every = 25
  c.log.every = 5
  if a.smoke:
    c.steps = 2
    c.optimizer.warmup_steps = 0
    c.rollout.prompts = 4
    c.microbatch = 16
    c.data.train = f'{TASK}&size=64&seed=1000'
    c.data.eval = f'{TASK}&size=16&seed=8&split=test'
    c.log.every = 1
  return c
