"""Hints from worked solutions hold no result; verifiers judge what a completion answers."""

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopd_jax import policies, token_records
from dopd_jax.data import parse_record
from dopd_jax.errors import UserError
from dopd_jax.tasks import make_records, reasoning, verify
from dopd_jax.tasks.hints import steps_without_results

NUMBER = r'\d[\d,]*\d(?:\.\d+)?|\d+(?:\.\d+)?'


def numbers(text):
  return {round(float(n.replace(',', '')), 9) for n in re.findall(NUMBER, text)}


def hint_numbers(hint):
  """The numbers of a hint, without those that name or count its steps."""
  text = re.sub(r'^\d+\. ', '', hint, flags=re.MULTILINE)
  return numbers(re.sub(r'\[step \d+\]', '', text))


@pytest.fixture(scope='module')
def gsm():
  """Items of all 85 templates."""
  return make_records('gsm_symbolic', 900, 0, split='all')


def test_gsm_hints_hold_no_result_and_no_answer(gsm):
  for record in gsm:
    solution, hint = record['completion'], record['privileged_context']
    given = numbers(record['prompt'])
    # An oracle of its own: whatever follows an equals sign.
    results = numbers(' '.join(re.findall(rf'=\s*[^\w=]*((?:{NUMBER}))', solution)))
    left = hint_numbers(hint)
    assert float(record['answer']) not in left, (solution, hint)
    assert not left & (results - given), (solution, hint)
    assert '####' not in hint


def test_gsm_hints_keep_the_work(gsm):
  # A hint has the lines of its solution, and most of the given numbers that the solution uses.
  kept = used = 0
  for record in gsm:
    lines = [s for s in record['completion'].splitlines() if s.strip() and s[:4] != '####']
    assert len(record['privileged_context'].splitlines()) == len(lines)
    given = numbers(record['prompt']) - {float(record['answer'])}
    mine = given & numbers(record['completion'])
    used += len(mine)
    kept += len(mine & hint_numbers(record['privileged_context']))
    assert '?' in record['privileged_context']
  assert kept / used > 0.95


def test_gsm_solutions_are_right_by_both_verifiers(gsm):
  for record in gsm[:300]:
    assert verify(record, record['completion']) == 1.0
    assert verify({**record, 'verifier': 'exact'}, record['completion']) == 1.0
    wrong = f'#### {float(record["answer"]) + 1}'
    assert verify(record, wrong) == verify({**record, 'verifier': 'exact'}, wrong) == 0.0


