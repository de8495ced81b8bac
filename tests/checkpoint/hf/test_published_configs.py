"""Published models: configs in full size, tiny models of the same keys."""

import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import errors
from dsv3_jax.checkpoint.hf import exporter, importer
from dsv3_jax.cli import main as cli
from experiments import base
from tests import nightly, tolerances
from tests.checkpoint.hf import exchanged, published, published_configs
from tests.oracles import model as oracle

ROOT = pathlib.Path(__file__).resolve().parents[3]
BASE = base.get_config().to_dict() | {'precision': 'f32'}
CONFIGS = published_configs.CONFIGS
_LITE, _KIMI, _V3 = 'DeepSeek-V2-Lite', 'Kimi-K2', 'DeepSeek-V3'
_MOONLIGHT = 'Moonlight-16B-A3B'
_V3_SIZES = (671.0e9, 37.6e9, 'fp8', 91_991)
# Parameters, active ones, dtype and tensors of the published files. The 16B and
# Kimi-K2 by hand: tensors of the model, of each layer's attention, of the dense
# layer, then of each MoE layer; and scales of its matrices.
SIZES = {
  'DeepSeek-V3': _V3_SIZES,
  'DeepSeek-V3.1': _V3_SIZES,
  'DeepSeek-R1': _V3_SIZES,
  _LITE: (15.7e9, 2.66e9, 'bfloat16', 3 + 27 * 7 + 3 + 26 * (4 + 64 * 3)),
  _MOONLIGHT: (
    *(15.96e9, 2.9e9, 'bfloat16'),
    3 + 27 * 7 + 3 + 26 * (5 + 64 * 3),
  ),
  _KIMI: (
    *(1.026e12, 32.9e9, 'fp8'),
    (3 + 61 * 9 + 3 + 60 * (5 + 384 * 3)) + 61 * 5 + 3 + 60 * (3 + 384 * 3),
  ),
}


def written(folder, body):
  """A config.json in a folder of its own."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(body))
  return folder


@pytest.mark.parametrize('name', nightly.daily(CONFIGS, _KIMI))
def test_sizes_are_the_published_ones(name, tmp_path, capsys):
  """`dsv3 inspect` and `dsv3 manifest` of a config.json alone."""
  folder = written(tmp_path / 'a', CONFIGS[name])
  total, active, dtype, count = SIZES[name]
  assert not cli.main(['inspect', f'--hf={folder}', '--json'])
  sizes = json.loads(capsys.readouterr().out)['parameters']
  assert sizes['main'] == pytest.approx(total, rel=2e-3)
  assert sizes['active'] == pytest.approx(active, rel=2e-2)
  path = folder / 'config.json'
  assert not cli.main(['manifest', f'--hf={path}', f'--dtype={dtype}'])
  rows = [line.split('\t') for line in capsys.readouterr().out.splitlines()]
  assert len({row[0] for row in rows}) == len(rows) == count
  values = 0
  for row_name, _, shape in rows:
    if not row_name.endswith('_scale_inv'):
      values += np.prod([int(n) for n in shape.split('x')])
  has_biases = CONFIGS[name]['scoring_func'] == 'sigmoid'
  want = sizes['main'] + sizes['mtp_stored']
  assert values == want - (0 if has_biases else sizes['router_bias'])


def model_of(name, folder, dtype='float32', **changes):
  """A tiny model's settings and a folder of it, with the published keys."""
  body = published_configs.tiny(name) | changes
  cfg = importer.read_config_alone(written(folder / 'only', body), BASE)
  params, router_biases = exchanged.random_weights(cfg)
  if cfg.model.moe.score_func == 'softmax':
    router_biases = jax.tree.map(np.zeros_like, router_biases)
  exchanged.write(cfg, params, router_biases, folder / 'out', dtype)
  exported = json.loads((folder / 'out' / 'config.json').read_text())
  if not body.get('quantization_config'):
    assert 'quantization_config' not in exported
  (folder / 'out' / 'config.json').write_text(json.dumps(body))
  return cfg, body, folder / 'out', exported


def tokens_of(body, shape=(2, 21)):
  return np.random.default_rng(1).integers(0, body['vocab_size'], shape)


