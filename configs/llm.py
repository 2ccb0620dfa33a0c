r"""Qwen3 -> Qwen3 with the paper's settings (arXiv 2606.30626, section 4 and appendix).

  python -m dopd_jax.train --config=configs/llm.py:teacher=8b,student=1.7b \
      --config.data.train=hints.jsonl --workdir=runs/llm
  python -m dopd_jax.train --config=configs/llm.py:method=exopd --workdir=runs/exopd
  python -m dopd_jax.train --config=configs/llm.py:method=exopd,settings=paper --workdir=runs/fair
  python -m dopd_jax.train --config=configs/llm.py:smoke --workdir=runs/smoke      # CPU, 1 minute

Pairs of the paper: 8b -> 1.7b, 8b -> 0.6b, 4b -> 1.7b, 4b -> 0.6b, 1.7b -> 0.6b. Models come from
the hub or from a local directory (`--config.teacher.path=DIR`). The paper's prompts are public
(RaR-Science-20K, DAPO-Math-17K, Skywork-OR1-Coding-14K), its hints are not: `data.train` expects
records with `prompt` and `privileged_context`, and `answer` and `verifier` where a method needs
rewards. Device: a TPU pod or 8 GPUs; never run on one yet.

A method's loss has its published numbers (`dopd_jax/objectives/`). `settings=published` also takes
batch, rollouts and learning rate from where the method was published; `settings=paper` gives every
method those that the DOPD paper shares (128 prompts, 4 completions, 5e-6), for a fair comparison.
With the hint or without it: `--config.objective.teacher_context=privileged`, or `=plain`.
"""

from dopd_jax import config
from dopd_jax.errors import UserError

PAIRS = (('8b', '1.7b'), ('8b', '0.6b'), ('4b', '1.7b'), ('4b', '0.6b'), ('1.7b', '0.6b'))

# What each publication says beside its loss; a method that is not here has the paper's settings.
PUBLISHED = {
  'thinking_machines': {  # tinker-cookbook, recipe `distillation`; full fine-tuning
    'rollout.prompts': 1024,
    'rollout.samples': 4,
    'rollout.max_new_tokens': 4096,
    'optimizer.learning_rate': 5e-5,  # 1e-4 with LoRA
  },
  'gkd': {'rollout.temperature': 0.9, 'rollout.max_new_tokens': 128},  # TRL's GKDConfig
  'opcd': {  # microsoft/LMOps, opcd
    'rollout.prompts': 128,
    'rollout.samples': 1,
    'rollout.temperature': 0.6,
    'rollout.max_new_tokens': 16384,
    'optimizer.learning_rate': 5e-6,
  },
  'exopd': {  # RUCBM/G-OPD, training script
    'rollout.prompts': 1024,
    'rollout.samples': 1,
    'rollout.max_new_tokens': 16384,
    'optimizer.learning_rate': 1e-5,
    'optimizer.warmup_steps': 0,
  },
  'uni_opd': {  # WenjinHou/Uni-OPD, release scripts
    'data.max_prompt_tokens': 4096,
    'rollout.prompts': 64,
    'rollout.samples': 16,
    'rollout.max_new_tokens': 16384,
    'optimizer.learning_rate': 1e-6,
    'optimizer.warmup_steps': 5,
    'optimizer.final_share': 1.0,  # constant
    'optimizer.b2': 0.98,
    'optimizer.weight_decay': 0.1,
  },
  'opsd': {  # siyan-zhao/OPSD, script; its rate, 2e-4, is for LoRA, so the paper's 5e-6 stays
    'rollout.samples': 1,
    'rollout.max_new_tokens': 2048,  # for 1.7B; 1024 for others
    'rollout.temperature': 1.1,
    'rollout.top_p': 0.95,
    'rollout.top_k': 20,
    'steps': 100,
  },
  'sdpo': {  # lasgroup/SDPO, config
    'rollout.prompts': 32,
    'rollout.samples': 8,
    'optimizer.learning_rate': 1e-5,  # 1e-6 with rich feedback
  },
  'eopd': {  # WLS04/EOPD; 128 rows in 4 updates of 32 (objective.updates)
    'rollout.prompts': 128,
    'rollout.samples': 1,
    'rollout.max_new_tokens': 4096,
    'optimizer.learning_rate': 3e-6,
  },
  'tip': {  # HJSang/OPSD_OnPolicyDistillation, base trainer
    'rollout.prompts': 256,
    'rollout.samples': 1,
    'rollout.max_new_tokens': 8192,
    'optimizer.learning_rate': 1e-6,
  },
}


def get_config(arg=''):
  a = config.parse_arg(
    arg, smoke=False, method='dopd', teacher='8b', student='1.7b', settings='published'
  )
  if (a.teacher, a.student) not in PAIRS:
    pairs = ', '.join(f'teacher={t},student={s}' for t, s in PAIRS)
    raise UserError(f'no such pair: use one of {pairs}, or set teacher.path and student.path')
  if a.settings not in ('published', 'paper'):
    raise UserError(f'settings must be published or paper, not {a.settings!r}')
  c = config.default(a.method)  # for DOPD k 128, beta_light .6, beta_weak .3, trim .05: the paper's
  c.teacher.path = f'Qwen/Qwen3-{a.teacher.upper()}'
  c.student.path = f'Qwen/Qwen3-{a.student.upper()}'
  c.data.train = 'data/llm_hints.jsonl'
  c.data.max_prompt_tokens = 2048  # not given by the paper
  c.rollout.prompts = 128  # these five: the paper, section 4
  c.rollout.samples = 4
  c.optimizer.learning_rate = 5e-6
  c.optimizer.final_share = 0.0
  c.steps = 200
  c.rollout.max_new_tokens = 4096  # not given by the paper
  c.optimizer.warmup_steps = 10  # not given by the paper
  c.microbatch = 64
  c.rollout.gather_weights = True
  c.checkpoint.every = 20
  c.checkpoint.best = ''
  if a.settings == 'published':
    c.update_from_flattened_dict(PUBLISHED.get(a.method, {}))
  if a.smoke:  # the same path through the code, with the pair that the package carries
    c.teacher.path = 'package:dopd_jax/assets/quickstart/teacher'
    c.student.path = 'package:dopd_jax/assets/quickstart/student'
    c.data.train = 'task:plan_execute?size=64&seed=1000'
    c.data.max_prompt_tokens = 64
    c.rollout.prompts = 4
    c.rollout.samples = 4
    c.rollout.max_new_tokens = 12
    c.optimizer.warmup_steps = 0
    c.microbatch = 16
    c.steps = 2
  return c
