r"""Makes the pair of `configs/quickstart.py` from nothing: supervised training on plan-execute.

  python -m dopd_jax.sft --config=configs/quickstart_sft.py:model=teacher --workdir=runs/teacher
  python -m dopd_jax.export --workdir=runs/teacher --out=dopd_jax/assets/quickstart/teacher
  python -m dopd_jax.sft --config=configs/quickstart_sft.py:model=student --workdir=runs/student
  python -m dopd_jax.export --workdir=runs/student --out=dopd_jax/assets/quickstart/student

Device: 2 CPU cores. Half of the rows show the hint, so that both can use one and need none. Some
completions hold a corrected error, so that the teacher stays sensible behind a student's mistake.
"""

from dopd_jax import config

SIZES = {  # layers, width, heads, kv_heads, head_width, feed_forward
  'teacher': (4, 128, 4, 2, 32, 320),
  'student': (2, 64, 4, 2, 16, 160),
}


def get_config(arg=''):
  a = config.parse_arg(arg, smoke=False, model='teacher', steps=0, lr=0.0)
  c = config.default('sft')
  layers, width, heads, kv_heads, head_width, feed_forward = SIZES[a.model]
  c.student.architecture = {
    'layers': layers,
    'width': width,
    'heads': heads,
    'kv_heads': kv_heads,
    'head_width': head_width,
    'feed_forward': feed_forward,
    'max_position': 128,
  }
  c.tokenizer = 'task:plan_execute'
  c.objective.privileged_share = 0.5
  teacher = a.model == 'teacher'
  c.data.train = f'task:plan_execute?size=200000&seed={1 if teacher else 2}&corrupt=0.3'
  c.data.eval = 'task:plan_execute?size=500&seed=7&split=test'
  c.data.max_prompt_tokens = 64
  c.rollout.prompts = 128
  c.rollout.samples = 1
  c.rollout.max_new_tokens = 12
  c.optimizer.learning_rate = a.lr or (1e-3 if teacher else 2e-3)
  c.optimizer.warmup_steps = 50
  c.optimizer.weight_decay = 0.1
  c.microbatch = 128
  c.steps = a.steps or (2500 if teacher else 1500)
  c.evaluation.every = 250
  c.checkpoint.every = 250
  c.log.every = 50
  if a.smoke:
    c.steps = 2
    c.optimizer.warmup_steps = 0
    c.data.train = 'task:plan_execute?size=256&seed=1&corrupt=0.3'
    c.data.eval = 'task:plan_execute?size=16&seed=7&split=test'
  return c
