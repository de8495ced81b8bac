"""A check from outside: transformers' DeepseekV3ForCausalLM, in PyTorch.

Both directions go through the file that users exchange: safetensors with the
published names. The two agree where the report and transformers agree: latent
norms' eps is 1e-6 there whatever the config says, so eps is 1e-6 here; YaRN is
written only where it acts; its 1e-20 in the gates' normaliser is below f32.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from dsv3_jax.checkpoint import hf
from dsv3_jax.inference import engine
from dsv3_jax.nn import model
from tests import settings
from tests.nn import models

torch.set_num_threads(1)

_SHAPE = {
  'precision': 'f32',
  'model__vocab_size': 64,
  'model__d_model': 48,
  'model__d_ff': 40,
  'model__norm_eps': 1e-6,
  'model__mla__qk_nope_head_dim': 8,
  'model__mla__qk_rope_head_dim': 8,
  'model__mla__v_head_dim': 12,
  'model__mla__kv_lora_rank': 16,
  'model__mla__q_lora_rank': 24,
  'model__mla__num_heads': 4,
  'model__moe__d_ff': 24,
  'model__mtp__depth': 1,
}
_YARN = {'model__rope__original_seq_len': 8, 'model__max_seq_len': 64}
_PLAIN = {'model__rope__original_seq_len': 64, 'model__max_seq_len': 64}
CASES = {
  'plain': _PLAIN,
  'yarn': _YARN,
  'yarn, mscale 0.707': _YARN
  | {
    'model__rope__mscale': 0.707,
    'model__rope__mscale_all_dim': 0.707,
  },
  'no q_lora': _PLAIN | {'model__mla__q_lora_rank': 0},
  'no q_lora, yarn': _YARN | {'model__mla__q_lora_rank': 0},
  '16 experts, 2 shared': _PLAIN
  | {
    'model__moe__num_experts': 16,
    'model__moe__num_shared_experts': 2,
    'model__moe__top_k': 4,
  },
  'unrolled, 2 dense': _PLAIN
  | {
    'model__scan_layers': False,
    'model__num_layers': 4,
    'model__num_dense_layers': 2,
  },
}
pytestmark = pytest.mark.filterwarnings(
  # transformers' own imports
  'ignore::DeprecationWarning',
  'ignore::FutureWarning',
)


def make(name):
  return settings.small(**(_SHAPE | CASES[name]))


def theirs(cfg):
  """An empty model of transformers with the shape of ours."""
  hf_cfg = transformers.DeepseekV3Config(**hf.hf_config(cfg))
  hf_cfg._attn_implementation = 'eager'
  return modeling_deepseek_v3.DeepseekV3ForCausalLM(hf_cfg).eval()


def randomise(net, seed):
  """Random weights and biases; norms too, as ones would hide their absence."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, w in [*net.named_parameters(), *net.named_buffers()]:
      if 'inv_freq' in name:
        continue
      w.normal_(0.0, 0.15, generator=generator)
      if 'norm' in name:
        w += 1.0
  return net


def read(folder):
  """All tensors of a folder that `save_pretrained` wrote."""
  tensors = {}
  for path in folder.glob('*.safetensors'):
    tensors |= safetensors.numpy.load_file(path)
  return tensors


def batch_of(cfg, shape=(2, 24), seed=3):
  rng = np.random.default_rng(seed)
  tokens_BT = rng.integers(1, cfg.model.vocab_size, shape).astype(np.int32)
  ones = np.ones(shape, np.int32)
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  fields = (tokens_BT, tokens_BT, positions, ones, ones.astype(np.float32))
  return model.Batch(*map(jnp.asarray, fields)), tokens_BT


@pytest.mark.parametrize('name', CASES)
def test_logits_of_transformers_weights(name, tmp_path):
  """theirs -> save_pretrained -> ours: logits within 1e-4, f32."""
  cfg = make(name)
  without_mtp = dataclasses.replace(
    cfg.model, mtp=dataclasses.replace(cfg.model.mtp, depth=0)
  )
  cfg = dataclasses.replace(cfg, model=without_mtp)
  net = randomise(theirs(cfg), seed=0)
  net.save_pretrained(tmp_path)
  tensors = read(tmp_path)
  params, router = hf.from_hf(cfg, tensors, tensors.__getitem__)
  batch, tokens_BT = batch_of(cfg)
  ours, _ = models.logits(cfg)(params, router, batch)
  with torch.no_grad():
    want = net(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
  assert np.std(want) > 0.1
  np.testing.assert_allclose(np.asarray(ours), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['plain', 'yarn', 'unrolled, 2 dense'])
def test_transformers_loads_ours(name, tmp_path):
  """ours -> safetensors -> from_pretrained: logits within 1e-4, same greedy."""
  cfg = make(name)
  draw = models.random_params(cfg)
  params, router = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), draw)
  tensors = dict(hf.to_hf(cfg.model, params, router))
  file = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  body = json.dumps(hf.hf_config(cfg))
  (tmp_path / 'config.json').write_text(body, encoding='utf-8')
  net = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation='eager', dtype=torch.float32
  )
  batch, tokens_BT = batch_of(cfg)
  ours, _ = models.logits(cfg)(params, router, batch)
  prompt = torch.tensor(tokens_BT, dtype=torch.long)
  with torch.no_grad():
    want = net(prompt).logits.numpy()
    ids = net.generate(
      prompt,
      do_sample=False,
      max_new_tokens=32,
      pad_token_id=0,
      eos_token_id=None,
    )
  np.testing.assert_allclose(np.asarray(ours), want, rtol=0, atol=1e-4)
  made = engine.Engine(cfg, params, router).generate(tokens_BT.tolist(), 32)
  assert made.tokens == ids[:, tokens_BT.shape[1] :].tolist()


@pytest.mark.parametrize('name', CASES)
def test_table_is_bijective(name):
  """Every element of every leaf goes to exactly one tensor that is no copy."""
  cfg = make(name)
  draw = models.random_params(cfg)
  params, router = jax.tree.map(np.float32, draw)
  tensors = dict(hf.to_hf(cfg.model, params, router))
  assert len(tensors) == len(hf.table(cfg.model))
  back = hf.from_hf(cfg, tensors, tensors.__getitem__)
  jax.tree.map(np.testing.assert_array_equal, back, (params, router))
  copies = {t.name for t in hf.table(cfg.model) if t.copy}
  size = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))
  unique = {n: x for n, x in tensors.items() if n not in copies}
  assert size(unique) == size((params, router))


def test_missing_and_misshapen_tensors_are_named():
  cfg = make('plain')
  params, router = jax.tree.map(np.float32, models.random_params(cfg))
  tensors = dict(hf.to_hf(cfg.model, params, router))
  name = 'model.layers.1.self_attn.kv_b_proj.weight'
  for value, said in ((None, 'missing'), (np.zeros((2, 3)), 'wanted')):
    broken = {n: x for n, x in tensors.items() if n != name}
    if value is not None:
      broken[name] = value
    with pytest.raises(ValueError, match=f'{name}.*{said}'):
      hf.from_hf(cfg, broken, broken.__getitem__)
