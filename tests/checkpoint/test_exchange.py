"""Round trips, FP8, interruptions and refusals of export and import."""

import contextlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import errors, workdir
from dsv3_jax.checkpoint import (
  export,
  hf,
  hf_read,
  importing,
  shard_writer,
  shards,
)
from dsv3_jax.inference import loaded
from dsv3_jax.ops import fp8
from experiments import base
from tests import reference, tolerances
from tests.checkpoint import exchanged
from tests.oracles import fp8 as oracle

BASE = base.get_config().to_dict()
SUMS = 'SHA256SUMS'


@pytest.fixture(scope='module')
def wide():
  """A model whose matrices are wider than a block, and no multiple of one."""
  cfg = exchanged.make('beyond one block')
  return cfg, *exchanged.random_weights(cfg)


@pytest.fixture(scope='module')
def in_fp8(wide, tmp_path_factory):
  return exchanged.write(*wide, tmp_path_factory.mktemp('fp8') / 'out', 'fp8')


def same_trees(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('name', exchanged.CASES)
def test_f32_comes_back_to_the_bit(name, tmp_path):
  """export -> load -> export: the same arrays, the same files."""
  cfg = exchanged.make(name)
  params, router = exchanged.random_weights(cfg)
  first = exchanged.write(cfg, params, router, tmp_path / 'a')
  assert len(list(first.glob('*.safetensors'))) > 1
  with importing.opened(first, BASE) as (told, leaves):
    given = exchanged.leaves_of(params, router)
    # Ours may be unrolled, what is read never is; its files tell below.
    same = given.keys() & leaves.keys()
    assert cfg.model.scan_layers == (same == given.keys())
    for path in same:
      np.testing.assert_array_equal(leaves[path][:], given[path])
    export.export(told, leaves, tmp_path / 'b', dtype='float32',
                  shard_bytes=60_000)  # fmt: skip
  assert (first / SUMS).read_text() == (tmp_path / 'b' / SUMS).read_text()


def test_bf16_comes_back_to_the_bit(wide, tmp_path):
  """BF16 values, through a workdir in f32 and in BF16, loaded in either."""
  cfg, params, router = wide
  rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype('f4'), params)
  first = exchanged.write(cfg, rounded, router, tmp_path / 'a', 'bfloat16')
  same_trees(dsv3_jax.load(first).params, rounded)
  same_trees(dsv3_jax.load(first).router, router)
  for dtype in ('float32', 'bfloat16'):
    importing.to_workdir(first, tmp_path / dtype, BASE, dtype)
    again = dsv3_jax.load(tmp_path / dtype)
    same_trees((again.params, again.router), (rounded, router))
    with loaded.opened(tmp_path / dtype, BASE) as (told, leaves):
      export.export(told, leaves, tmp_path / f'{dtype} out', dtype='bfloat16',
                    shard_bytes=60_000)  # fmt: skip
    sums = (tmp_path / f'{dtype} out' / SUMS).read_text()
    assert sums == (first / SUMS).read_text()


def test_fp8_is_within_the_format_s_bound(wide, in_fp8):
  """Every quantised matrix against the float64 oracle's bound."""
  cfg, params, router = wide
  seen = 0
  with shards.Folder(in_fp8) as folder:
    for name, want in hf.to_hf(cfg, params, router):
      got = hf_read.read_rows(folder, name, slice(0, len(want)))
      if (scale := hf_read.scale_name(folder, name)) is None:
        low = want.astype(jnp.bfloat16).astype(np.float32)
        is_bias = name.endswith('bias')
        np.testing.assert_array_equal(got, want if is_bias else low)
        continue
      seen += 1
      _, scales = oracle.quantize_blocks(want.astype(np.float64), (128, 128))
      np.testing.assert_allclose(folder.read(scale), scales, rtol=1e-6)
      spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)
      spread = spread[: want.shape[0], : want.shape[1]]
      bound = np.maximum(np.abs(want) / 17, spread / 1024) * (1 + 1e-6)
      assert np.all(np.abs(np.float64(got) - want) <= bound)
  assert seen > 50


def test_fp8_kept_as_fp8_comes_back_byte_by_byte(in_fp8, tmp_path):
  """file -> workdir -> file, and file -> file."""
  importing.to_workdir(in_fp8, tmp_path / 'run', BASE, 'fp8')
  for source in (tmp_path / 'run', in_fp8):
    with loaded.opened(source, BASE, keep_fp8=True) as (cfg, leaves):
      kinds = {type(leaf) for leaf in leaves.values()}
      assert fp8.Quantized in kinds
      output = tmp_path / f'of {source.name}'
      export.export(cfg, leaves, output, dtype='fp8', shard_bytes=60_000)
    assert (output / SUMS).read_text() == (in_fp8 / SUMS).read_text()
  # Both ways of reading agree.
  kept, plain = map(dsv3_jax.load, (tmp_path / 'run', in_fp8))
  same_trees((kept.params, kept.router), (plain.params, plain.router))