def check_logits(folder, body):
  """What `load` gives against the float64 oracle of config and tensors."""
  loaded, tokens_BT = dsv3_jax.load(folder), tokens_of(body)
  weights = published.weights(published.read(folder), body)
  settings = published.settings(body)
  got = loaded.logits(tokens_BT)
  for b, tokens_T in enumerate(tokens_BT):
    want_TV, _, _ = oracle.forward(weights, tokens_T, settings)
    assert np.std(want_TV) > 0.1
    tolerances.assert_close(got[b], want_TV)
  return loaded, got


@pytest.mark.parametrize('name', nightly.daily(CONFIGS, _LITE, _KIMI))
def test_tiny_models_are_the_oracle_s(name, tmp_path):
  """Logits from files that have the published keys; FP8 where those are."""
  is_fp8 = 'quantization_config' in CONFIGS[name]
  _, body, folder, _ = model_of(name, tmp_path, 'fp8' if is_fp8 else 'bfloat16')
  loaded, _ = check_logits(folder, body)
  net = loaded.config.model
  assert net.norm_eps == body['rms_norm_eps'] and net.latent_norm_eps == 1e-6
  assert net.mtp.depth == body.get('num_nextn_predict_layers', 0)


def test_yarn_of_two_numbers_has_the_defaults_of_others(tmp_path):
  """Only `factor` and the original length: mscale acts on cos and sin."""
  few = {'type': 'yarn', 'factor': 4, 'original_max_position_embeddings': 32}
  *_, body, folder, exported = model_of(_MOONLIGHT, tmp_path, rope_scaling=few)
  check_logits(folder, body)
  want = {'beta_fast': 32.0, 'beta_slow': 1.0, 'mscale': 1.0}
  want |= {'mscale_all_dim': 0.0, **few}
  assert exported['rope_scaling'] == want


def test_a_groupless_choice_ignores_groups(tmp_path):
  """V2's `greedy` takes the best experts of all groups."""
  body = CONFIGS[_LITE] | {'n_group': 8, 'topk_group': None}
  cfg = importer.read_config_alone(written(tmp_path / 'a', body), BASE)
  assert (cfg.model.moe.num_groups, cfg.model.moe.top_groups) == (1, 1)
  body |= {'topk_method': 'group_limited_greedy', 'topk_group': 3}
  cfg = importer.read_config_alone(written(tmp_path / 'b', body), BASE)
  assert (cfg.model.moe.num_groups, cfg.model.moe.top_groups) == (8, 3)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('case', ['greedy', 'groups', 'kimi', 'few'])
def test_transformers_agrees(case, tmp_path):
  """On our export and, on what it saves of that, we with it: within 1e-5."""
  transformers = importlib.import_module('transformers')
  torch = importlib.import_module('torch')
  torch.set_num_threads(1)
  name = {'kimi': _KIMI, 'few': _MOONLIGHT}.get(case, _LITE)
  changes = {'kimi': {'quantization_config': None}}.get(case, {})
  if case == 'groups':
    changes = {'topk_method': 'group_limited_greedy'}
    changes |= {'n_group': 4, 'topk_group': 2}
  if case == 'few':
    few = {'type': 'yarn', 'factor': 4, 'original_max_position_embeddings': 32}
    changes = {'rope_scaling': few}
  _, body, folder, exported = model_of(name, tmp_path, **changes)
  loaded = dsv3_jax.load(folder)
  tokens_BT = tokens_of(body)
  ours = loaded.logits(tokens_BT)
  if case == 'few':  # as in the published file, with nothing of ours
    exported['rope_scaling'] = few
  (folder / 'config.json').write_text(json.dumps(exported))
  net, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    attn_implementation='eager',
    dtype=torch.float32,
    output_loading_info=True,
  )
  assert not any(info.values()), info
  with torch.no_grad():
    want = net(torch.tensor(tokens_BT)).logits.numpy()
  assert np.std(want) > 0.1
  np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5)
  net.save_pretrained(tmp_path / 'theirs')
  again = dsv3_jax.load(tmp_path / 'theirs')
  assert again.config.model == loaded.config.model
  np.testing.assert_array_equal(again.logits(tokens_BT), ours)


