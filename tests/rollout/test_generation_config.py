from dopd_jax.rollout import Sampling, sampling_notes, stop_ids_from, stop_ids_warning

QWEN3 = {
  'bos_token_id': 151643,
  'do_sample': True,
  'eos_token_id': [151645, 151643],
  'pad_token_id': 151643,
  'temperature': 0.6,
  'top_k': 20,
  'top_p': 0.95,
  'transformers_version': '4.51.0',
}


def test_what_qwen3_sets_and_we_do_not():
  notes = sampling_notes(QWEN3, Sampling(max_new_tokens=8))
  assert notes == [
    'generation_config.json says temperature=0.6; used here: 1.0.',
    'generation_config.json says top_k=20; used here: off (top_k=0).',
    'generation_config.json says top_p=0.95; used here: off (top_p=1).',
  ]


def test_what_agrees_says_nothing():
  agreed = Sampling(max_new_tokens=8, temperature=0.6, top_k=20, top_p=0.95)
  assert sampling_notes(QWEN3, agreed) == []
  assert sampling_notes({}, agreed) == []
  neutral = {
    'do_sample': True,
    'temperature': 1,
    'top_k': 0,
    'top_p': 1,
    'min_p': None,
    'repetition_penalty': 1.0,
    'num_beams': 1,
    'suppress_tokens': [],
    'typical_p': 1.0,
    'num_return_sequences': 1,
  }
  assert sampling_notes(neutral, Sampling(max_new_tokens=8)) == []


def test_greedy_or_not():
  (note,) = sampling_notes({'do_sample': False}, Sampling(max_new_tokens=8))
  assert note == 'generation_config.json says do_sample=False; used here: sampling.'
  (note,) = sampling_notes({'do_sample': True}, Sampling(max_new_tokens=8, temperature=0))
  assert note.endswith('used here: greedy decoding (temperature=0).')


def test_settings_that_the_sampler_lacks():
  theirs = {
    'repetition_penalty': 1.1,
    'no_repeat_ngram_size': 3,
    'num_beams': 4,
    'suppress_tokens': [7],
    'min_p': 0.1,
    'max_new_tokens': 2048,
    'forced_eos_token_id': 2,
  }
  notes = sampling_notes(theirs, Sampling(max_new_tokens=8))
  assert len(notes) == len(theirs)
  for note, name in zip(notes, theirs):
    assert f' says {name}=' in note and 'used here:' in note
  assert notes[0].endswith('used here: none, the sampler has no such setting.')
  assert notes[5].endswith('used here: 8.')


def test_stop_ids_of_both_sources():
  assert stop_ids_from(151645, QWEN3) == (151643, 151645)
  assert stop_ids_from(2, {'eos_token_id': 2}) == (2,)
  assert stop_ids_from([5, 3], None) == (3, 5)
  assert stop_ids_from(None, {'eos_token_id': 0}) == (0,)
  assert stop_ids_from(0) == (0,)
  assert stop_ids_from(2, {'eos_token_id': [None, 5]}) == (2, 5)
  assert stop_ids_from(None, {}) == ()


def test_warning_when_student_and_teacher_stop_elsewhere():
  assert stop_ids_warning((151643, 151645), [151645, 151643]) is None
  warning = stop_ids_warning([151643], [151645, 151643])
  assert '[151643]' in warning and '[151643, 151645]' in warning
