"""Counts against the published figures and against the real modules."""

import pytest

from dsv3_jax import config
from dsv3_jax.planning import flops
from experiments import v3_16b, v3_671b
from tests import settings


def test_published_figures_of_671b():
  cfg = config.from_config_dict(v3_671b.get_config())
  summary = flops.inspect_dict(cfg.model, 4096)
  assert summary['parameters'] == {
    'main': 671_026_419_200,
    'router_bias': 58 * 256,
    'mtp_stored': 13_463_426_304,
    'mtp_unique': 11_610_068_224,
    'active': 37_552_282_624,
    'active_without_embedding': 36_625_603_584,
  }
  # 61 layers, latent 512 and rotary key 64, two bytes each.
  assert summary['kv_bytes_per_token'] == 61 * (512 + 64) * 2 == 70_272
  flop = summary['flops_per_token']
  assert flop['causal'] == pytest.approx(250.456e9, rel=1e-5)
  assert flop['non_causal'] == pytest.approx(281.158e9, rel=1e-5)
  assert flop['mtp'] == pytest.approx(10.19e9, rel=1e-3)


def test_16b():
  cfg = config.from_config_dict(v3_16b.get_config())
  summary = flops.inspect_dict(cfg.model, 4096)
  assert summary['parameters']['main'] == 15_706_484_224 + 26 * 64
  assert summary['flops_per_token']['causal'] == pytest.approx(16.4e9, rel=5e-3)


def test_flop_of_every_product_of_a_tiny_model():
  """2 FLOP a multiplication, one forward and two backward passes."""
  cfg = settings.small(model__mtp__depth=0).model
  m, moe, length = cfg.mla, cfg.moe, 12
  heads, dim = m.num_heads, cfg.d_model
  attention = dim * m.q_lora_rank + m.q_lora_rank * heads * m.qk_head_dim
  attention += dim * (m.kv_lora_rank + m.qk_rope_head_dim)
  attention += m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
  attention += heads * m.v_head_dim * dim
  dense = 3 * dim * cfg.d_ff
  routed = dim * moe.num_experts
  routed += (moe.top_k + moe.num_shared_experts) * 3 * dim * moe.d_ff
  products = cfg.num_layers * attention + dense
  products += cfg.num_moe_layers * routed + dim * cfg.vocab_size
  norms = cfg.num_layers * (2 * dim + m.q_lora_rank + m.kv_lora_rank) + dim
  keys = heads * (m.qk_head_dim + m.v_head_dim) * length / 2
  want = 6 * (products + norms + cfg.num_layers * keys)
  assert flops.flops_per_token(cfg, length) == want


def test_render_names_the_parts():
  cfg = config.from_config_dict(v3_671b.get_config())
  text = flops.render(cfg.model, 4096)
  for figure in ('671,026,419,200', '70,272', '250.5'):
    assert figure in text