def test_mtp_of_an_fp8_checkpoint_is_the_oracle_s(in_fp8):
  """Logits of t_{i+2} from imported FP8, float64 on the same weights."""
  got = dsv3_jax.load(in_fp8)
  cfg = got.config
  rng = np.random.default_rng(1)
  tokens_BZ = rng.integers(0, cfg.model.vocab_size, (2, 21))
  exact = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  weights = (exact(got.params), exact(got.router))
  batch = exchanged.batch_of(tokens_BZ[:, :-1])
  targets = np.pad(tokens_BZ[:, 1:-1], ((0, 0), (0, 1)))
  batch = batch._replace(targets_BT=jnp.int32(targets))
  last = (tokens_BZ[:, -1], np.full(2, 20), np.ones(2, np.int32))
  rows = reference.forward(*weights, cfg, batch, last, False)
  main, deeper = got.logits(tokens_BZ), got.mtp_logits(tokens_BZ)
  for b, (main_ZV, deeper_ZV, _) in enumerate(rows):
    tolerances.assert_close(main[b], main_ZV)
    tolerances.assert_close(deeper[b, :-1], deeper_ZV[0])


def test_the_inference_code_s_layout_is_read(wide, tmp_path):
  """`attn.wq_a`, `ffn.experts.0.w1`, `.scale`; it has no MTP layer."""
  cfg, params, router = wide
  source = exchanged.write(cfg, params, router, tmp_path / 'a', 'fp8')
  with shards.Folder(source) as folder:
    renamed = {}
    for name in folder.entries:
      if f'layers.{cfg.model.num_layers}.' in name:
        continue
      weight = name.removesuffix('_scale_inv')
      new = hf_read.official_name(weight)
      if weight != name:
        new = new.removesuffix('weight') + 'scale'
      renamed[new] = folder.read(name)
    assert 'layers.1.ffn.experts.0.w2.scale' in renamed
    assert 'layers.1.ffn.gate.bias' in renamed
    (tmp_path / 'b').mkdir()
    to_name = {np.dtype(d): n for n, d in shards.DTYPES.items()}
    specs = [
      shard_writer.Spec(n, to_name[x.dtype], x.shape)
      for n, x in renamed.items()
    ]
    path = tmp_path / 'b' / 'model0-mp1.safetensors'
    with shard_writer.ShardWriter(path, specs) as writer:
      for name, array in renamed.items():
        writer.write(name, 0, array)
  body = (source / 'config.json').read_text()
  (tmp_path / 'b' / 'config.json').write_text(body)
  got, want = dsv3_jax.load(tmp_path / 'b'), dsv3_jax.load(source)
  assert got.config.model.mtp.depth == 0
  for key, tree in got.params.items():
    same_trees(tree, want.params[key])
  np.testing.assert_array_equal(got.router['moe'], want.router['moe'])


def test_parameters_come_sharded(in_fp8):
  """Straight onto the devices of a mesh, equal to one device."""
  mesh = jax.make_mesh((2,) + (1,) * 5, ('data', 'pipe', 'context', 'node',
                                         'expert', 'model'))  # fmt: skip
  spread, one = dsv3_jax.load(in_fp8, mesh=mesh), dsv3_jax.load(in_fp8)
  same_trees(jax.device_get(spread.params), jax.device_get(one.params))
  head = spread.params['head']['w']
  assert head.sharding.mesh == mesh and len(head.sharding.device_set) == 2


def test_an_interrupted_export_is_finished_by_the_next(wide, tmp_path):
  """Nothing that looks complete is left; finished shards are not made anew."""
  output, made = tmp_path / 'out', []
  whole = exchanged.write(*wide, tmp_path / 'whole')

  def stop(line):
    made.append(line)
    if len(made) == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    exchanged.write(*wide, output, progress=stop)
  assert not output.exists()
  partial = tmp_path / 'out.partial'
  assert not (partial / 'config.json').exists()
  with pytest.raises(errors.InputError):
    dsv3_jax.load(partial)
  first = sorted(partial.glob('*.safetensors'))[0]
  stamp = first.stat().st_mtime_ns
  exchanged.write(*wide, output)
  assert (output / first.name).stat().st_mtime_ns == stamp
  assert not partial.exists()
  assert (output / SUMS).read_text() == (whole / SUMS).read_text()
  with pytest.raises(errors.InputError, match='exists: name another'):
    exchanged.write(*wide, output)