@pytest.mark.nightly
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_transformers_drafts_with_our_mtp_layer(tmp_path):
  """In a model of 61 layers: all tensors are known, and tokens are its own."""
  transformers = importlib.import_module('transformers')
  torch = importlib.import_module('torch')
  torch.set_num_threads(1)
  widths = {'model__d_model': 24, 'model__d_ff': 16, 'model__moe__d_ff': 8}
  cfg = exchanged.make('plain', model__num_layers=61, **widths)
  folder = exchanged.write(
    cfg, *exchanged.random_weights(cfg), tmp_path / 'out', shard_bytes=10**9
  )
  net, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert not any(info.values()), info
  options = {'do_sample': False, 'pad_token_id': 0, 'eos_token_id': None}
  prompt = torch.tensor(tokens_of({'vocab_size': 64}, (1, 12)))
  run = lambda **more: net.generate(
    prompt, max_new_tokens=12, **options, **more
  ).tolist()
  assert run(use_mtp=True) == run()


@pytest.mark.parametrize(
  ('name', 'changes', 'expected'),
  [
    (_LITE, {'norm_topk_prob': True}, 'norm_topk_prob=True is not built'),
    (_LITE, {'scoring_func': 'sigmoid'}, "it must be 'softmax'"),
    (_LITE, {'topk_method': 'noaux_tc'}, "'group_limited_greedy' or 'greedy'"),
    (_V3, {'topk_method': 'greedy'}, "it must be 'noaux_tc'"),
    (_V3, {'scoring_func': 'softmax'}, "it must be 'sigmoid'"),
    (_V3, {'model_type': 'deepseek_v32'}, "'kimi_k2' or 'deepseek_v2'"),
    (_V3, {'model_type': ['deepseek_v3']}, 'is not built'),
    (_V3, {'index_topk': 2048}, 'index_topk=2048 is a field that is not known'),
    (_V3, {'num_hidden_layers': 10**9}, 'is more than 1000000'),
  ],
)
def test_what_is_not_built_is_named(tmp_path, name, changes, expected):
  folder = written(tmp_path / 'a', CONFIGS[name] | changes)
  with pytest.raises(errors.InputError) as caught:
    importer.read_config_alone(folder, BASE)
  assert str(caught.value).startswith(f'{folder}/config.json: ')
  assert expected in str(caught.value) and str(caught.value).isprintable()


_FP8 = CONFIGS[_V3]['quantization_config']


@pytest.mark.parametrize(
  'given',
  [
    None,
    _FP8 | {'scale_fmt': 'ue8m0'},  # V3.1's
    {'quant_method': 'fp8'},
    # transformers' own
    {'quant_method': 'fp8', 'activation_scheme': 'dynamic', 'dequantize': False,
     'weight_block_size': [128, 128], 'scale_fmt': 'float',
     'expert_dtype': 'fp8', 'modules_to_not_convert': ['lm_head'],
     'modules_to_convert': None},
  ],
)  # fmt: skip
def test_fp8_configs_that_say_the_same(tmp_path, given):
  body = CONFIGS[_V3] | {'quantization_config': given}
  read = importer.read_config_alone(written(tmp_path / 'a', body), BASE)
  plain = written(tmp_path / 'b', CONFIGS[_V3])
  assert read == importer.read_config_alone(plain, BASE)


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('fp8', 'must be an object or null'),
    ({}, 'must have a quant_method'),
    ({'quant_method': 'awq'}, "quant_method must be 'fp8'"),
    (_FP8 | {'fmt': 'e5m2'}, "fmt must be 'e4m3'"),
    (_FP8 | {'scale_fmt': 'e8'}, "scale_fmt must be 'float' or 'ue8m0'"),
    (_FP8 | {'expert_dtype': 'fp4'}, "expert_dtype must be 'fp8'"),
    (_FP8 | {'weight_block_size': [1, 128]}, 'must be [128, 128]'),
    (_FP8 | {'activation_scheme': 'static'}, "must be 'dynamic'"),
    (_FP8 | {'bits': 4}, "'bits' is not known here"),
  ],
)
def test_fp8_configs_that_are_not_built(tmp_path, given, expected):
  body = CONFIGS[_V3] | {'quantization_config': given}
  with pytest.raises(errors.InputError, match='quantization_config=') as caught:
    importer.read_config_alone(written(tmp_path / 'a', body), BASE)
  assert expected in str(caught.value)


