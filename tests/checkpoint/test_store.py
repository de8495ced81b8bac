"""Committed steps: complete, hashed, and never silently replaced."""

import itertools
import json
import pathlib
import random
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kill_and_resume
from dsv3_jax.checkpoint import lazy_array, store


class Moments(NamedTuple):
  mean: jax.Array
  count: jax.Array


def make_state(seed=0):
  """All kinds of leaves that a run has."""
  rng = np.random.default_rng(seed)
  f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    'params': {'w': f32(5, 7), 'b': f32(3)},
    'opt': Moments(f32(5, 7).astype(jnp.bfloat16), jnp.int32(seed)),
    'flag': jnp.asarray(seed % 2 == 0),
    'host': rng.normal(size=(4,)).astype(np.float32),
  }


def equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)
  dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
  assert dtypes(got) == dtypes(want)


@pytest.fixture
def saved(tmp_path):
  """A store with the steps 1 and 2."""
  kept = store.Store(tmp_path, keep=3)
  for step in (1, 2):
    kept.save(step, make_state(step), {'progress': {'step': step}})
  kept.wait()
  yield kept
  kept.close()


def test_round_trip_is_bitwise(saved):
  assert saved.steps() == [1, 2]
  assert saved.latest() == 2
  for step in (1, 2):
    state, extras = saved.restore(step, make_state())
    equal(state, make_state(step))
    assert extras == {'progress': {'step': step}}


def test_host_arrays_come_back_as_numpy_and_device_arrays_sharded(saved):
  mesh = jax.make_mesh((8,), ('x',))
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  like = jax.device_put(make_state(), spec) | {'host': np.zeros(4, np.float32)}
  state, _ = saved.restore(2, like)
  assert state['params']['w'].sharding == spec
  assert isinstance(state['host'], np.ndarray)


def test_slices_are_read_alone(saved):
  """`open`: arrays by path, of which any part can be had."""
  want = make_state(2)['params']['w']
  array = saved.open(2)['params', 'w']
  assert array.shape == want.shape and array.dtype == want.dtype
  np.testing.assert_array_equal(array[1:], want[1:])
  np.testing.assert_array_equal(array[0], want[0])


def test_large_leaves_are_cut_by_layer_and_expert(tmp_path):
  """Chunks of one layer and expert, written one by one from a LazyArray."""
  shape, asked = (2, 3, 1024, 4096), []

  def read(at):
    asked.append(at)
    sizes = [s.stop - s.start for s in at]
    return np.full(sizes, 10 * at[0].start + at[1].start, np.float32)

  array = lazy_array.LazyArray(shape, np.dtype(np.float32), read, shape)
  tree = {'layers': {'moe': {'w_up': array}}, 'b': jnp.arange(3.0)}
  kept = store.Store(tmp_path, keep=1)
  kept.save(0, tree, {})
  kept.wait()
  assert len(asked) == 6
  assert all(
    s[0].stop - s[0].start == s[1].stop - s[1].start == 1 for s in asked
  )
  opened = kept.open(0)
  back = opened['layers', 'moe', 'w_up']
  assert back.shape == shape
  assert np.all(back[1, 2] == 12.0) and np.all(back[0, 1, 5:7, :9] == 1.0)
  np.testing.assert_array_equal(opened['b',][:], np.arange(3.0))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
  moved = lazy_array.to_device(back, place)
  assert moved.devices() == {jax.devices()[1]}
  np.testing.assert_array_equal(moved[:, :, 0, 0], [[0, 1, 2], [10, 11, 12]])
  kept.close()


def test_donated_right_after_saving(tmp_path):
  """The arrays may be given away as soon as `save` returns."""
  kept = store.Store(tmp_path, keep=3)
  overwrite = jax.jit(
    lambda t: jax.tree.map(lambda x: jnp.zeros_like(x), t), donate_argnums=0
  )
  state = {'w': jnp.arange(1 << 20, dtype=jnp.float32)}
  host = {'h': np.arange(1 << 20, dtype=np.float32)}
  kept.save(1, state | host, {})
  jax.block_until_ready(overwrite(state))
  host['h'][:] = -1.0
  kept.wait()
  back, _ = kept.restore(1, {'w': jnp.zeros(1 << 20)} | host)
  kept.close()
  np.testing.assert_array_equal(back['w'], np.arange(1 << 20))
  np.testing.assert_array_equal(back['h'], np.arange(1 << 20))


def test_keeps_the_newest(tmp_path):
  kept = store.Store(tmp_path, keep=2)
  for step in range(4):
    kept.save(step, make_state(step), {})
  kept.close()
  assert kept.steps() == [2, 3]
  assert not list(tmp_path.glob('.*'))


def test_a_committed_step_is_not_written_again(saved):
  with pytest.raises(ValueError, match='is committed already'):
    saved.save(2, make_state(5), {})
  equal(saved.restore(2, make_state())[0], make_state(2))


def test_leftovers_of_a_killed_save_do_not_count(saved):
  left = saved.directory / '.tmp-000000003'
  left.mkdir()
  (left / 'manifest.json').write_text('{}', encoding='utf-8')
  assert saved.steps() == [1, 2]
  saved.save(4, make_state(4), {})
  saved.wait()
  assert not left.exists()


