r"""Qwen3-VL -> Qwen3-VL with boxes and labels as privileged input (arXiv 2606.30626, section 4).

  python -m dopd_jax.train --config=configs/vlm.py \
      --config.data.train=boxes.jsonl --workdir=runs/vlm
  python -m dopd_jax.train --config=configs/vlm.py:smoke --workdir=runs/vlm-smoke    # CPU, minutes
  python -m dopd_jax.train --config=configs/vlm.py:method=vision_opd --workdir=runs/vision-opd

Pairs: 8b -> 2b (the paper's), 8b -> 4b, 4b -> 2b. Models come from the hub or from a local
directory (`--config.teacher.path=DIR`). The paper's prompts are public (ViRL39K), its boxes are
not: `data.train` expects records with `prompt`, `images`, `boxes` and `labels`. What the privileged
policies see is made of them: `--config.data.privileged_kind=` box+label (the paper), box+caption,
box, label, caption, answer or none (its Table 5). Device: a TPU pod or 8 GPUs; never run on one.

`smoke` trains the tiny pair that the package carries on real handwritten digits, or that of a
folder, `models=DIR`, with `hint=KIND` of the task; `configs/vlm_sft.py` made both.
"""

from dopd_jax import config
from dopd_jax.errors import UserError

PAIRS = (('8b', '2b'), ('8b', '4b'), ('4b', '2b'))
TASK = 'task:digits'

# What each publication says beside its loss; a method that is not here has the paper's settings.
PUBLISHED = {
  'vision_opd': {  # VisionOPD/Vision-OPD
    'rollout.prompts': 96,
    'rollout.samples': 8,
    'rollout.max_new_tokens': 1024,
    'optimizer.learning_rate': 2e-6,
    'optimizer.warmup_steps': 10,
  },
  'va_opd': {'rollout.prompts': 16, 'rollout.samples': 4},  # a reproduction of arXiv 2605.21924
}


def get_config(arg=''):
  a = config.parse_arg(
    arg,
    smoke=False,
    method='dopd',
    teacher='8b',
    student='2b',
    settings='published',
    seed=0,
    hint='',
    models='',
  )
  if (a.teacher, a.student) not in PAIRS:
    pairs = ', '.join(f'teacher={t},student={s}' for t, s in PAIRS)
    raise UserError(f'no such pair: use one of {pairs}, or set teacher.path and student.path')
  if a.settings not in ('published', 'paper'):
    raise UserError(f'settings must be published or paper, not {a.settings!r}')
  if (a.hint or a.models) and not a.smoke:
    raise UserError('hint and models are those of smoke: set config.data.privileged_kind instead')
  c = config.default(a.method)
  c.seed = a.seed
  c.teacher.path = f'Qwen/Qwen3-VL-{a.teacher.upper()}-Instruct'
  c.student.path = f'Qwen/Qwen3-VL-{a.student.upper()}-Instruct'
  c.data.train = 'data/vlm_boxes.jsonl'
  c.data.privileged_kind = 'box+label'
  c.data.max_prompt_tokens = 2048  # not given by the paper; images of up to 1,024 tokens
  c.data.max_pixels = 1024 * 32 * 32
  c.data.patch_bucket = 1024
  c.rollout.prompts = 64  # these five: the paper, section 4
  c.rollout.samples = 4
  c.optimizer.learning_rate = 5e-6
  c.optimizer.final_share = 0.0
  c.steps = 300
  c.rollout.max_new_tokens = 2048  # not given by the paper
  c.optimizer.warmup_steps = 10  # not given by the paper
  c.freeze = 'vision'  # not given by the paper
  c.microbatch = 64
  c.rollout.gather_weights = True
  c.checkpoint.every = 20
  c.checkpoint.best = ''
  if a.settings == 'published':
    c.update_from_flattened_dict(PUBLISHED.get(a.method, {}))
  if a.smoke:
    where = f'{a.models}/digits_' if a.models else 'package:dopd_jax/assets/digits/'
    c.teacher.path = f'{where}teacher'
    c.student.path = f'{where}student'
    kind = f'&hint={a.hint}' if a.hint else ''
    c.data.train = f'{TASK}?size=4000&seed={1000 + a.seed}{kind}'
    c.data.eval = f'{TASK}?size=500&seed=8&split=test{kind}'
    c.data.privileged_kind = 'column'
    c.data.max_pixels = 0
    c.data.max_prompt_tokens = 64
    c.data.prompt_bucket = 16
    c.data.patch_bucket = 16
    c.rollout.prompts = 32
    c.rollout.samples = 4
    c.rollout.max_new_tokens = 8
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 5
    c.freeze = 'nothing'
    c.microbatch = 128
    c.steps = 240
    c.evaluation.every = 40
    c.checkpoint.every = 40
    c.checkpoint.best = 'eval/accuracy'
    c.log.every = 20
  return c
