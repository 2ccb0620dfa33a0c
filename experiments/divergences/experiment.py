"""The paper's Table 7: divergence by region, to the hinted teacher, every token alike.

  python -m experiments.run divergences --jobs=2

Of a vocabulary of 57 words the top 128 are all; the top 8 stand for the paper's top K here.
"""

from experiments import study
from experiments.grid import Arm

KINDS = {'fkl': 'forward_kl', 'rkl': 'reverse_kl', 'js': 'js'}


def uniform(divergence: str, region: str) -> Arm:
  """One divergence in one region."""
  changes = {'objective.divergence': divergence, 'objective.region': region}
  k = {'objective.k': 8} if region == 'top_k' else {}
  return Arm('method=opd', study.PRIVILEGED | changes | k)


EXPERIMENT = study.study(
  'Which divergence, over the sampled token, the top 8 or the whole vocabulary, serves best when '
  'every token is treated alike?',
  {
    'opd_privileged': study.OPD_PRIVILEGED,  # reverse KL, whole vocabulary
    'rkl_top8': uniform('reverse_kl', 'top_k'),
    'rkl_sampled': uniform('reverse_kl', 'sampled'),
    'fkl_full': uniform('forward_kl', 'full'),
    'fkl_top8': uniform('forward_kl', 'top_k'),
    'fkl_sampled': uniform('forward_kl', 'sampled'),
    'uniform_js': study.UNIFORM_JS,
    'js_top8': uniform('js', 'top_k'),
    'js_sampled': uniform('js', 'sampled'),
  },
)
