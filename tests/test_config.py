import dataclasses
import importlib.util
import pathlib

import pytest

from dopd_jax import config as configs
from dopd_jax import objectives
from dopd_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def load(name, arg=''):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


@pytest.mark.parametrize('arg', ['', 'smoke'])
@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda p: p.stem)
def test_every_config_is_valid_and_has_a_smoke_variant(path, arg):
  config = configs.validate(load(path.stem, arg))
  if arg:
    # On images it is long enough to see accuracy move.
    assert config.steps <= (240 if path.stem == 'vlm' else 2)


def test_the_papers_settings():
  """Batch 128, 4 rollouts, 200 steps, lr 5e-6 cosine, K 128, beta .3 and .6; five pairs."""
  pairs = [('8b', '1.7b'), ('8b', '0.6b'), ('4b', '1.7b'), ('4b', '0.6b'), ('1.7b', '0.6b')]
  for teacher, student in pairs:
    c = configs.validate(load('llm', f'teacher={teacher},student={student}'))
    assert c.teacher.path == f'Qwen/Qwen3-{teacher.upper()}'
    assert c.student.path == f'Qwen/Qwen3-{student.upper()}'
    assert (c.rollout.prompts, c.rollout.samples, c.steps) == (128, 4, 200)
    assert (c.optimizer.learning_rate, c.optimizer.final_share) == (5e-6, 0.0)
    o = c.objective
    assert (o.k, o.beta_light, o.beta_weak, o.trim, o.scope) == (128, 0.6, 0.3, 0.05, 'batch')
  with pytest.raises(UserError, match='no such pair'):
    load('llm', 'teacher=0.6b,student=8b')


@pytest.mark.parametrize('settings', ['published', 'paper'])
@pytest.mark.parametrize('method', sorted(objectives.METHODS.keys() - {'vision_opd', 'va_opd'}))
def test_every_method_has_both_settings(method, settings):
  """One word picks the method; `settings=paper` gives all of them the same run around the loss."""
  config = configs.validate(load('llm', f'method={method},settings={settings}'))
  assert config.objective == objectives.METHODS[method]()
  if settings == 'paper':
    shared = configs.validate(load('llm', f'method=opd,settings={settings}'))
    assert dataclasses.replace(config, objective=shared.objective) == shared


def test_published_settings():
  """The numbers of their publications, where they differ from the paper's."""
  c = configs.validate(load('llm', 'method=eopd'))
  assert (c.rollout.prompts, c.rollout.samples, c.objective.updates) == (128, 1, 4)
  assert (c.objective.threshold, c.objective.alpha, c.objective.k) == (0.8, 1.0, 16)
  c = configs.validate(load('llm', 'method=uni_opd'))
  assert (c.rollout.prompts, c.rollout.samples, c.optimizer.final_share) == (64, 16, 1.0)
  assert (c.objective.margin, c.objective.clip_low, c.objective.clip_high) == (0.4, 0.2, 0.28)
  c = configs.validate(load('llm', 'method=exopd'))
  assert (c.objective.extrapolation, c.optimizer.learning_rate) == (1.25, 1e-5)
  c = configs.validate(load('llm', 'method=sdpo'))
  assert (c.objective.k, c.objective.mixture, c.objective.ema_rate) == (100, 0.5, 0.05)


@pytest.mark.parametrize(
  'method, changes, sentence',
  [
    ('uni_opd', {'rollout.samples': 1}, 'rollout.samples must be at least 2, not 1'),
    ('sdpo', {'rollout.samples': 1}, 'rollout.samples must be at least 2, not 1'),
    ('sdpo', {'objective.ema_rate': 1.1}, r'objective.ema_rate must be in \[0, 1\]'),
    ('sdpo', {'objective.right_at': 0.0}, r'objective.right_at must be in \(0, 1\]'),
    ('sdft', {'objective.teacher': 'me'}, 'objective.teacher must be one of teacher, frozen'),
    ('gkd', {'objective.on_policy_share': -0.1}, 'on_policy_share must be in'),
    ('tip', {'objective.share': 1.1}, 'objective.share must be in'),
    ('eopd', {'objective.updates': 3}, "can't be cut into 3 updates"),
    ('eopd', {'objective.clip_low': -0.1}, 'clip_low must be at least 0'),
    ('exopd', {'objective.reference': 'base'}, 'objective.reference must be one of'),
    ('opd', {'objective.teacher_context': 'hint'}, 'teacher_context must be one of plain, priv'),
  ],
)
def test_combinations_that_make_no_sense(method, changes, sentence):
  c = configs.default(method)
  c.data.train = 'x.jsonl'
  c.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=sentence):
    configs.validate(c)


def valid():
  c = configs.default()
  c.data.train = 'x.jsonl'
  return c


