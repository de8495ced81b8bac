"""Round trips, FP8, meshes, interruptions, memory of export and import."""

import contextlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from benchmarks.common import hf_tensors
from dsv3_jax import errors
from dsv3_jax.checkpoint import fp8_blocks, lazy_array, source, store
from dsv3_jax.checkpoint.hf import exporter, importer
from dsv3_jax.checkpoint.hf import reader as hf_reader
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model
from experiments import base
from tests import nightly
from tests.checkpoint.hf import exchanged
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


@pytest.mark.parametrize(
  'name',
  nightly.daily(
    exchanged.CASES,
    '16 experts, 2 groups, 2 shared, 2 MTP',
    'unrolled, 2 dense, no MTP',
  ),
)
def test_f32_comes_back_to_the_bit(name, tmp_path):
  """export -> load -> export: the same arrays, the same files."""
  cfg = exchanged.make(name)
  params, router_biases = exchanged.random_weights(cfg)
  first = exchanged.write(cfg, params, router_biases, tmp_path / 'a')
  assert len(list(first.glob('*.safetensors'))) > 1
  with importer.open_folder(first, BASE) as (opened, leaves):
    given = exchanged.leaves_of(params, router_biases)
    # Ours may be unrolled, what is read never is; its files tell below.
    same = given.keys() & leaves.keys()
    assert cfg.model.scan_layers == (same == given.keys())
    for path in same:
      np.testing.assert_array_equal(leaves[path][:], given[path])
    exporter.export(opened, leaves, tmp_path / 'b', dtype='float32',
                  shard_bytes=60_000)  # fmt: skip
  assert (first / SUMS).read_text() == (tmp_path / 'b' / SUMS).read_text()


def test_bf16_comes_back_to_the_bit(wide, tmp_path):
  """BF16 values, through a workdir in f32 and in BF16, loaded in either."""
  cfg, params, router_biases = wide
  rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype('f4'), params)
  first = exchanged.write(
    cfg, rounded, router_biases, tmp_path / 'a', 'bfloat16'
  )
  same_trees(dsv3_jax.load(first).params, rounded)
  same_trees(dsv3_jax.load(first).router_biases, router_biases)
  for dtype in ('float32', 'bfloat16'):
    importer.to_workdir(first, tmp_path / dtype, BASE, dtype)
    again = dsv3_jax.load(tmp_path / dtype)
    same_trees((again.params, again.router_biases), (rounded, router_biases))
    output = tmp_path / f'{dtype} out'
    with source.open_source(tmp_path / dtype, BASE) as (opened, leaves):
      exporter.export(
        opened, leaves, output, dtype='bfloat16', shard_bytes=60_000
      )
    sums = (output / SUMS).read_text()
    assert sums == (first / SUMS).read_text()


def test_fp8_is_within_the_format_s_bound(wide, in_fp8):
  """Every quantised matrix against the float64 oracle's bound."""
  cfg, params, router_biases = wide
  seen = 0
  with shards.Folder(in_fp8) as folder:
    for name, want in hf_tensors.tensors(cfg, params, router_biases):
      got = hf_reader.read_rows(folder, name, slice(0, len(want)))
      if (scale := hf_reader.scale_name(folder, name)) is None:
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


def test_fp8_of_blocks_that_are_odd(tmp_path):
  """All zero, denormal, tiny beside large: each within the oracle's bound."""
  cfg = exchanged.make('beyond one block')
  params, router_biases = jax.tree.map(np.array, exchanged.random_weights(cfg))
  w = params['dense_layers']['layers']['ffn']['w_gate'][0]  # [168, 200]
  w[:128, :128], w[128:, :128] = 0.0, 1e-40
  w[:128, 128:] = 3e38
  w[5, 130] = -1e-30
  folder = exchanged.write(cfg, params, router_biases, tmp_path / 'a', 'fp8')
  name = 'model.layers.0.mlp.gate_proj.weight'
  with shards.Folder(folder) as opened:
    scales = opened.read(name + '_scale_inv')
    got = hf_reader.read_rows(opened, name, slice(0, 200)).T
  assert scales[0].tolist() == [1.0, 1.0]  # nothing to scale
  assert np.all(np.isfinite(scales)) and np.all(scales > 0)
  assert not got[:, :128].any()
  large = np.float64(got[:128, 128:])
  assert np.all(np.abs(large - w[:128, 128:]) <= 3e38 / 17)
  same_trees(dsv3_jax.load(folder).params['dense_layers']['layers']['ffn']
             ['w_gate'][0], got)  # fmt: skip


