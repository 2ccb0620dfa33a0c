r"""Makes the pair of `configs/quickstart.py` from nothing: supervised training on plan-execute.

  python -m dopd_jax.sft --config=configs/quickstart_sft.py:model=teacher --workdir=runs/teacher
  python -m dopd_jax.export --workdir=runs/teacher --out=dopd_jax/assets/quickstart/teacher
  python -m dopd_jax.sft --config=configs/quickstart_sft.py:model=student --workdir=runs/student
  python -m dopd_jax.export --workdir=runs/student --out=dopd_jax/assets/quickstart/student

Device: 2 CPU cores. Half of the rows show the hint, so that both can use one and need none. Some
completions hold a corrected error, so that the teacher stays sensible behind a student's mistake.
"""

from dopd_jax import config

TASK = 'task:plan_execute?steps=2&definitions=4&modulus=7'
SIZES = {  # layers, width, heads, kv_heads, head_width, feed_forward
  'teacher': (4, 96, 4, 2, 24, 256),
  'student': (3, 64, 4, 2, 16, 160),
}


def get_config(arg=''):
  a = config.parse_arg(arg, smoke=False, model='teacher')
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
  c.data.train = (
    f'{TASK}&size={60_000 if teacher else 20_000}&seed={1 if teacher else 2}&corrupt=0.3'
  )
  c.data.eval = f'{TASK}&size=500&seed=7&split=test'
  c.data.max_prompt_tokens = 64
  c.data.prompt_bucket = 16
  c.rollout.prompts = 64
  c.rollout.samples = 1
  c.rollout.max_new_tokens = 8
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 100
  c.optimizer.weight_decay = 0.01
  c.microbatch = 64
  c.steps = 2500
  c.evaluation.every = 250
  c.checkpoint.every = 250
  c.log.every = 50
  if a.smoke:
    c.steps = 2
    c.optimizer.warmup_steps = 0
    c.data.train = f'{TASK}&size=256&seed=1&corrupt=0.3'
    c.data.eval = f'{TASK}&size=16&seed=7&split=test'
  return c