@pytest.mark.parametrize(
  'solution, problem, answer, hint',
  [
    (
      'He has 28 x 4 = 112 nuts.\nSo 132 - 112 = 20 are left.\n#### 20',
      '28 nuts each, 4 bowls, 132 nuts',
      '20',
      '1. He has 28 x 4 = ? nuts.\n2. So 132 - [step 1] = ? are left.',
    ),
    # A result told before it is worked out; an operation on the right side keeps what is given.
    (
      'It took 58 minutes because 28 + 30 = 58\nT = 156 - 58 = 98',
      'first 28, then 30, in all 156',
      '98',
      '1. It took ? minutes because 28 + 30 = ?\n2. T = 156 - [step 1] = ?',
    ),
    # The problem happens to hold the answer.
    ('12 * 16 = 192\n192 / 16 = 12', '12 jars for 16', '12', '1. ? * 16 = ?\n2. [step 1] / 16 = ?'),
    # Thousands, currencies, signs, fractions, bullets, per cent.
    ('- $410,000 x 7/100 = $28,700.', '$410000 and 7%', '28700', '1. $410,000 x 7/100 = $?.'),
    # A step below zero is taken up with its sign; a subtraction keeps its own.
    ('5 - 9 = -4\n-4 * 2 = -8', '5, 9, 2', '-8', '1. 5 - 9 = ?\n2. [step 1] * 2 = ?'),
    (
      '9 - 5 = 4\n4 - 8 = -4\n-4 - 7 = -11',
      '9, 5, 8, 7',
      '-11',
      '1. 9 - 5 = ?\n2. [step 1] - 8 = ?\n3. [step 2] - 7 = ?',
    ),
    ('5 - 9 = -4\n7 - -4 = 11', '5, 9, 7', '11', '1. 5 - 9 = ?\n2. 7 - [step 1] = ?'),
    ('7 - 9 = -2\n4 x -2 = -8', '7, 9, 4, 2', '-8', '1. 7 - 9 = ?\n2. 4 x [step 1] = ?'),
    ('5 + 9 = 14\n-14 + 3 = -11', '5, 9, 3', '-11', '1. 5 + 9 = ?\n2. -[step 1] + 3 = ?'),
    ('5 - 9 = -4\n3-4 = 1', '5, 9, 3', '1', '1. 5 - 9 = ?\n2. 3-[step 1] = ?'),
    ('15/60 = 1/4 miles', '15 miles in 60', '88', '1. 15/60 = ? miles'),
    ('0.8*100 = 80 students', '100 students, 80% swim', '97', '1. 0.8*100 = ? students'),
    # Not given anywhere: a number that only the solution knows.
    ('900 * 0.98 = 882', '900 with 2 left', '976', '1. 900 * ? = ?'),
  ],
)
def test_steps_without_results(solution, problem, answer, hint):
  assert steps_without_results(solution, problem, answer) == hint


terms = st.lists(st.integers(1, 999), min_size=2, max_size=6)


@given(terms=terms, signs=st.lists(st.sampled_from('+-'), min_size=5, max_size=5))
@settings(max_examples=100, deadline=None)
def test_hints_of_chains_hold_the_terms_and_nothing_else(terms, signs):
  expression = str(terms[0]) + ''.join(f' {s} {t}' for s, t in zip(signs, terms[1:]))
  solution = reasoning._chain_of_sums({'expression': expression})
  total = eval(expression)
  assert solution.endswith(f'#### {total}')
  hint = steps_without_results(solution, expression, str(total))
  assert hint_numbers(hint) == set(map(float, terms)) - {float(abs(total))}
  assert len(hint.splitlines()) == len(terms) - 1


@pytest.mark.parametrize('family', ['chain_sum', 'decimal_chain_sum'])
def test_chains_of_sums(family):
  for record in make_records(family, 100, 3):
    assert verify(record, record['completion']) == 1.0
    first, *steps = record['privileged_context'].splitlines()
    assert not hint_numbers(first) - numbers(record['prompt'])
    # No result stands in for the step that arrives at it, though it may equal a number given.
    for k, step in enumerate(steps, start=2):
      assert re.fullmatch(rf'{k}\. \[step {k - 1}\] [+-] [\d.]+ = \?', step)
    terms = re.findall(r'[\d.]+', record['metadata']['expression'])
    assert (
      re.findall(r'[\d.]+', re.sub(r'\[step \d+\]|\d+\. ', '', record['privileged_context']))
      == terms
    )


def test_a_family_may_be_scored_by_its_answer_alone(monkeypatch):
  monkeypatch.setattr(reasoning._JUDGE, 'score', None)
  for record in make_records('chain_sum', 20, 3, verifier='exact'):
    assert verify(record, record['completion']) == 1.0
    assert verify(record, f'#### 1{record["answer"].lstrip("-")}') == 0.0
  with pytest.raises(UserError, match='chain_sum has no verifier'):
    make_records('chain_sum', 1, 3, verifier='exactly')


def test_an_answer_is_judged_once(monkeypatch):
  asked = []
  monkeypatch.setattr(reasoning._JUDGE, 'score', lambda *about: asked.append(about) or 0.5)
  record = make_records('decimal_arithmetic', 1, 5, hint='none')[0]
  for _ in range(3):
    assert verify(record, '0.125') == 0.5 and verify(record, record['answer']) == 1.0
  assert [about[:2] for about in asked] == [('decimal_arithmetic', '0.125')]