_FEW = {'type': 'yarn', 'factor': 4, 'original_max_position_embeddings': 4096}


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ({'type': 'yarn', 'factor': 4}, "with ['factor', 'original_max_pos"),
    (_FEW | {'attention_factor': 1.5}, 'and no more than'),
    (_FEW | {'mscale': 1.0}, 'both of mscale and mscale_all_dim'),
    (_FEW | {'mscale_all_dim': 0.7}, 'both of mscale and mscale_all_dim'),
    (_FEW | {'mscale': 0.7, 'mscale_all_dim': 0}, 'is ambiguous'),
    (_FEW | {'mscale': 0, 'mscale_all_dim': 0}, 'must hold numbers > 0'),
    (_FEW | {'truncate': False}, 'truncate must be True'),
    (_FEW | {'partial_rotary_factor': 0.5}, 'partial_rotary_factor must be 1'),
    (_FEW | {'original_max_position_embeddings': 8192}, 'is ambiguous'),
    (_FEW | {'beta_fast': 1, 'beta_slow': 2}, 'beta_fast=1.0 must be >='),
  ],
)
def test_yarn_that_readers_disagree_on_is_refused(tmp_path, given, expected):
  body = CONFIGS[_MOONLIGHT] | {'rope_scaling': given}
  with pytest.raises(errors.InputError) as caught:
    importer.read_config_alone(written(tmp_path / 'a', body), BASE)
  assert expected in str(caught.value)


_NEW = {'rope_type': 'default', 'rope_theta': 7}


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'rope_parameters': _NEW}, r'rope_theta=50000\.0 is ambiguous: rope_par'),
    (
      {'rope_parameters': _NEW, 'rope_theta': 7, 'rope_scaling': _FEW},
      r'rope_scaling=.* is ambiguous beside rope_parameters',
    ),
    ({'rope_scaling': _NEW}, 'rope_theta=50000.0 is ambiguous: rope_scaling'),
    ({'rope_theta': None}, 'rope_scaling=None with rope_theta must hold num'),
  ],
)
def test_two_fields_of_rope_that_differ_are_refused(
  tmp_path, changes, expected
):
  """transformers takes the older field, or the inner theta; others do not."""
  folder = written(tmp_path / 'a', CONFIGS[_MOONLIGHT] | changes)
  with pytest.raises(errors.InputError, match=expected):
    importer.read_config_alone(folder, BASE)


@pytest.mark.parametrize(
  'changes',
  [
    {'rope_theta': 7, 'rope_parameters': _NEW},
    {'rope_theta': None, 'rope_parameters': _NEW},
    {'rope_theta': 7, 'rope_parameters': {'rope_type': 'default'}},
    {'rope_theta': None, 'rope_scaling': _NEW},
    {'rope_theta': 7},
  ],
)
def test_one_theta_wherever_it_stands(tmp_path, changes):
  folder = written(tmp_path / 'a', CONFIGS[_MOONLIGHT] | changes)
  rope = importer.read_config_alone(folder, BASE).model.rope
  assert (rope.theta, rope.factor) == (7, 1.0)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'model__moe__norm_topk': True}, r'model\.moe\.norm_topk=True must be'),
    (
      {
        'model__rope__original_seq_len': 8,
        'model__rope__mscale': 0.7,
        'model__rope__mscale_all_dim': 0.0,
      },
      r'model\.rope\.mscale=0\.7 must be 1\.0',
    ),
    ({}, 'router biases must be 0'),
  ],
)
def test_what_v2_s_format_cannot_say_is_not_exported(
  tmp_path, changes, expected
):
  gate = {'model__moe__score_func': 'softmax', 'model__moe__norm_topk': False}
  cfg = exchanged.make('plain', **(gate | changes))
  weights = exchanged.random_weights(cfg)
  with pytest.raises(errors.InputError, match=expected):
    exchanged.write(cfg, *weights, tmp_path / 'out')
  assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections
def test_both_of_config_and_hf_are_refused(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  folder = written(tmp_path / 'a', CONFIGS[_LITE])
  args = ['inspect', f'--hf={folder}', '--config=experiments/base.py']
  assert cli.main(args) == 2
  assert '--config and --hf are both given' in capsys.readouterr().err
  assert cli.main(['manifest', f'--hf={tmp_path / "no"}']) == 2
  assert 'no cannot be read' in capsys.readouterr().err


def test_every_dtype_has_a_manifest(tmp_path):
  """V2 in FP8 has no router biases either."""
  folder = written(tmp_path / 'a', published_configs.tiny(_LITE))
  cfg = importer.read_config_alone(folder, BASE)
  names = [spec.name for spec in exporter.manifest(cfg, 'fp8')]
  assert not any('e_score_correction_bias' in name for name in names)
