"""Small models that llama.cpp takes, their files, and llama.cpp itself."""

import functools
import json
import sysconfig
import urllib.request

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import xllamacpp

from dsv3_jax.checkpoint.gguf import exporter
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.nn import model
from tests.checkpoint.hf import exchanged

# Rows of Q8_0 are multiples of 32. No two dims of a matrix are equal.
SHAPE = {
  'model__norm_eps': 1e-6,  # llama.cpp has one of all norms
  'model__vocab_size': 544,
  'model__d_model': 64,
  'model__d_ff': 96,
  'model__moe__d_ff': 32,
  'model__mla__kv_lora_rank': 64,
  'model__mla__q_lora_rank': 96,
  'model__mla__qk_nope_head_dim': 32,
  'model__mla__qk_rope_head_dim': 16,
  'model__mla__v_head_dim': 24,
}


def make(name, **changes):
  return exchanged.make(name, **(SHAPE | changes))


def weights(cfg):
  """f32 parameters and router biases of a model whose text does not repeat.

  Like a trained one, it prefers some token after each, none of them special.
  Of random weights alone, greedy tokens soon go in circles.
  """
  params, router_biases = exchanged.random_weights(cfg)
  depth = cfg.model.num_layers  # whose outputs the embedding must outweigh
  embed_VD = 4.0 * (depth / 3) ** 0.5 * params['embed']['w']
  first = len(tokenizers.SPECIAL)
  order = np.random.default_rng(3).permutation(cfg.model.vocab_size - first)
  head_VD = jnp.zeros_like(embed_VD)
  before, after = first + order, first + np.roll(order, 1)
  head_VD = head_VD.at[after].set(embed_VD[before])
  params['embed']['w'] = embed_VD
  params['head']['w'] = 4.0 * params['head']['w'] + 0.5 * head_VD.T
  return params, router_biases


def train_tokenizer():
  """512 tokens, of code."""
  with open(sysconfig.get_path('stdlib') + '/textwrap.py') as stream:
    text = stream.read()
  return tokenizers.train([text], 512)


def write(cfg, params, router_biases, path, tokenizer, **options):
  leaves = exchanged.leaves_of(params, router_biases)
  exporter.export(cfg, leaves, path, tokenizer=tokenizer, **options)
  return path


def read(path):
  """Every tensor by name, dequantised, dims as NumPy has them."""
  return {
    x.name: gguf.quants.dequantize(x.data, x.tensor_type).reshape(x.shape[::-1])
    for x in gguf.GGUFReader(path).tensors
  }


class Llama:
  """A server of llama.cpp in this process, with a cache in f32."""

  def __init__(self, path):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 128, 1
    params.warmup = params.fit_params = False
    kind = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_k = params.cache_type_v = kind
    flash = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    self._server = xllamacpp.Server(params)

  def post(self, path, **body):
    url = self._server.listening_address + path
    kind = {'Content-Type': 'application/json'}
    request = urllib.request.Request(url, json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request) as answer:
      return json.load(answer)

  def greedy(self, prompt_ids, count):
    """Ids of a greedy continuation."""
    answer = self._complete(prompt_ids, n_predict=count, return_tokens=True)
    return answer['tokens']

  def log_probs(self, prompt_ids, vocab_size):
    """f64[V] of the next token."""
    # A letter is the token, as one that is no UTF-8 would not be listed.
    forced = {'n_predict': 1, 'logit_bias': [['a', 1e4]]}
    answer = self._complete(prompt_ids, n_probs=vocab_size, **forced)
    out_V = np.full(vocab_size, np.nan)
    for entry in answer['completion_probabilities'][0]['top_logprobs']:
      out_V[entry['id']] = entry['logprob']
    return out_V

  def tokenize(self, text, **options):
    return self.post('/tokenize', content=text, **options)['tokens']

  def _complete(self, prompt_ids, **options):
    options |= {'temperature': 0, 'cache_prompt': False}
    return self.post('/completion', prompt=list(prompt_ids), **options)


def our_log_probs(cfg, params, router_biases, ids):
  """f32[T, V] of the token after each."""
  padded = [*ids, *[0] * (cfg.model.max_seq_len - len(ids))]
  batch = exchanged.batch_of(np.array([padded]))
  logits_BTV, _ = _forward(cfg)({'params': params}, batch, router_biases)
  return np.asarray(jax.nn.log_softmax(logits_BTV[0], axis=-1))[: len(ids)]


@functools.cache
def _forward(cfg):
  """One program for prompts of all lengths."""
  return jax.jit(model.build(cfg).apply)
