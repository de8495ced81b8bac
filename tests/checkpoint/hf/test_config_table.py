"""The table of `config.json`'s keys in the guide says what the code does."""

import importlib
import json
import pathlib
import re

import pytest

from dsv3_jax import errors
from dsv3_jax.checkpoint.hf import config as hf_config
from dsv3_jax.checkpoint.hf import importer, rope_config
from experiments import base
from tests.checkpoint.hf import published_configs

PAGE = pathlib.Path(__file__).resolve().parents[3] / 'docs/checkpoints.md'
_ROW = re.compile(r'^\| `(\w+)` \| (used|must|no effect)(.*) \|$', re.MULTILINE)
ROWS = {key: (kind, more) for key, kind, more in _ROW.findall(PAGE.read_text())}
GATES = hf_config.GATES
BASE = base.get_config().to_dict()


def keys(kind):
  return {key for key, row in ROWS.items() if row[0] == kind}


def test_the_table_has_the_code_s_lists():
  must = {'quantization_config', *hf_config.FIXED, *hf_config.DERIVED}
  must |= {*GATES['sigmoid'], *GATES['softmax']} - {'norm_topk_prob'}
  assert keys('must') == must
  assert keys('used') == {*hf_config.FIELDS, *rope_config.FIELDS}
  assert keys('no effect') == {*hf_config.IGNORED}
  for key, name in hf_config.FIELDS.items():
    assert f'`model.{name}`' in ROWS[key][1]
  for fixed in (hf_config.FIXED, *GATES.values()):
    for key, values in fixed.items():
      for value in filter(lambda value: value is not None, values):
        assert f'`{json.dumps(value)}`' in ROWS[key][1], key


def test_the_table_has_all_keys_of_published_models():
  for body in published_configs.CONFIGS.values():
    assert body.keys() <= ROWS.keys()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('name', ['DeepseekV3Config', 'DeepseekV2Config'])
def test_the_table_has_all_attributes_of_transformers(name, tmp_path):
  """Their defaults, with the numbers that they lack, are read."""
  cls = getattr(importlib.import_module('transformers'), name)
  body = cls(num_experts_per_tok=4, n_group=1, topk_group=1).to_dict()
  assert body.keys() <= ROWS.keys()
  private = {'_output_attentions', '_post_init_done'}
  own = {key for key in vars(cls()) if 'implementation' not in key}
  assert own - private <= ROWS.keys()
  read(tmp_path, body)


def read(folder, body):
  path = folder / 'config.json'
  path.write_text(json.dumps(body))
  return importer.read_config_alone(path, BASE).model


# Two legal values of a key that change something.
_OTHER = {
  'rope_scaling': None,
  'num_attention_heads': 2,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 7},
  'rope_theta': 7,
  'norm_topk_prob': False,
  'max_position_embeddings': 8192,
  'qk_rope_head_dim': 32,
  'n_group': 16,
  'n_routed_experts': 512,
}


@pytest.mark.parametrize('key', sorted(ROWS))
def test_a_key_does_what_the_table_says(key, tmp_path):
  """Of DeepSeek-V3, with another value for it."""
  body = dict(published_configs.CONFIGS['DeepSeek-V3'])
  want, kind = read(tmp_path, body), ROWS[key][0]
  if kind == 'no effect':
    for value in (None, 17, 'x', [1], {'a': 1}):
      assert read(tmp_path, body | {key: value}) == want
  elif kind == 'used':
    other = _OTHER[key] if key in _OTHER else 2 * body[key]
    body['num_key_value_heads'] = None  # which would follow the other
    if key == 'rope_parameters':  # which stands in place of these
      body['rope_scaling'] = body['rope_theta'] = None
    assert read(tmp_path, body | {key: other}) != want
  else:
    for value in (17, 'x'):
      with pytest.raises(errors.InputError, match=f'{key}='):
        read(tmp_path, body | {key: value})