def test_decimals_keep_the_tolerance_of_their_family():
  record = make_records('decimal_arithmetic', 1, 3, hint='none')[0]
  assert verify(record, record['answer'] + '1') == verify(record, record['answer']) == 1.0


@pytest.mark.parametrize('wrong', ['1{}', '{}0', '-{}', '{}.5'])
def test_a_number_that_holds_the_digits_of_the_answer_is_wrong(wrong):
  record = next(r for r in make_records('chain_sum', 50, 3) if float(r['answer']) > 0)
  assert verify(record, wrong.format(record['answer'])) == 0.0
  assert verify(record, f'{record["answer"]}') == 1.0


def test_the_tokenizer_of_chains_knows_every_word_and_the_ends_of_lines():
  tokenizer = policies.load_tokenizer('task:chain_sum')
  for record in make_records('chain_sum', 100, 4, min_terms=4, max_terms=4, max_digits=1):
    for text in (record[key] for key in ('prompt', 'privileged_context', 'completion')):
      said = tokenizer.decode(tokenizer(text)['input_ids'])
      assert said.replace(' \n ', '\n') == text
    ids = tokenizer(record['completion'])['input_ids']
    kinds = reasoning.token_kinds(record, token_records.pieces(tokenizer, ids))
    results = [tokenizer.decode([i]) for i, kind in zip(ids, kinds) if kind == 'execution']
    assert results == [line.split()[-1] for line in record['completion'].splitlines()[:-1]]
    assert verify(record, tokenizer.decode(ids)) == 1.0


@pytest.mark.parametrize('piece', [r'\d', r'\d+'])
def test_every_token_of_a_chain_has_its_kind(piece):
  """Execution is what stands at the end of a line, whether a token is a digit or a number."""
  for record in make_records('chain_sum', 50, 0):
    pieces = re.findall(rf'{piece}|\s+|[^\s\d]+', record['completion'])
    kinds = reasoning.token_kinds(record, pieces)
    of = lambda kind, pieces=pieces, kinds=kinds: [p for p, k in zip(pieces, kinds) if k == kind]
    lines = record['completion'].splitlines()[:-1]
    assert ''.join(of('execution')) == ''.join(re.search(r'\d+$', line)[0] for line in lines)
    # A minus in front of a result is left to the plan, which has the operators.
    work = ''.join(re.sub(r'\d+$', '', line) for line in lines)
    assert ''.join(of('plan')) == work.replace(' ', '')
    assert ''.join(of('other')).replace(' ', '').split('\n')[-1] == f'####{record["answer"]}'


def test_hints():
  by_hint = {hint: make_records('gsm_symbolic', 6, 1, hint=hint) for hint in reasoning.HINTS}
  contexts = {hint: [r['privileged_context'] for r in rows] for hint, rows in by_hint.items()}
  steps, rows = contexts['steps'], by_hint['steps']
  assert contexts['none'] == [''] * 6
  assert contexts['answer'] == [r['answer'] for r in rows]
  assert contexts['answer_steps'][0] == f'{steps[0]}\nThe answer is {rows[0]["answer"]}.'
  assert contexts['full'] == [r['completion'] for r in rows]
  assert contexts['shuffled'] == steps[1:] + steps[:1]
  assert contexts['partial'] == [s.splitlines()[0] for s in steps]
  assert {r['prompt'] for rows in by_hint.values() for r in rows} == {r['prompt'] for r in rows}


def test_sets_are_disjoint_and_sizes_are_prefixes():
  def questions(seed, split):
    return {r['prompt'] for r in make_records('chain_sum', 60, seed, split=split)}

  assert not questions(0, 'train') & questions(0, 'test')
  assert not questions(0, 'train') & questions(1, 'train')
  small, large = (make_records('gsm_symbolic', n, 0) for n in (4, 20))
  assert [r['prompt'] for r in large[:4]] == [r['prompt'] for r in small]


