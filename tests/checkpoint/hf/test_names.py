"""A check from outside: transformers' DeepseekV3ForCausalLM, in PyTorch.

Both directions go through the folders that users exchange, several shards each.
`rms_norm_eps` is 1e-3, so that a latent norm that took it would show. YaRN is
written only where it acts; transformers' 1e-20 in the gates' normaliser is
below f32.
"""

import functools
import importlib
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from benchmarks.common import hf_tensors
from dsv3_jax import config
from dsv3_jax.checkpoint import fp8_blocks, lazy_array
from dsv3_jax.checkpoint.hf import config as hf_config
from dsv3_jax.checkpoint.hf import exporter
from dsv3_jax.checkpoint.hf import names as hf_names
from dsv3_jax.inference import engine, generate, model_runner
from dsv3_jax.nn import model
from experiments import v3_671b
from tests import nightly
from tests.checkpoint.hf import exchanged
from tests.nn import models

ROOT = pathlib.Path(__file__).resolve().parents[3]
_MSCALE = 'yarn, mscale 0.707, no q_lora'
_MANY = '16 experts, 2 groups, 2 shared, 2 MTP'
_FEW = 'no q_lora, 1 group, no dense'
pytestmark = pytest.mark.filterwarnings(
  # transformers' own imports
  'ignore::DeprecationWarning',
  'ignore::FutureWarning',
)


@pytest.fixture(scope='module')
def torch():
  """The module, of one thread; slow to import, as transformers is."""
  torch = importlib.import_module('torch')
  torch.set_num_threads(1)
  return torch


@pytest.fixture(scope='module')
def transformers(torch):
  return importlib.import_module('transformers')


def theirs(transformers, cfg):
  """An empty model of transformers with the shape of ours."""
  body = hf_config.write(cfg) | {'num_nextn_predict_layers': 0}
  hf_cfg = transformers.DeepseekV3Config(**body)
  hf_cfg._attn_implementation = 'eager'
  return transformers.DeepseekV3ForCausalLM(hf_cfg).eval()