def test_fp8_kept_as_fp8_comes_back_byte_by_byte(in_fp8, tmp_path):
  """file -> workdir -> file, and file -> file."""
  importer.to_workdir(in_fp8, tmp_path / 'run', BASE, 'fp8')
  for folder in (tmp_path / 'run', in_fp8):
    with source.open_source(folder, BASE, keep_fp8=True) as (cfg, leaves):
      kinds = {type(leaf) for leaf in leaves.values()}
      assert fp8_blocks.Quantized in kinds
      output = tmp_path / f'of {folder.name}'
      exporter.export(cfg, leaves, output, dtype='fp8', shard_bytes=60_000)
    assert (output / SUMS).read_text() == (in_fp8 / SUMS).read_text()
  with source.open_source(in_fp8, BASE) as (_, leaves):
    kinds = {type(leaf) for leaf in leaves.values()}
    assert fp8_blocks.Quantized not in kinds
  # Both ways of reading agree.
  kept, plain = map(dsv3_jax.load, (tmp_path / 'run', in_fp8))
  same_trees(
    (kept.params, kept.router_biases), (plain.params, plain.router_biases)
  )


@pytest.mark.nightly
def test_parameters_come_sharded(in_fp8, monkeypatch):
  """Straight onto a mesh: each device has its part, nothing is read twice."""
  rules = sharding.ShardingRules(
    experts=('node', 'expert'), vocab='model', heads='model'
  )
  shape = {'node': 2, 'expert': 2, 'model': 2}
  mesh = jax.make_mesh(
    [shape.get(axis, 1) for axis in sharding.AXES], sharding.AXES
  )
  read, real = [], shards.Folder.read

  def counted(folder, name, rows=None):
    rows_read = real(folder, name, rows)
    read.append(rows_read.nbytes if '_scale' not in name else 0)
    return rows_read

  with importer.open_folder(in_fp8, BASE) as (cfg, leaves):
    monkeypatch.setattr(shards.Folder, 'read', counted)
    got, router_biases = source.to_devices(leaves, cfg, 'float32', mesh, rules)
  monkeypatch.undo()
  one = dsv3_jax.load(in_fp8)
  same_trees(
    jax.device_get((got, router_biases)),
    jax.device_get((one.params, one.router_biases)),
  )
  specs = model.param_specs(model.build(cfg), rules)
  for x, spec in zip(jax.tree.leaves(got), jax.tree.leaves(specs), strict=True):
    assert x.sharding == jax.sharding.NamedSharding(mesh, spec)
  moe = got['moe_layers']['layers']['moe']
  assert moe['w_up'].sharding.shard_shape(moe['w_up'].shape)[1] == 2  # of 8
  with shards.Folder(in_fp8) as folder:
    own = [x for n, x in folder.entries.items() if '_scale' not in n]
    total = sum(entry.nbytes for entry in own)
  # Sharded heads and vocabulary lie across rows that are read completely.
  assert sum(read) < 1.3 * total


@pytest.mark.parametrize('mesh', [None, 'mesh'])
def test_an_array_on_devices_is_a_complete_copy(mesh):
  """Of every dtype, in chunks that do not divide it, aligned or not."""
  where = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  if mesh:
    spec = jax.sharding.PartitionSpec('a', None)
    where = jax.sharding.NamedSharding(jax.make_mesh((2, 4), ('a', 'b')), spec)
  for dtype in ('float32', 'bfloat16', fp8_blocks.E4M3):
    want = np.arange(6 * 70, dtype=np.float32).reshape(6, 70).astype(dtype)
    read = lambda at, want=want: want[at]
    array = lazy_array.LazyArray(want.shape, want.dtype, read, (2, 33))
    got = lazy_array.to_device(array, where)
    assert got.dtype == want.dtype and got.sharding == where
    kept = want.tobytes()
    want[...] = 0
    assert np.asarray(got).tobytes() == kept


@pytest.mark.nightly
def test_a_sharded_checkpoint_is_exported(tmp_path):
  """Orbax wrote it from eight devices; the files are those of one."""
  cfg = exchanged.make('plain')
  params, router_biases = exchanged.random_weights(cfg)
  want = exchanged.write(
    cfg, params, router_biases, tmp_path / 'want', 'bfloat16'
  )
  mesh = jax.make_mesh((4, 2), ('expert', 'model'))

  def spread(x):
    spec = [None] * x.ndim
    for axis, name in ((1, 'expert'), (2, 'model')):
      if x.ndim == 4 and x.shape[axis] % mesh.shape[name] == 0:
        spec[axis] = name
    spec = jax.sharding.PartitionSpec(*spec)
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

  tree = {
    'train': jax.tree.map(spread, {'params': params, 'router': router_biases})
  }
  up = tree['train']['params']['moe_layers']['layers']['moe']['w_up']
  assert not up.sharding.is_fully_replicated
  checkpoints = store.Store(tmp_path / 'run', keep=1)
  with contextlib.closing(checkpoints):
    checkpoints.save(7, tree, {})
    checkpoints.wait()
    leaves = source.step_leaves(checkpoints.open(7), cfg)
    options = {'dtype': 'bfloat16', 'shard_bytes': 60_000}
    exporter.export(cfg, leaves, tmp_path / 'out', **options)
  assert (tmp_path / 'out' / SUMS).read_text() == (want / SUMS).read_text()


