r"""Qwen3 -> Qwen3 with the paper's settings (arXiv 2606.30626, section 4 and appendix).

  python -m dopd_jax.train --config=configs/llm.py:teacher=8b,student=1.7b \
      --config.data.train=hints.jsonl --workdir=runs/llm
  python -m dopd_jax.train --config=configs/llm.py:smoke --workdir=runs/llm-smoke      # CPU, 1
  minute

Pairs of the paper: 8b -> 1.7b, 8b -> 0.6b, 4b -> 1.7b, 4b -> 0.6b, 1.7b -> 0.6b. Models come from
the hub or from a local directory (`--config.teacher.path=DIR`). The paper's prompts are public
(RaR-Science-20K, DAPO-Math-17K, Skywork-OR1-Coding-14K), its hints are not: `data.train` expects
records with `prompt` and `privileged_context`. Device: a TPU pod or 8 GPUs; never run on one yet.
"""

from dopd_jax import config
from dopd_jax.errors import UserError

PAIRS = (('8b', '1.7b'), ('8b', '0.6b'), ('4b', '1.7b'), ('4b', '0.6b'), ('1.7b', '0.6b'))


def get_config(arg=''):
  a = config.parse_arg(arg, smoke=False, method='dopd', teacher='8b', student='1.7b')
  if (a.teacher, a.student) not in PAIRS:
    pairs = ', '.join(f'teacher={t},student={s}' for t, s in PAIRS)
    raise UserError(f'no such pair: use one of {pairs}, or set teacher.path and student.path')
  c = config.default(a.method)  # k 128, beta_light .6, beta_weak .3, trim .05: the paper's
  c.teacher.path = f'Qwen/Qwen3-{a.teacher.upper()}'
  c.student.path = f'Qwen/Qwen3-{a.student.upper()}'
  c.data.train = 'data/llm_hints.jsonl'
  c.data.max_prompt_tokens = 2048  # not given by the paper
  c.rollout.prompts = 128
  c.rollout.samples = 4
  c.rollout.max_new_tokens = 4096  # not given by the paper
  c.optimizer.learning_rate = 5e-6
  c.optimizer.warmup_steps = 10  # not given by the paper
  c.steps = 200
  c.microbatch = 64
  c.checkpoint.every = 20
  c.checkpoint.best = ''
  if a.smoke:  # the same path through the code, with the pair that the package carries
    c.teacher.path = 'package:dopd_jax/assets/quickstart/teacher'
    c.student.path = 'package:dopd_jax/assets/quickstart/student'
    c.data.train = 'task:plan_execute?size=64&seed=1000'
    c.data.max_prompt_tokens = 64
    c.rollout.prompts = 4
    c.rollout.max_new_tokens = 12
    c.optimizer.warmup_steps = 0
    c.microbatch = 16
    c.steps = 2
  return c