def test_what_is_begun_anew_is_not_gone_on_with(wide, tmp_path):
  """Other weights (`source`), dtype or shard size: all shards are made."""
  cfg, params, router = wide

  def stop(line):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    exchanged.write(*wide, tmp_path / 'out', source='a', progress=stop)
  other = jax.tree.map(lambda w: w + 1, params)
  exchanged.write(cfg, other, router, tmp_path / 'out', source='b')
  same_trees(dsv3_jax.load(tmp_path / 'out').params, other)


def test_a_weight_that_is_not_finite_is_named(wide, tmp_path):
  cfg, params, router = wide
  w = params['moe_layers']['layers']['moe']['w_up']
  broken = jax.tree.map(lambda x: x, params)
  broken['moe_layers']['layers']['moe']['w_up'] = w.at[1, 3, 2, 1].set(np.nan)
  name = r'model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight holds a NaN'
  with pytest.raises(errors.InputError, match=name):
    exchanged.write(cfg, broken, router, tmp_path / 'out', 'fp8')
  assert not (tmp_path / 'out').exists()


@contextlib.contextmanager
def edited(folder):
  """The config of a folder, written back when left."""
  path = folder / 'config.json'
  body = json.loads(path.read_text())
  yield body
  path.write_text(json.dumps(body))


@pytest.mark.parametrize(
  ('field', 'value', 'said'),
  [
    ('attention_bias', True, 'attention_bias=True is not built'),
    ('hidden_act', 'gelu', "hidden_act='gelu' is not built"),
    ('model_type', 'llama', "model_type='llama' is not built"),
    ('tie_word_embeddings', True, 'tie_word_embeddings=True'),
    ('num_key_value_heads', 2, 'num_key_value_heads=2 is not built'),
    ('sliding_window', 4, 'sliding_window=4 is a field that is not known'),
    ('hidden_size', '48', "hidden_size='48' must be of type int"),
    ('hidden_size', None, 'hidden_size=None must be of type int'),
    ('n_group', 3, 'model.moe.num_groups=3 must divide'),
    ('rope_scaling', {'type': 'linear', 'factor': 2}, "of type 'yarn'"),
    ('rope_theta', None, 'must hold numbers'),
    ('quantization_config', {'quant_method': 'awq'}, 'quantization_config='),
    ('vocab_size', 65, 'embed_tokens.weight has shape [64, 48], wanted [65'),
    ('num_hidden_layers', 4, 'is missing'),
  ],
)
def test_a_config_that_is_not_built_is_refused(tmp_path, field, value, said):
  cfg = exchanged.make('plain')
  folder = exchanged.write(cfg, *exchanged.random_weights(cfg), tmp_path / 'a')
  with edited(folder) as body:
    body[field] = value
  with pytest.raises(errors.InputError) as caught:
    importing.to_workdir(folder, tmp_path / 'run', BASE)
  message = str(caught.value)
  assert said in message and '\n' not in message
  assert str(folder) in message
  assert not list(tmp_path.glob('run*'))


def rewrite(folder, change):
  """Writes all tensors of a folder anew, changed, into one file."""
  with shards.Folder(folder) as opened:
    arrays = {name: opened.read(name) for name in opened.entries}
  change(arrays)
  for path in folder.glob('*model*'):
    path.unlink()
  (folder / SUMS).unlink()
  to_name = {np.dtype(d): n for n, d in shards.DTYPES.items()}
  specs = [
    shard_writer.Spec(n, to_name[x.dtype], x.shape) for n, x in arrays.items()
  ]
  path = folder / 'model.safetensors'
  with shard_writer.ShardWriter(path, specs) as writer:
    for name, array in arrays.items():
      writer.write(name, 0, array)


NAME = 'model.layers.1.self_attn.kv_b_proj.weight'


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda x: x.pop(NAME), f'tensor {NAME} is missing'),
    (lambda x: x.update(more=x[NAME]), 'tensor more is no part of this model'),
    (lambda x: x.update({NAME: x[NAME][1:]}), f'{NAME} has shape'),
    (lambda x: x.update({NAME: x[NAME].astype('i4')}), f'{NAME} has dtype I32'),
    (
      lambda x: x.update({NAME: x[NAME].astype(fp8.E4M3)}),
      f'{NAME} is FP8 and has no scales',
    ),
    (
      lambda x: x.update({NAME + '_scale_inv': np.ones((1, 1), 'f4')}),
      f'{NAME} has dtype F32, wanted',
    ),
    (
      lambda x: x.update({
        NAME: x[NAME].astype(fp8.E4M3),
        NAME + '_scale_inv': np.ones((2, 1), 'f4'),
      }),
      f'{NAME}_scale_inv is F32[2, 1], wanted F32[1, 1]',
    ),
  ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, change, said):
  cfg = exchanged.make('plain')
  folder = exchanged.write(cfg, *exchanged.random_weights(cfg), tmp_path / 'a')
  rewrite(folder, change)
  with pytest.raises(errors.InputError) as caught:
    importing.to_workdir(folder, tmp_path / 'run', BASE)
  message = str(caught.value)
  assert said in message and '\n' not in message
  assert not list(tmp_path.glob('run*'))