def randomise(torch, net, seed):
  """Random weights and biases; norms too, as ones would hide their absence."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, w in [*net.named_parameters(), *net.named_buffers()]:
      if 'inv_freq' in name:
        continue
      w.normal_(0.0, net.config.hidden_size**-0.5, generator=generator)
      if 'norm' in name:
        w += 1.0
  return net


def tokens_of(cfg, shape=(2, 24), seed=3):
  rng = np.random.default_rng(seed)
  return rng.integers(1, cfg.model.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize('name', nightly.daily(exchanged.CASES, _MSCALE, _MANY))
def test_ours_reads_transformers(torch, transformers, name, tmp_path):
  """save_pretrained -> `load`: logits within 1e-5, f32; MTP is absent."""
  cfg = exchanged.make(name)
  net = randomise(torch, theirs(transformers, cfg), seed=0)
  net.save_pretrained(tmp_path, max_shard_size='60KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  ours = dsv3_jax.load(tmp_path)
  tokens_BT = tokens_of(cfg)
  with torch.no_grad():
    want = net(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
  assert np.std(want) > 0.1
  np.testing.assert_allclose(ours.logits(tokens_BT), want, rtol=0, atol=1e-5)
  loaded = ours.config.model
  assert loaded.mla == cfg.model.mla and loaded.mtp.depth == 0
  assert loaded.yarn == cfg.model.yarn and loaded.norm_eps == cfg.model.norm_eps


def read_by(torch, transformers, name, folder):
  """A model of ours, and what transformers reads of its export."""
  cfg = exchanged.make(name)
  params, router_biases = exchanged.random_weights(cfg)
  output = exchanged.write(cfg, params, router_biases, folder / 'out')
  net = transformers.AutoModelForCausalLM.from_pretrained(
    output, attn_implementation='eager', dtype=torch.float32
  )
  return cfg, params, router_biases, net


@pytest.mark.parametrize('name', nightly.daily(exchanged.CASES, _MSCALE))
def test_transformers_reads_ours(torch, transformers, name, tmp_path):
  """`export` -> from_pretrained: logits and latents within 1e-5."""
  cfg, params, router_biases, net = read_by(torch, transformers, name, tmp_path)
  tokens_BT = tokens_of(cfg)
  batch = exchanged.batch_of(tokens_BT)
  ours, _ = models.logits(cfg)(params, router_biases, batch)
  prompt = torch.tensor(tokens_BT, dtype=torch.long)
  with torch.no_grad():
    out = net(prompt, use_cache=True)
  np.testing.assert_allclose(ours, out.logits.numpy(), rtol=0, atol=1e-5)
  check_cached(cfg, params, router_biases, tokens_BT, out)


@pytest.mark.parametrize('name', nightly.daily(exchanged.CASES, _MSCALE))
def test_greedy_tokens_are_equal(torch, transformers, name, tmp_path):
  """64 of ours and of transformers, which has read what we export."""
  cfg, params, router_biases, net = read_by(torch, transformers, name, tmp_path)
  tokens_BT = tokens_of(cfg)
  prompt = torch.tensor(tokens_BT, dtype=torch.long)
  options = {'do_sample': False, 'pad_token_id': 0, 'eos_token_id': None}
  with torch.no_grad():
    ids = net.generate(prompt, max_new_tokens=64, **options)
  runner = model_runner.ModelRunner(cfg, params, router_biases)
  output = generate.generate(runner, tokens_BT.tolist(), 64)
  assert output.tokens == ids[:, tokens_BT.shape[1] :].tolist()


def check_cached(cfg, params, router_biases, tokens_BT, out):
  """Prefill, then absorbed steps: logits, and the latents that are cached."""
  apply = [
    jax.jit(
      functools.partial(
        model.build(cfg, **options).apply, method='forward_cached'
      )
    )
    for options in ({}, {'absorbed': True})
  ]
  # A block a row.
  assert tokens_BT.shape[1] <= engine.BLOCK_SIZE
  args = (cfg.model, len(tokens_BT), engine.BLOCK_SIZE, jnp.float32)
  caches = model_runner.empty_caches(*args, drafting=False, fp8=False)
  table_B1 = jnp.arange(len(tokens_BT))[:, None]
  close = {'rtol': 0, 'atol': 1e-5}
  begin, end = 0, tokens_BT.shape[1] - 3
  while begin < tokens_BT.shape[1]:
    part_BT = tokens_BT[:, begin:end]
    index_BT = jnp.broadcast_to(jnp.arange(begin, end), part_BT.shape)
    last_B1 = jnp.full((len(part_BT), 1), end - begin - 1)
    args = ({'params': params}, part_BT, index_BT, last_B1, table_B1)
    logits_B1V, _, caches, _ = apply[begin > 0](*args, router_biases, caches)
    want_BV = out.logits[:, end - 1].numpy()
    np.testing.assert_allclose(logits_B1V[:, 0], want_BV, **close)
    begin, end = end, end + 1
  theirs_cache = out.past_key_values
  ours = jax.tree.map(lambda *x: np.concatenate(x), *caches[:2])
  for i, layer in enumerate(theirs_cache.layers):
    c_BSC, r_BSR = layer.keys[:, 0].numpy(), layer.values[:, 0].numpy()
    length = c_BSC.shape[1]
    np.testing.assert_allclose(ours.c_LpsC[i, :, :length], c_BSC, **close)
    # transformers turns pairs into halves before it rotates.
    halves = r_BSR.reshape(*r_BSR.shape[:-1], 2, -1)
    pairs = np.moveaxis(halves, -2, -1).reshape(r_BSR.shape)
    got = ours.k_rope_LpsR[i, :, :length]
    np.testing.assert_allclose(got, pairs, **close)


@pytest.mark.parametrize('name', exchanged.CASES)
def test_table_is_bijective(name):
  """Every element of every leaf goes to exactly one tensor that is no copy."""
  cfg = exchanged.make(name)
  params, router_biases = exchanged.random_weights(cfg)
  tensors = dict(hf_tensors.tensors(cfg, params, router_biases))
  names = [tensor.name for tensor in hf_names.table(cfg.model)]
  assert list(tensors) == names and len(set(names)) == len(names)
  back = {}
  for place in hf_names.places(cfg):
    rows = tensors[place.tensor.name]
    assert rows.shape == place.file_shape
    parts = place.split(rows)
    np.testing.assert_array_equal(place.join(parts), rows)
    for leaf, part in zip(place.tensor.leaves, parts, strict=True):
      if not place.tensor.copy:
        back[leaf] = part
  state = {'params': params, 'router': router_biases}
  for leaf, part in back.items():
    want = hf_names.get(state, leaf.path)[leaf.index]
    np.testing.assert_array_equal(part, want)
  size = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))
  assert sum(part.size for part in back.values()) == size(state)


def test_a_slice_of_an_fp8_leaf_reads_that_slice():
  """Of inputs or outputs in several dims; blocks are cut."""
  cfg, rng = exchanged.make('beyond one block'), np.random.default_rng(0)
  shapes, leaves, want, read = hf_names.leaf_shapes(cfg), {}, {}, []
  for place in hf_names.places(cfg):
    for leaf in place.tensor.leaves:
      lead, num_in = len(leaf.index), place.tensor.num_in
      if not num_in or leaf.path in leaves:
        continue
      shape = shapes[leaf.path]
      inner = shape[lead:]
      sides = math.prod(inner[:num_in]), math.prod(inner[num_in:])
      blocks = [-(-n // t) for n, t in zip(sides, place.tile, strict=True)]
      values = rng.normal(size=shape).astype(fp8_blocks.E4M3)
      scales = rng.random((*shape[:lead], *blocks), np.float32)

      def lazily(at, values=values):
        read.append(values[at].size)
        return values[at]

      leaves[leaf.path] = fp8_blocks.Quantized(
        lazy_array.LazyArray(shape, values.dtype, lazily, shape),
        scales,
        place.tile,
      )
      for axis, tile in zip((-2, -1), place.tile, strict=True):
        scales = np.repeat(scales, tile, axis)
      scales = scales[..., : sides[0], : sides[1]].reshape(shape)
      want[leaf.path] = values.astype(np.float32) * scales
  assert {len(x.shape) for x in want.values()} == {2, 3, 4}
  for path, array in hf_names.dequantised(leaves, cfg).items():
    for _ in range(8):
      ends = [sorted(rng.integers(0, n + 1, 2)) for n in array.shape]
      at = tuple(slice(int(start), int(stop)) for start, stop in ends)
      read.clear()
      part = array[at]
      np.testing.assert_array_equal(part, want[path][at])
      assert sum(read) == part.size


EXPERIMENTS = sorted(
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in (ROOT / 'experiments').rglob('*.py')
  if path.stem != '__init__'
)


@pytest.mark.parametrize('name', EXPERIMENTS)
@pytest.mark.parametrize('arg', ['', 'runlocal'])
def test_table_covers_every_experiment(name, arg):
  """A bijection over the abstract tree: no element twice and none forgotten."""
  source = importlib.import_module(name).get_config(arg)
  assert_bijection(config.from_config_dict(source))


_CHECKED = set()  # some experiments have the same model


def assert_bijection(cfg):
  if cfg.model in _CHECKED:
    return
  shapes, seen, names = hf_names.leaf_shapes(cfg), {}, set()
  for place in hf_names.places(cfg):
    tensor = place.tensor
    assert tensor.name not in names
    names.add(tensor.name)
    sizes = [math.prod(shape) for shape in place.shapes]
    assert sum(sizes) == math.prod(place.file_shape)
    for leaf, size in zip(tensor.leaves, sizes, strict=True):
      if not tensor.copy:
        indices = seen.setdefault(leaf.path, {})
        assert leaf.index not in indices
        indices[leaf.index] = size
  assert seen.keys() == shapes.keys()
  for path, indices in seen.items():
    lead = len(next(iter(indices)))
    every = itertools.product(*map(range, shapes[path][:lead]))
    assert indices.keys() == set(every)
    assert sum(indices.values()) == math.prod(shapes[path])
  _CHECKED.add(cfg.model)


def test_manifest_of_671b_is_the_published_checkpoint():
  """91,991 tensors, 45,808 scales, 688.6 GB (FACTS of the release)."""
  cfg = config.from_config_dict(v3_671b.get_config())
  specs = exporter.manifest(cfg, 'fp8')
  assert len(specs) == len({s.name for s in specs}) == 91_991
  scales = [s for s in specs if s.name.endswith('_scale_inv')]
  assert len(scales) == 45_808
  assert abs(sum(s.nbytes for s in specs) - 688.575e9) < 0.01e9
  by_dtype = {}
  for spec in specs:
    by_dtype[spec.dtype] = by_dtype.get(spec.dtype, 0) + spec.nbytes / 1e9
  assert by_dtype == pytest.approx(
    {'F8_E4M3': 680.57, 'BF16': 7.84, 'F32': 0.166}, abs=5e-3
  )
  of = {spec.name: (spec.dtype, spec.shape) for spec in specs}
  layer = 'model.layers.61.'
  for name, dtype, shape in (
    ('lm_head.weight', 'BF16', (129280, 7168)),
    ('model.layers.0.self_attn.q_a_proj.weight', 'F8_E4M3', (1536, 7168)),
    ('model.layers.0.self_attn.q_a_proj.weight_scale_inv', 'F32', (12, 56)),
    ('model.layers.0.mlp.down_proj.weight_scale_inv', 'F32', (56, 144)),
    ('model.layers.3.mlp.gate.e_score_correction_bias', 'F32', (256,)),
    ('model.layers.3.mlp.gate.weight', 'BF16', (256, 7168)),
    (
      'model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv',
      'F32',
      (5, 56),
    ),
    (f'{layer}eh_proj.weight', 'BF16', (7168, 14336)),
    (f'{layer}shared_head.head.weight', 'BF16', (129280, 7168)),
    (f'{layer}mlp.experts.255.up_proj.weight', 'F8_E4M3', (2048, 7168)),
  ):
    assert of[name] == (dtype, shape)
