"""The toy task holds what it promises: routes, hints, knobs, splits, labels, and its tokenizer."""

import collections
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dopd_jax.data import DEFAULT_TEMPLATE, Record, Renderer, parse_record
from dopd_jax.errors import UserError
from dopd_jax.tasks import plan_execute
from dopd_jax.tasks.plan_execute import HINTS, functions, make_records, parse, score, verify

EXAMPLE = {
  'prompt': 'c b *2\nb a +3\na = 9\ne b -1\nd c +1\n? d',
  'answer': '5',
  'verifier': 'plan_execute',
}


def route_values(prompt, modulus):
  """The oracle: every route to the query with its values, by walking back from the query."""
  definitions, query = parse(prompt)
  routes = []

  def back(variable, tail):
    for name, parent, function in definitions:
      if name == variable and parent == '=':
        routes.append([(name, int(function)), *tail])
      elif name == variable:
        back(parent, [(name, function), *tail])

  back(query, [])
  worked = []
  for route in routes:
    value, done = 0, []
    for name, step in route:
      if isinstance(step, int):
        value = step
      else:
        digit = int(step[1])
        value = {'+': value + digit, '-': value - digit, '*': value * digit}[step[0]] % modulus
      done.append((name, value))
    worked.append(done)
  return worked


options = st.fixed_dictionaries(
  {
    'seed': st.integers(0, 10**6),
    'steps': st.integers(2, 5),
    'rho': st.sampled_from([0.0, 0.5, 1.0]),
    'ops': st.sampled_from(['+', '+-', '+-*']),
    'modulus': st.sampled_from([5, 7, 10]),
    'zipf': st.sampled_from([0.0, 2.0]),
  }
)