def test_damage_of_our_shards_is_named(tmp_path):
  cfg = exchanged.make('plain')
  weights = exchanged.random_weights(cfg)
  for damage in ('flip', 'cut', 'unlink'):
    folder = exchanged.write(cfg, *weights, tmp_path / damage)
    path = sorted(folder.glob('*.safetensors'))[1]
    data = bytearray(path.read_bytes())
    if damage == 'flip':
      data[-5] ^= 2
      path.write_bytes(data)
    elif damage == 'cut':
      path.write_bytes(data[:-7])
    else:
      path.unlink()
    with pytest.raises(errors.InputError, match=path.name):
      dsv3_jax.load(folder)


def test_dtypes_of_pytorch_are_read(tmp_path):
  """F16 as well; a rotary table that old exports carry is no weight."""
  cfg = exchanged.make('plain')
  params, router = exchanged.random_weights(cfg)
  half = jax.tree.map(lambda w: w.astype('f2').astype('f4'), params)
  folder = exchanged.write(cfg, half, router, tmp_path / 'a')

  def change(arrays):
    for name in arrays:
      if not name.endswith('bias'):
        arrays[name] = arrays[name].astype(np.float16)
    inv_freq = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    arrays[inv_freq] = np.ones(4, np.float32)

  rewrite(folder, change)
  got = dsv3_jax.load(folder)
  same_trees((got.params, got.router), (half, router))


def test_an_imported_workdir_keeps_config_and_tokenizer(wide, tmp_path):
  folder = exchanged.write(
    *wide, tmp_path / 'a', documents={'tokenizer.json': '{"no": "tokenizer"}'}
  )
  importing.to_workdir(folder, tmp_path / 'run', BASE)
  cfg = workdir.read_config(tmp_path / 'run')
  assert cfg.model.mla == wide[0].model.mla
  assert (tmp_path / 'run' / 'tokenizer.json').read_text().startswith('{"no"')
  with pytest.raises(errors.InputError, match='exists: name another'):
    importing.to_workdir(folder, tmp_path / 'run', BASE)


_BIG = """
import resource, sys, numpy as np
from dsv3_jax import config
from dsv3_jax.checkpoint import export, hf, lazy
from experiments import base
source = base.get_config('runlocal')
with source.unlocked():
  source.model.update(d_model=2048, num_layers=2, num_dense_layers=1)
  source.model.moe.update(num_experts=64, d_ff=2048)
  source.model.mtp.depth = 0
cfg = config.from_config_dict(source)
ones = lambda at: np.ones([s.stop - s.start for s in at], np.float32)
leaves = {
  path: lazy.LazyArray(shape, np.dtype(np.float32), ones, shape)
  for path, shape in hf.leaf_shapes(cfg).items()
}
largest = max(leaf.nbytes for leaf in leaves.values())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with open('/proc/self/status') as status:
  data = [int(x.split()[1]) for x in status if x.startswith('VmData')][0]
limit = data * 1024 + largest // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
export.export(cfg, leaves, sys.argv[1], dtype='fp8')
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(largest, after - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='RLIMIT_DATA of Linux')
def test_a_leaf_larger_than_the_memory_is_exported(tmp_path):
  """1.07 GB of w_up in a process that may not have half of it."""
  output = tmp_path / 'out'
  done = subprocess.run(
    [sys.executable, '-c', _BIG, str(output)],
    capture_output=True, text=True,
    cwd=pathlib.Path(__file__).resolve().parents[2],
  )  # fmt: skip
  assert not done.returncode, done.stderr[-2000:]
  largest, grown = map(int, done.stdout.split())
  assert largest == 64 * 2048 * 2048 * 4
  assert grown < largest // 2
  with shards.Folder(output) as folder:
    name = 'model.layers.1.mlp.experts.63.up_proj.weight'
    assert np.all(hf_read.read_rows(folder, name, slice(0, 128)) == 1.0)
