"""generation_config.json: ends of answers, defaults, what is refused."""

import json
import re

import pytest

from dsv3_jax import errors
from dsv3_jax.checkpoint.hf import generation_config


def write(folder, name, body):
  (folder / name).write_text(json.dumps(body))


@pytest.mark.parametrize(
  ('generation', 'model', 'want'),
  [
    ({'eos_token_id': 5}, {'eos_token_id': 1}, (5,)),
    ({'eos_token_id': [1, 6]}, None, (1, 6)),
    ({'temperature': 1}, {'eos_token_id': [3, 4]}, (3, 4)),
    ({'eos_token_id': None}, {'eos_token_id': 1}, (1,)),
    (None, {'eos_token_id': 1}, (1,)),
    (None, {}, None),
    (None, None, None),
  ],
)
def test_which_tokens_end_an_answer(tmp_path, generation, model, want):
  if generation is not None:
    write(tmp_path, 'generation_config.json', generation)
  if model is not None:
    body = {'model_type': 'deepseek_v3'} | model
    write(tmp_path, 'config.json', body)
  assert generation_config.read(tmp_path).eos_ids == want


def test_the_settings_of_a_workdir_name_no_token(tmp_path):
  write(tmp_path, 'config.json', {'eos_token_id': 1})
  assert generation_config.read(tmp_path).eos_ids is None


@pytest.mark.parametrize(
  ('body', 'want'),
  [
    ({}, {}),
    ({'do_sample': True, 'temperature': 0.6}, {'temperature': 0.6}),
    ({'do_sample': False, 'temperature': 0.6}, {'temperature': 0.0}),
    (
      {'do_sample': False, 'top_p': 0.9, 'repetition_penalty': 1.1},
      {'temperature': 0.0, 'repetition_penalty': 1.1},
    ),
    (
      {'temperature': 1, 'top_p': 0.9, 'top_k': 20, 'min_p': 0.1},
      {'temperature': 1.0, 'top_p': 0.9, 'top_k': 20, 'min_p': 0.1},
    ),
    ({'top_k': -1, 'temperature': None, 'max_length': 9}, {'top_k': 0}),
  ],
)
def test_defaults_of_sampling(tmp_path, body, want):
  write(tmp_path, 'generation_config.json', body)
  got = generation_config.read(tmp_path).sampling
  assert got == want
  assert all(type(got[name]) is type(want[name]) for name in want)


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    ({'temperature': -1}, 'temperature=-1 must be in [0, 100]'),
    ({'temperature': 'hot'}, "temperature='hot' must be in [0, 100]"),
    ({'temperature': True}, 'temperature=True must be in [0, 100]'),
    ({'top_p': 0}, 'top_p=0 must be in (0, 1]'),
    ({'top_p': float('nan')}, 'top_p=nan must be in (0, 1]'),
    ({'top_k': 1.5}, 'top_k=1.5 must be an integer >= -1'),
    ({'min_p': 2}, 'min_p=2 must be in [0, 1]'),
    ({'repetition_penalty': 0}, 'repetition_penalty=0 must be in [0.01, 100]'),
    ({'do_sample': 'no'}, "do_sample='no' must be true or false"),
    ({'eos_token_id': 'end'}, "eos_token_id='end' must be an id or a list"),
    ({'eos_token_id': [1, -1]}, 'eos_token_id=[1, -1] must be an id or a list'),
    ({'eos_token_id': [True]}, 'eos_token_id=[True] must be an id or a list'),
  ],
)
def test_bad_values_are_one_line(tmp_path, body, expected):
  write(tmp_path, 'generation_config.json', body)
  with pytest.raises(errors.InputError, match=re.escape(expected)) as caught:
    generation_config.read(tmp_path)
  assert f'{tmp_path}/generation_config.json: ' in str(caught.value)
