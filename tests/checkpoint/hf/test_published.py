"""What an import gives, against a reader of the published layout of its own."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import errors
from dsv3_jax.checkpoint import source as sources
from dsv3_jax.checkpoint.hf import exporter
from dsv3_jax.checkpoint.hf import reader as hf_reader
from dsv3_jax.checkpoint.safetensors import reader as shards
from experiments import base
from tests import tolerances
from tests.checkpoint.hf import exchanged, published
from tests.oracles import model as oracle


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('beyond one block', 'fp8'),  # partial blocks, cut by heads
    pytest.param(
      *('16 experts, 2 groups, 2 shared, 2 MTP', 'fp8'),
      marks=pytest.mark.nightly,
    ),
    ('no q_lora, 1 group, no dense', 'bfloat16'),
  ],
)
def test_logits_are_the_oracle_s(name, dtype, tmp_path):
  """Of t_{i+1} and, from the MTP module, of t_{i+2}; float64 on the files.

  The oracle's weights come by the published names; the table has no part in it.
  """
  cfg = exchanged.make(name)
  folder = exchanged.write(
    cfg, *exchanged.random_weights(cfg), tmp_path / 'a', dtype
  )
  body = json.loads((folder / 'config.json').read_text())
  weights = published.weights(published.read(folder), body)
  got = dsv3_jax.load(folder)
  rng = np.random.default_rng(1)
  tokens_BT = rng.integers(0, cfg.model.vocab_size, (2, 21))
  main, deeper = got.logits(tokens_BT), got.mtp_logits(tokens_BT)
  settings = oracle.settings_of(cfg.model)
  for b, tokens_T in enumerate(tokens_BT):
    main_TV, deeper_TV, _ = oracle.forward(weights, tokens_T, settings)
    tolerances.assert_close(main[b], main_TV)
    # Position i sees t_{i+1}; the last has none.
    tolerances.assert_close(deeper[b, :-1], deeper_TV[0])


@pytest.mark.parametrize('dtype', ['fp8', 'bfloat16'])
def test_the_inference_code_s_layout_is_read(dtype, tmp_path):
  """`attn.wq_a`, `ffn.experts.0.w1`, `.scale`; it has no MTP layer."""
  cfg = exchanged.make('beyond one block')
  source = exchanged.write(
    cfg, *exchanged.random_weights(cfg), tmp_path / 'a', dtype
  )
  with shards.Folder(source) as folder:
    renamed = {
      published.official_name(name): folder.read(name)
      for name in folder.entries
      if f'layers.{cfg.model.num_layers}.' not in name
    }
  assert {
    'embed.weight', 'norm.weight', 'head.weight', 'layers.0.attn_norm.weight',
    'layers.0.attn.wkv_a.weight', 'layers.0.attn.kv_norm.weight',
    'layers.0.ffn.w2.weight', 'layers.1.ffn.gate.bias',
    'layers.1.ffn.experts.0.w1.weight', 'layers.1.ffn.shared_experts.w3.weight',
  } <= renamed.keys()  # fmt: skip
  assert (dtype == 'fp8') == ('layers.1.ffn.experts.0.w2.scale' in renamed)
  (tmp_path / 'b').mkdir()
  exchanged.put(tmp_path / 'b' / 'model0-mp1.safetensors', renamed)
  body = (source / 'config.json').read_text()
  (tmp_path / 'b' / 'config.json').write_text(body)
  got, want = dsv3_jax.load(tmp_path / 'b'), dsv3_jax.load(source)
  assert got.config.model.mtp.depth == 0
  kept = {key: want.params[key] for key in got.params}
  assert want.params.keys() - kept.keys() == {'mtp_0'}
  jax.tree.map(np.testing.assert_array_equal, got.params, kept)
  np.testing.assert_array_equal(
    got.router_biases['moe'], want.router_biases['moe']
  )


@pytest.fixture(scope='module')
def in_fp8(tmp_path_factory):
  """A model in FP8 whose matrices have several blocks; not to be changed."""
  cfg = exchanged.make('beyond one block')
  weights = exchanged.random_weights(cfg)
  path = tmp_path_factory.mktemp('fp8') / 'a'
  return exchanged.write(cfg, *weights, path, 'fp8')


def exported_again(folder, output):
  """FP8 stays as it is on the way."""
  settings = base.get_config().to_dict()
  with sources.open_source(folder, settings, keep_fp8=True) as (cfg, leaves):
    exporter.export(cfg, leaves, output, dtype='fp8')
  return output


def same_numbers(folder, other):
  got, want = published.read(folder), published.read(other)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


_WEIGHT = 'model.layers.1.self_attn.kv_b_proj.weight'  # [304, 136]


def test_scales_in_bf16_are_read(in_fp8, tmp_path):
  """As the same numbers in f32, which is how they are exported."""
  folder = shutil.copytree(in_fp8, tmp_path / 'a')

  def change(arrays):
    for name, array in arrays.items():
      if name.endswith('_scale_inv'):
        arrays[name] = array.astype(ml_dtypes.bfloat16)

  exchanged.rewrite(folder, change)
  same_numbers(exported_again(folder, tmp_path / 'b'), folder)
  tensors = published.read(folder)
  with shards.Folder(folder) as opened:
    got = hf_reader.read_rows(opened, _WEIGHT, slice(3, 200))
  np.testing.assert_array_equal(got, tensors[_WEIGHT][3:200])


@pytest.mark.parametrize('zero', [0x00, 0x80])
def test_a_scale_of_0_is_that_of_a_block_of_zeros(in_fp8, tmp_path, zero):
  """Zeros of either sign; one other number in the block, and it is refused."""
  folder = shutil.copytree(in_fp8, tmp_path / 'a')

  def change(arrays, last=zero):
    codes = arrays[_WEIGHT].view(np.uint8)
    codes[256:, 128:] = zero  # the last block, a partial one
    codes[-1, -1] = last
    arrays[_WEIGHT + '_scale_inv'][2, 1] = 0.0

  exchanged.rewrite(folder, change)
  same_numbers(exported_again(folder, tmp_path / 'b'), folder)
  with shards.Folder(folder) as opened:
    got = hf_reader.read_rows(opened, _WEIGHT, slice(200, 304))
  want = published.read(folder)[_WEIGHT][200:].astype(np.float32)
  np.testing.assert_array_equal(got, want)
  folder = shutil.copytree(in_fp8, tmp_path / 'other')
  exchanged.rewrite(folder, lambda arrays: change(arrays, 0x01))
  with pytest.raises(errors.InputError, match=r'the scale 0\.0 at \[2, 1\]'):
    exported_again(folder, tmp_path / 'c')


def test_an_index_may_have_no_metadata(in_fp8):
  """`"metadata": null`, as some tools write it."""
  path = in_fp8 / shards.INDEX
  body = json.loads(path.read_text())
  try:
    for metadata in (None, {}):
      path.write_text(json.dumps(body | {'metadata': metadata}))
      with shards.Folder(in_fp8) as opened:
        assert opened.entries.keys() == body['weight_map'].keys()
    path.write_text(json.dumps(body | {'metadata': 1}))
    with pytest.raises(errors.InputError, match='metadata'):
      shards.Folder(in_fp8)
  finally:
    path.write_text(json.dumps(body))