def data_file(folder):
  """The largest file of a step: array data."""
  files = [p for p in folder.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip(path):
  body = bytearray(path.read_bytes())
  body[len(body) // 2] ^= 1
  path.write_bytes(body)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def swap_within(path):
  """Exchanges two files of one step."""
  (step,) = (p for p in path.parents if p.name == '000000002')
  files = sorted(p for p in step.rglob('*') if p.is_file())
  other = next(p for p in files if p.read_bytes() != path.read_bytes())
  a, b = path.read_bytes(), other.read_bytes()
  path.write_bytes(b)
  other.write_bytes(a)


def from_other_step(path):
  """A file of step 1 in the place of step 2's."""
  older = str(path).replace('000000002', '000000001')
  source = data_file(pathlib.Path(older.split('000000001')[0]) / '000000001')
  path.write_bytes(source.read_bytes())


@pytest.mark.parametrize(
  'damage', [flip, truncate, pathlib.Path.unlink, swap_within, from_other_step]
)
@pytest.mark.parametrize('which', ['data', 'progress'])
def test_damage_is_named_and_the_previous_step_offered(saved, damage, which):
  folder = saved.directory / '000000002'
  path = folder / 'progress.json'
  if which == 'data':
    path = data_file(folder)
  elif damage is swap_within:
    path = folder / 'progress.json'
  damage(path)
  with pytest.raises(store.CheckpointError) as caught:
    saved.restore(2, make_state())
  message = str(caught.value)
  assert '000000002' in message
  assert 'step 1 is intact: checkpoint.restore_step=1 resumes' in message
  assert '\n' not in message
  if damage is not swap_within:
    assert path.name in message
  assert saved.steps() == [1, 2]  # nothing is removed
  equal(saved.restore(1, make_state())[0], make_state(1))


def test_surplus_file_is_named(saved):
  (saved.directory / '000000002' / 'more.json').write_text('{}')
  with pytest.raises(
    store.CheckpointError, match=r'more\.json is in no manifest'
  ):
    saved.verify(2)


def damaged_manifest(body):
  return body[: len(body) // 2]


def edited_manifest(body):
  text = json.loads(body)
  text['body']['step'] = 7
  return json.dumps(text)


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    (damaged_manifest, 'manifest.json is damaged'),
    (edited_manifest, 'manifest.json does not match its own sha256'),
    (None, 'manifest.json is missing'),
  ],
)
def test_manifest_itself_is_checked(saved, change, expected):
  path = saved.directory / '000000002' / 'manifest.json'
  if change is None:
    path.unlink()
  else:
    path.write_text(change(path.read_text()))
  with pytest.raises(store.CheckpointError, match=expected):
    saved.verify(2)


def test_whole_steps_exchanged(saved):
  """A step under another step's number is refused."""
  one, two = (saved.directory / f'{step:09d}' for step in (1, 2))
  one.rename(saved.directory / 'x')
  two.rename(one)
  (saved.directory / 'x').rename(two)
  with pytest.raises(store.CheckpointError, match='is of step 1'):
    saved.verify(2)


def test_no_step_is_whole(saved):
  for step in (1, 2):
    flip(data_file(saved.directory / f'{step:09d}'))
  with pytest.raises(store.CheckpointError, match='no earlier step is intact'):
    saved.verify(2)


@pytest.mark.parametrize(
  ('like', 'expected'),
  [
    (lambda s: s | {'flag': jnp.zeros(2, bool)}, r'flag is bool\[\], wanted'),
    (lambda s: s | {'host': np.zeros(4)}, 'host is float32.*float64'),
    (lambda s: s | {'new': jnp.zeros(1)}, 'has no array new'),
    (lambda s: {k: v for k, v in s.items() if k != 'flag'}, 'also holds flag'),
  ],
)
def test_what_does_not_fit_is_named(saved, like, expected):
  with pytest.raises(store.CheckpointError, match=expected):
    saved.restore(2, like(make_state()))


def test_missing_step(saved):
  with pytest.raises(store.CheckpointError, match=r'000000009.*does not exist'):
    saved.restore(9, make_state())


def _save_forever(folder, pipe):
  kept = store.Store(folder, keep=2)
  for step in itertools.count((kept.latest() or 0) + 1):
    state = {'a': jnp.full((512, 512), step), 'b': jnp.full((3,), -step)}
    kept.save(step, state, {'progress': {'step': step}})
    pipe.send(step)


def test_kill_never_loses_a_committed_step(tmp_path):
  """`kill -9` at random moments of a loop that does nothing but save."""
  rng, newest = random.Random(0), 0
  for _ in range(5):
    saves, pipe = kill_and_resume.FORKS.Pipe(duplex=False)
    child = kill_and_resume.FORKS.Process(
      target=_save_forever, args=(tmp_path, pipe)
    )
    child.start()
    pipe.close()
    for _ in range(4):  # then two saves or more are committed
      saves.recv()
    time.sleep(rng.uniform(0.0, 0.2))
    child.kill()
    child.join()
    saves.close()
    kept = store.Store(tmp_path, keep=2)
    assert (kept.latest() or 0) >= newest
    newest = kept.latest() or 0
    like = {'a': jnp.zeros((512, 512), jnp.int32), 'b': jnp.zeros(3, jnp.int32)}
    for step in kept.steps():
      state, extras = kept.restore(step, like)
      assert (state['a'] == step).all()
      assert (state['b'] == -step).all()
      assert extras['progress']['step'] == step
    kept.close()
  assert newest > 5
