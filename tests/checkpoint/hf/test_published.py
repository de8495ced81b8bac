"""What an import gives, against a reader of the published layout of its own."""

import json

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.checkpoint.safetensors import reader as shards
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