@pytest.mark.parametrize('family', ['gcd', 'maze', 'countdown', 'knights_knaves', 'path_star'])
def test_other_families_without_a_hint(family):
  records = make_records(family, 3, 0, hint='none')
  assert all(verify(record, record['answer']) == 1.0 for record in records)
  with pytest.raises(UserError, match='no worked solution'):
    make_records(family, 3, 0)


def test_a_solution_may_be_named():
  record = make_records('string_manipulation', 1, 0, solution='states')[0]
  assert record['completion'] == '\n'.join(record['metadata']['states'])


def test_records_survive_json_and_parsing(gsm):
  row = json.loads(json.dumps(gsm[0]))
  assert row == gsm[0]
  record = parse_record(row, 'here', default_id='x')
  assert verify(record, record.completion) == 1.0
  with pytest.raises(UserError, match='metadata'):
    verify({**row, 'metadata': None}, '1')


@pytest.mark.parametrize(
  'completion, answer',
  [
    ('#### 20', '20'),
    ('x = 3\n#### 4\n#### 20 \nbye', '20'),
    (r'so \boxed{\frac{1}{2}} it is', r'\frac{1}{2}'),
    (r'\boxed{1} no, \boxed{2', '2'),
    ('<answer> 7 </answer> is it. The answer is 8.', '7'),
    ('The answer is 3.5. Is it?', '3.5'),
    ('Hence the final answer is: **12**.', '12'),
    ('Answer: 4', '4'),
    ('first\n\nlast line\n', 'last line'),
    ('', ''),
  ],
)
def test_final_answer(completion, answer):
  assert reasoning.final_answer(completion) == answer


@pytest.mark.parametrize(
  'answer, completion, right',
  [
    ('16800', 'That makes $16,800.', True),
    ('16800', '#### 16800.0', True),
    ('16800', '12 * 1400 = 16800 euros', True),
    ('16800', '16800 is not 16801', False),
    ('-4', 'it is -4', True),
    ('-4', 'it is 4', False),
    ('New York', 'The answer is new  york.', True),
    ('New York', 'York', False),
    ('5', '', False),
  ],
)
def test_exact_match(answer, completion, right):
  record = {'id': 'r', 'verifier': 'exact', 'answer': answer}
  assert verify(record, completion) == float(right)


def test_a_family_scores_the_final_answer_not_the_first_number(gsm):
  record = {**gsm[0], 'answer': '1620'}
  assert verify(record, 'First 3, then 40, so #### 1,620') == 1.0
  assert verify(record, 'First 1620, no: #### 40') == 0.0
  assert verify(record, 'no idea') == verify(record, '') == 0.0


def test_mistakes():
  for options, words in [
    ({'name': 'gsm_symbolic', 'hint': 'all'}, 'no hint'),
    ({'name': 'gsm_symbolic', 'size': 0}, 'size'),
    ({'name': 'gsm_symbolic', 'split': 'dev'}, 'split'),
    ({'name': 'gsm_symbolic', 'size': 1, 'hint': 'shuffled'}, 'another item'),
    ({'name': 'no_such_family'}, 'no_such_family'),
    ({'name': 'gsm_symbolic', 'levels': 3}, 'levels'),
  ]:
    with pytest.raises(UserError, match=words):
      make_records(**{'size': 2, 'seed': 0, **options})
  with pytest.raises(UserError, match='needs an answer'):
    verify({'id': 'r', 'verifier': 'exact'}, '1')
  for name in (None, 'magic'):
    with pytest.raises(UserError, match='no verifier'):
      verify({'id': 'r', 'verifier': name}, '1')


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
  with pytest.raises(UserError, match=r'pip install dopd_jax\[tasks\]'):
    make_records('gsm_symbolic', 2, 0)