@pytest.mark.parametrize(
  'changes, sentence',
  [
    ({'optimizer.learning_rat': 1.0}, "'learning_rat': did you mean 'learning_rate'"),
    ({'objective.betalight': 1.0}, "'betalight': did you mean 'beta_light'"),
    ({'stepz': 1}, "'stepz': did you mean 'steps'"),
    ({'objective.HT.sorce': 'x'}, "'sorce': did you mean 'source'"),
    ({'steps': 'many'}, 'steps must be of type int'),
    ({'steps': 0}, 'steps must be at least 1'),
    ({'objective.trim': 1.0}, r'objective.trim must be in \[0, 1\)'),
    ({'objective.tail': 'floor'}, 'objective.tail must be one of'),
    ({'objective.HT.strength': 'huge'}, 'objective.HT.strength must be one of'),
    ({'objective.ema_rate': 1.5}, r'objective.ema_rate must be in \[0, 1\]'),
    ({'objective.self_reference': 'dead'}, 'objective.self_reference must be one of'),
    ({'objective.k': 0}, 'objective.k must be at least 1'),
    ({'microbatch': 7}, "can't be cut into equal"),
    ({'rollout.prompts_at_once': 100}, 'multiple of rollout.prompts_at_once'),
    ({'optimizer.warmup_steps': 200}, 'must be below steps'),
    ({'data.columns': ('prompt', 'question')}, 'must be pairs of names'),
    ({'data.train': '', 'data.stages': (('a.jsonl', '5'),)}, 'pairs of a source and steps'),
    ({'data.evals': (('', 'x.jsonl'),)}, 'data.evals must be pairs of a name of its own'),
    ({'data.evals': (('a', ''),)}, 'pairs of a name of its own'),
    ({'data.evals': (('a', 'x.jsonl'), ('a', 'y.jsonl'))}, 'pairs of a name of its own'),
    ({'checkpoint.best': 'eval/accuracy/math'}, 'unknown metric in checkpoint.best'),
    ({'rollout.prompts_at_once': -1}, 'at least 0'),
    ({'checkpoint.best': 'eval/acuracy'}, "did you mean 'eval/accuracy'"),
    ({'data.privileged': 'some'}, 'data.privileged must be one of'),
    ({'data.train': ''}, 'set either data.train'),
    ({'objective.name': 'dodp'}, "did you mean 'dopd'"),
    ({'evaluation.stop_at': 55.0}, 'evaluation.stop_at is a share, from 0 to 1'),
    ({'evaluation.stop_at': 0.5, 'evaluation.every': 5}, 'stop_at needs data.eval'),
  ],
)
def test_mistakes_are_sentences(changes, sentence):
  values = valid().to_dict()
  for name, value in changes.items():
    *path, key = name.split('.')
    node = values
    for part in path:
      node = node[part]
    node[key] = value
  with pytest.raises(UserError, match=sentence):
    configs.validate(values)


def test_config_is_frozen_and_survives_json():
  import json

  config = configs.validate(valid())
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.steps = 3
  again = configs.validate(json.loads(configs.to_json(config)))
  assert again == config
  assert (
    configs.differences(json.loads(configs.to_json(config)), json.loads(configs.to_json(again)))
    == []
  )


def test_only_cadence_may_change():
  import json

  a = json.loads(configs.to_json(configs.validate(valid())))
  b = json.loads(json.dumps(a))
  b['log']['every'] = b['checkpoint']['every'] = b['evaluation']['every'] = 77
  assert configs.differences(a, b) == []
  b['optimizer']['learning_rate'] = 1.0
  b['evaluation']['temperature'] = 1.0  # changes what accuracy means
  assert configs.differences(a, b) == [
    'evaluation.temperature (was 0.0, is 1.0)',
    'optimizer.learning_rate (was 5e-06, is 1.0)',
  ]


def test_a_setting_that_is_newer_than_a_run_had_its_default():
  import json

  new = json.loads(configs.to_json(configs.validate(valid())))
  old = json.loads(json.dumps(new))
  del old['remat'], old['rollout']['lag'], old['objective']['k'], old['optimizer']
  assert configs.differences(old, {**new, 'optimizer': configs.default().optimizer.to_dict()}) == []
  new['remat'], new['rollout']['lag'] = False, 1
  assert configs.differences(old | {'optimizer': new['optimizer']}, new) == [
    'remat (was True, is False)',
    'rollout.lag (was 0, is 1)',
  ]
  ignored = 'remat', 'rollout.'
  assert configs.differences(old | {'optimizer': new['optimizer']}, new, ignored) == []


def test_config_arguments():
  a = configs.parse_arg('smoke,method=opd,n=3', smoke=False, method='dopd', n=1)
  assert (a.smoke, a.method, a.n) == (True, 'opd', 3)
  with pytest.raises(UserError, match="'metod': did you mean 'method'"):
    configs.parse_arg('metod=opd', smoke=False, method='dopd')
  with pytest.raises(UserError, match='n must be a int'):
    configs.parse_arg('n=x', n=1)