def test_an_interrupted_export_is_finished_by_the_next(wide, tmp_path):
  """Nothing that looks complete is left; finished shards are not rewritten."""
  output, lines = tmp_path / 'out', []
  uninterrupted = exchanged.write(*wide, tmp_path / 'uninterrupted')

  def stop(line):
    lines.append(line)
    if len(lines) == 3:
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
  assert (output / SUMS).read_text() == (uninterrupted / SUMS).read_text()
  with pytest.raises(errors.InputError, match='exists: name another'):
    exchanged.write(*wide, output)


def test_what_is_begun_anew_is_not_gone_on_with(wide, tmp_path):
  """Other weights (`source`), dtype or shard size: all shards are written."""
  cfg, params, router_biases = wide

  def stop(line):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    exchanged.write(*wide, tmp_path / 'out', source='a', progress=stop)
  other = jax.tree.map(lambda w: w + 1, params)
  exchanged.write(cfg, other, router_biases, tmp_path / 'out', source='b')
  same_trees(dsv3_jax.load(tmp_path / 'out').params, other)


def test_dtypes_of_pytorch_are_read(wide, tmp_path):
  """F16 as well; a rotary table that old exports carry is no weight."""
  cfg, params, router_biases = wide
  half = jax.tree.map(lambda w: w.astype('f2').astype('f4'), params)
  folder = exchanged.write(cfg, half, router_biases, tmp_path / 'a')

  def change(arrays):
    for name in arrays:
      if not name.endswith('bias'):
        arrays[name] = arrays[name].astype(np.float16)
    inv_freq = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    arrays[inv_freq] = np.ones(4, np.float32)

  exchanged.rewrite(folder, change)
  got = dsv3_jax.load(folder)
  same_trees((got.params, got.router_biases), (half, router_biases))


def test_an_imported_workdir_keeps_config_and_tokenizer(wide, tmp_path):
  folder = exchanged.write(
    *wide, tmp_path / 'a', documents={'tokenizer.json': b'{"no": "tokenizer"}'}
  )
  importer.to_workdir(folder, tmp_path / 'run', BASE)
  cfg = source.read_config(tmp_path / 'run')
  assert cfg.model.mla == wide[0].model.mla
  assert (tmp_path / 'run' / 'tokenizer.json').read_text().startswith('{"no"')
  with pytest.raises(errors.InputError, match='exists: name another'):
    importer.to_workdir(folder, tmp_path / 'run', BASE)


_BIG = """
import resource, sys, numpy as np
from dsv3_jax import config
from dsv3_jax.checkpoint import lazy_array
from dsv3_jax.checkpoint.hf import exporter, names
from experiments import base
source = base.get_config('runlocal')
with source.unlocked():
  source.model.update(d_model=2048, num_layers=2, num_dense_layers=1)
  source.model.moe.update(num_experts=64, d_ff=1024)
  source.model.mtp.depth = 0
cfg = config.from_config_dict(source)
ones = lambda at: np.ones([s.stop - s.start for s in at], np.float32)
leaves = {
  path: lazy_array.LazyArray(shape, np.dtype(np.float32), ones, shape)
  for path, shape in names.leaf_shapes(cfg).items()
}
largest = max(leaf.nbytes for leaf in leaves.values())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with open('/proc/self/status') as status:
  data = [int(x.split()[1]) for x in status if x.startswith('VmData')][0]
limit = data * 1024 + largest // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
exporter.export(cfg, leaves, sys.argv[1], dtype='fp8')
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(largest, after - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='RLIMIT_DATA of Linux')
def test_a_leaf_larger_than_the_memory_is_exported(tmp_path):
  """537 MB of w_up in a process that may not have half of it."""
  output = tmp_path / 'out'
  done = subprocess.run(
    [sys.executable, '-c', _BIG, str(output)],
    capture_output=True, text=True,
    cwd=pathlib.Path(__file__).resolve().parents[3],
  )  # fmt: skip
  assert not done.returncode, done.stderr[-2000:]
  largest, grown = map(int, done.stdout.split())
  assert largest == 64 * 2048 * 1024 * 4
  assert grown < largest // 2
  with shards.Folder(output) as folder:
    name = 'model.layers.1.mlp.experts.63.up_proj.weight'
    assert np.all(hf_reader.read_rows(folder, name, slice(0, 128)) == 1.0)