@given(options=options, extra=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_every_problem_has_one_value_and_the_routes_that_it_says(options, extra):
  count = 2 * options['steps'] + extra
  for record in make_records(3, definitions=count, **options):
    definitions, query = parse(record['prompt'])
    assert len(definitions) == count
    routes = route_values(record['prompt'], options['modulus'])
    said = [r for r in (record['route'], record['other_route']) if r]
    assert sorted(''.join(name for name, _ in r) for r in routes) == sorted(map(''.join, said))
    assert {r[-1] for r in routes} == {(query, int(record['answer']))}
    assert {len(r) for r in routes} == {options['steps']}
    reference = next(r for r in routes if [name for name, _ in r] == record['route'])
    assert record['completion'] == ' '.join(f'{name} {value}' for name, value in reference)
    for route in routes:
      text = ' '.join(f'{name} {value}' for name, value in route)
      assert score(record['prompt'], text, options['modulus']) == (True, True, 1.0)
      assert verify(record, text) == 1.0


def test_distractors_are_as_long_as_the_true_chain():
  for record in make_records(50, 0):
    definitions, query = parse(record['prompt'])
    parents = {d.variable: d.parent for d in definitions}

    def depth(variable, parents=parents):
      return 1 if parents[variable] == '=' else 1 + depth(parents[variable])

    others = [v for v in parents if v not in record['route']]
    assert max(map(depth, others)) >= depth(query) == 4


@pytest.mark.parametrize('rho', [0.0, 0.5, 1.0])
def test_rho_is_the_share_of_two_routes_also_where_few_functions_fit(rho):
  records = make_records(2000, 3, rho=rho, ops='*', modulus=3)
  two = sum(record['other_route'] is not None for record in records)
  # Four standard deviations; six were lost where the coin was thrown again with each new drawing.
  assert abs(two - 2000 * rho) <= 4 * (2000 * rho * (1 - rho)) ** 0.5


def test_the_prompt_does_not_tell_which_route_the_reference_takes():
  # A steep law: the function that closes the second route is rarer than one drawn freely.
  records = make_records(4000, 5, rho=1.0, zipf=2.0)
  ranks = functions()
  tells = collections.defaultdict(list)
  for record in records:
    lines = record['prompt'].splitlines()
    seen, common = [], set(record['route']) & set(record['other_route'])
    for route in (record['route'], record['other_route']):
      last = next(line for line in lines if line.startswith(f'{route[-1]} {route[-2]} '))
      children = sum(f' {route[-2]} ' in line for line in lines)
      seen.append(
        {'line': lines.index(last), 'function': ranks.index(last.split()[2]), 'children': children}
      )
      seen[-1]['letter'] = min(set(route) - common)
    for name in seen[0]:
      if seen[0][name] != seen[1][name]:
        tells[name].append(seen[0][name] < seen[1][name])
  assert len(tells) == 4
  for name, values in tells.items():
    # A fair coin, to four standard deviations.
    assert abs(sum(values) / len(values) - 0.5) < 2 / len(values) ** 0.5, name


def test_hints():
  by_hint = {hint: make_records(20, 4, hint=hint) for hint in HINTS}
  kinds = set()
  for i, record in enumerate(by_hint['steps']):
    steps, answer = ' '.join(record['route']), record['answer']
    contexts = {hint: records[i]['privileged_context'] for hint, records in by_hint.items()}
    foreign, mixed = contexts.pop('shuffled'), contexts.pop('mixed')
    assert contexts == {
      'steps': steps,
      'none': '',
      'answer': answer,
      'answer_steps': f'{steps} {answer}',
      'full': record['completion'],
      'partial': record['route'][0],
    }
    assert not set(steps) & set('0123456789')
    assert mixed in set(contexts.values()) - {''}
    kinds |= {name for name, text in contexts.items() if text == mixed}
    assert foreign != steps and len(foreign) == len(steps)
    # The arms of a study are about the same problems.
    assert {records[i]['prompt'] for records in by_hint.values()} == {record['prompt']}
  assert kinds == {'steps', 'answer', 'answer_steps', 'full', 'partial'}


def test_two_routes_do_not_run_out_unnoticed():
  """There are far fewer problems with two routes: repeats are drawn again with two."""
  options = dict(steps=2, definitions=4, ops='+', modulus=7)
  share = lambda records: sum(r['other_route'] is not None for r in records) / len(records)
  assert abs(share(make_records(2000, 0, rho=0.5, **options)) - 0.5) < 4 * 0.5 / 2000**0.5
  with pytest.raises(UserError, match='fewer than 8000 such problems'):
    make_records(8000, 0, rho=1.0, **options)
  assert len(make_records(8000, 0, rho=1.0, **options, letters=8)) == 8000


def test_the_problems_of_a_seed_stay():
  """Results are kept that were measured on them: the quickstart's, more than meet a repeat."""
  records = make_records(20_000, 1000, steps=2, definitions=4, modulus=7)
  digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
  assert digest.startswith('db6b5b989a556b85')


def test_letters():
  short = make_records(300, 0, steps=2, definitions=4, letters=6)
  long = make_records(50, 0, steps=3, definitions=6, letters=6)
  names = lambda records: {v for r in records for d in parse(r['prompt'])[0] for v in d.variable}
  assert names(short) == names(long) == set('abcdef')
  assert make_records(20, 3, definitions=4, steps=2, letters=4) == make_records(
    20, 3, definitions=4, steps=2
  )
  with pytest.raises(UserError, match='definitions <= letters <= 12, not definitions=4'):
    make_records(1, 0, steps=2, definitions=4, letters=3)


def test_a_foreign_hint_leads_nowhere():
  for record in make_records(500, 0, steps=2, definitions=4, rho=0.5, hint='shuffled'):
    hint = record['privileged_context'].split()
    assert hint != record['route'] and hint != record['other_route']


def test_train_and_test_are_disjoint_whatever_the_seeds():
  def problems(split, seed):
    records = make_records(300, seed, split=split, steps=2, definitions=4, ops='+', modulus=5)
    return {tuple(sorted(record['prompt'].splitlines())) for record in records}

  train = problems('train', 0) | problems('train', 1)
  test = problems('test', 0) | problems('test', 9)
  assert not train & test
  assert len(problems('train', 0)) == 300  # the order of the definitions makes no new problem
  # So small a task that two training sets do meet.
  assert problems('train', 0) & problems('train', 1)


def test_sizes_and_seeds():
  small, large = make_records(5, 0), make_records(9, 0)
  assert large[:5] == small
  assert make_records(5, 0) == small
  assert make_records(5, 1)[0]['prompt'] != small[0]['prompt']
  assert len({record['id'] for record in large}) == 9


def test_data_are_the_same_on_every_machine():
  assert make_records(1, 0)[0]['prompt'].splitlines() == GOLDEN


def test_a_steep_law_makes_some_functions_rare():
  def counts(zipf):
    records = make_records(1000, 0, zipf=zipf)
    words = [word for r in records for word in r['prompt'].split() if word in functions()]
    return collections.Counter(words)

  flat, steep = counts(0.0), counts(1.5)
  assert set(flat) == set(functions())
  assert max(flat.values()) / min(flat.values()) < 1.8
  ranked = [steep[word] for word in functions()]
  assert ranked[0] > 8 * ranked[5] > 0
  assert ranked[0] / max(ranked[25], 1) > 30
  # The rare ones are of every operator.
  assert {word[0] for word in functions()[-13:]} == set('+-*')


def test_corrupted_completions_err_once_and_go_on_sensibly():
  records = make_records(400, 2, corrupt=1.0)
  kinds = collections.Counter()
  for record in records:
    words, mask = record['completion'].split(), record['completion_mask']
    assert len(words) == len(mask)
    errors = [i for i, trained in enumerate(mask) if not trained]
    assert len(errors) == 1
    result = score(record['prompt'], record['completion'])
    if errors[0] % 2:
      # A wrong value; what follows is computed from it.
      kinds['value'] += 1
      assert words[0::2] == record['route']
      assert result.execution == 0.75
    else:
      # A wrong variable with its right value, then back on the route to the right answer.
      kinds['variable'] += 1
      assert words[errors[0]] not in record['route']
      del words[errors[0] : errors[0] + 2]
      assert words[0::2] == record['route']
      assert result == (True, False, 1.0)
  assert min(kinds.values()) > 100


def test_corruption_is_a_share_and_leaves_the_problems_alone():
  clean, some = make_records(300, 2), make_records(300, 2, corrupt=0.3)
  assert [r['prompt'] for r in clean] == [r['prompt'] for r in some]
  hurt = sum(0 in r['completion_mask'] for r in some)
  assert 60 < hurt < 120
  assert 'completion_mask' not in clean[0]


@pytest.mark.parametrize(
  'completion, wanted',
  [
    ('a 9 b 2 c 4 d 5', (True, True, 1.0)),
    ('a 9 b 2 c 4 d 5 <|im_end|>', (True, True, 1.0)),
    ('a 9 b 2 e 1 c 4 d 5', (True, False, 1.0)),  # a detour
    ('d 5', (True, False, 0.0)),  # right, from nothing
    ('a 9 b 2 c 4 d 6', (False, True, 0.75)),
    ('a 9 b 3 c 6 d 7', (False, True, 0.75)),  # one error, followed faithfully
    ('a 9 b 2 c 4 e 5', (False, False, 0.75)),  # the right value of something else
    ('a 9 b 2 c 4 d', (False, False, 1.0)),
    ('a 9 b 2 c 4 d 5 e 1', (False, False, 1.0)),  # went on
    ('5', (False, False, 0.0)),
    ('', (False, False, 0.0)),
    ('b 2 c 4 d 5', (True, False, 2 / 3)),
    ('a 9 z 2 d 5', (True, False, 1 / 3)),
    ('a 9 b 12 c 4 d 5', (True, True, 0.5)),
  ],
)
def test_scores(completion, wanted):
  result = score(EXAMPLE['prompt'], completion)
  assert (result.final, result.route) == wanted[:2]
  assert result.execution == pytest.approx(wanted[2])
  assert verify(EXAMPLE, completion) == float(wanted[0])


def test_verify_takes_records_too():
  record = parse_record({**make_records(1, 0, modulus=7)[0]}, 'here', default_id='x')
  assert isinstance(record, Record)
  assert verify(record, record.completion) == 1.0
  assert verify(record, record.completion[:-1] + 'x') == 0.0


def test_token_kinds():
  kinds = plan_execute.token_kinds(EXAMPLE, ['a', '9', 'd', '5', '<|im_end|>', '+3', '?'])
  assert kinds == ['plan', 'execution', 'plan', 'execution', 'other', 'other', 'other']


@pytest.mark.parametrize(
  'bad',
  [
    {'size': 0},
    {'seed': -1},
    {'steps': 1},
    {'definitions': 7},
    {'definitions': 13},
    {'rho': 1.5},
    {'corrupt': -0.1},
    {'hint': 'all'},
    {'ops': '/'},
    {'ops': ''},
    {'modulus': 11},
    {'zipf': -1},
    {'zipf': float('nan')},
    {'split': 'dev'},
    {'size': 10**5, 'steps': 2, 'definitions': 4, 'ops': '*', 'modulus': 3},
  ],
)
def test_impossible_options(bad):
  with pytest.raises(UserError) as error:
    make_records(**{'size': 2, 'seed': 0, **bad})
  assert '\n' not in str(error.value)


def test_a_prompt_of_another_kind_is_refused():
  with pytest.raises(UserError, match='plan_execute prompt'):
    score('What is 2 + 2?', 'a 1')


TOKENIZER = plan_execute.tokenizer()


def test_every_word_is_one_token():
  renderer = Renderer(TOKENIZER)
  row = make_records(1, 0)[0]
  record = parse_record(row, 'here', default_id='x')
  plain, privileged = renderer.plain(record), renderer.privileged(record)
  words = row['prompt'].split()
  user, assistant = TOKENIZER.convert_tokens_to_ids(['<|user|>', '<|assistant|>'])
  assert plain == [user, *TOKENIZER.convert_tokens_to_ids(words), assistant]
  assert len(plain) == 28
  # The whole heading of the privileged section is one token of its own.
  heading = DEFAULT_TEMPLATE.split('\n')[2]
  hint = TOKENIZER.convert_tokens_to_ids([heading, *row['route']])
  assert privileged == [*plain[:-1], *hint, assistant]
  completion = renderer.completion(record)
  assert len(completion) == 9 and completion[-1] == TOKENIZER.eos_token_id
  assert TOKENIZER.unk_token_id not in plain + privileged + completion
  assert TOKENIZER.decode(completion, skip_special_tokens=True) == row['completion']
  assert TOKENIZER.decode(plain, skip_special_tokens=True).split() == words


def test_all_words_of_all_options_are_known():
  for record in make_records(300, 0, definitions=12, hint='full'):
    text = f'{record["prompt"]} {record["completion"]}'
    assert TOKENIZER.unk_token_id not in TOKENIZER(text)['input_ids']
  assert len(TOKENIZER) == 57
  assert len(set(TOKENIZER.get_vocab().values())) == 57
  assert TOKENIZER.pad_token_id == 0


def test_the_tokenizer_survives_saving(tmp_path):
  TOKENIZER.save_pretrained(tmp_path)
  loaded = AutoTokenizer.from_pretrained(tmp_path)
  rows = [parse_record(r, 'here', default_id='x') for r in make_records(5, 0)]
  for method in ('plain_batch', 'privileged_batch', 'completion_batch'):
    a, b = (getattr(Renderer(t), method)(rows) for t in (TOKENIZER, loaded))
    assert a == b
  for name in ('eos_token_id', 'pad_token_id', 'unk_token_id', 'chat_template'):
    assert getattr(loaded, name) == getattr(TOKENIZER, name)
  ids = Renderer(loaded).privileged(rows[0])
  assert loaded.decode(ids) == TOKENIZER.decode(ids)


def test_a_conversation_closes_its_answers():
  chat = [
    {'role': 'user', 'content': '? a'},
    {'role': 'assistant', 'content': 'a 1'},
    {'role': 'user', 'content': '? b'},
  ]
  text = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
  joined = ' '.join(text.split())
  assert joined == '<|user|> ? a <|assistant|> a 1 <|im_end|> <|user|> ? b <|assistant|>'


def test_records_are_plain_json():
  rows = make_records(3, 0, corrupt=1.0, rho=1.0)
  assert json.loads(json.dumps(rows)) == rows


GOLDEN = ['e d -1', 'h a -9', 'b e -6', 'a = 3', 'c h +2', 'f c *3', 'g = 3', 'd g +3', '? b']
