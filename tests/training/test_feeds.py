"""Rows by process: each reads its own, and all of them make the stream."""

import functools

import jax
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.data import batch_ramp, corpus, loader, prepare, shards
from dsv3_jax.distributed import sharding
from dsv3_jax.training import feeds, loop
from dsv3_jax.training import step as steps
from tests import settings, tiny_run
from tests.data import test_prepare as prepared

source = prepared.source  # a fixture
MICRO = 8


@pytest.fixture(scope='module')
def folder(source, tmp_path_factory):
  """400 prepared rows, and those of the stream."""
  cfg = prepared.make(source)
  output = tmp_path_factory.mktemp('prepared') / 'rows'
  prepared.run(cfg, output, rows=400, rows_per_shard=37)
  return cfg, output, prepared.stream(cfg, 400)


def open_feed(folder, row=0):
  cfg, output, _ = folder
  return feeds.PreparedFeed(shards.Folder(output), False, cfg.seed, row)


@functools.cache
def mesh_sharding(**axes):
  cfg = settings.small(
    train__microbatch_size=MICRO,
    train__batch_size=3 * MICRO,
    train__batch_size_start=3 * MICRO,
    eval__batch_size=8,
    model__vocab_size=24,
    **{f'parallel__{name}': size for name, size in axes.items()},
  )
  mesh = sharding.make_mesh(cfg.parallel)
  return sharding.named_shardings(steps.BATCH_SPEC, mesh)


@pytest.mark.parametrize(
  'axes', [{}, {'data': 4}, {'data': 2, 'context': 2, 'pipe': 2}], ids=str
)
def test_prepared_arrays_are_those_of_the_stream(folder, axes):
  """Step by step, with fewer and more micro-batches."""
  cfg, _, _ = folder
  opened = corpus.open_corpus(cfg.data)
  bpe = corpus.load_tokenizer(cfg.data, opened)
  stream = loader.Loader(opened.train, bpe, cfg.data, seed=cfg.seed, rows=MICRO)
  pair = feeds.StreamFeed(stream, 0), open_feed(folder)
  shape, spec = (3, MICRO, 12), mesh_sharding(**axes)
  for count in (1, 3, 2, 3):
    want, got = (feed.take(count, shape, spec) for feed in pair)
    assert got.keys() == want.keys()
    for name, x in want.items():
      assert got[name].sharding == x.sharding and got[name].dtype == x.dtype
      np.testing.assert_array_equal(got[name], x)
      assert not np.any(got[name][count:])
  assert pair[0].row == pair[1].row == 9 * MICRO
  for feed in pair:
    feed.close()


def blocks(num_processes, process):
  """What the devices of one of several processes hold."""
  shape = (3, MICRO, 12)
  spec = mesh_sharding(data=4, pipe=2)
  indices = spec.devices_indices_map(shape)
  # Devices of a process are neighbours on the last axes, as on real hosts.
  ids = sorted(indices, key=lambda device: indices[device][1].start or 0)
  size = len(ids) // num_processes
  return [indices[x] for x in ids[process * size : (process + 1) * size]]


@pytest.mark.parametrize('num_processes', [1, 2, 4])
def test_a_process_reads_its_own_rows_only(folder, num_processes):
  """Each row once in the whole job, also what is read ahead."""
  cfg, output, stream = folder
  total, seen = 0, []
  for process in range(num_processes):
    opened = shards.Folder(output)
    feed = feeds.PreparedFeed(opened, False, cfg.seed, 40)
    mine = blocks(num_processes, process)
    for _ in range(3):
      examples = feed.local_examples(2, (3, MICRO, 12), mine)
      assert len(examples) == 2 * MICRO // num_processes
      for row, example in examples.items():
        np.testing.assert_array_equal(
          example['tokens_BT'], stream[row]['tokens_BT']
        )
      seen += examples
    feed.close()
    total += opened.num_read
  assert sorted(seen) == list(range(40, 40 + 6 * MICRO))
  assert total == 8 * MICRO  # three steps and one ahead


def with_ramp(total_tokens):
  """Settings of a run whose steps grow to three micro-batches."""
  return settings.small(
    train__microbatch_size=MICRO,
    train__batch_size=3 * MICRO,
    train__batch_size_start=MICRO,
    train__batch_size_step=MICRO,
    train__batch_ramp_tokens=12 * 150,
    train__total_tokens=total_tokens,
  ).train


def test_a_hundred_preemptions_with_changing_counts(folder):
  """Killed after any step, restarted on any number: each row exactly once.

  Row r of the run is row r of the stream; what was not saved is read again.
  """
  _, _, stream = folder
  train = with_ramp(12 * 300)
  rng, preemptions = np.random.default_rng(0), 0
  while preemptions < 100:
    consumed, row, tokens = [], 0, 0  # as saved
    while tokens < train.total_tokens:
      num_processes = int(rng.choice([1, 2, 4, 8]))
      parts = [blocks(num_processes, p) for p in range(num_processes)]
      running = [open_feed(folder, row) for _ in parts]
      killed = False
      while tokens < train.total_tokens and not killed:
        count = batch_ramp.batch_size_at(train, tokens) // MICRO
        step = {}
        for feed, mine in zip(running, parts, strict=True):
          step |= feed.local_examples(count, (3, MICRO, 12), mine)
        assert len({feed.row for feed in running}) == 1
        if not (killed := rng.random() < 0.4):  # else it is not saved
          consumed += [(r, step[r]['tokens_BT']) for r in sorted(step)]
          row, tokens = running[0].row, tokens + 12 * count * MICRO
      preemptions += killed
      for feed in running:
        feed.close()
    assert [r for r, _ in consumed] == list(range(row))
    assert row * 12 == tokens
    for r, tokens_T in consumed:
      np.testing.assert_array_equal(tokens_T, stream[r]['tokens_BT'])


@pytest.mark.parametrize('start', [0, 12 * 17, 12 * 150, 12 * 160])
def test_rows_of_a_run_are_those_of_its_steps(start):
  train = with_ramp(12 * 400 + 1)
  tokens, rows = start, 0
  while tokens < train.total_tokens:
    size = batch_ramp.batch_size_at(train, tokens)
    tokens, rows = tokens + 12 * size, rows + size
  assert batch_ramp.rows_of_run(train, 12, start) == rows


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


@pytest.mark.slow
def test_a_run_on_prepared_rows_has_the_same_bits(run_folder):
  """Here of one that began on the fly; and no way leads back."""
  cfg = tiny_run.make(run_folder, sample__prompts=())
  loop.run(tiny_run.until(cfg, 4), run_folder / 'stream')
  output = run_folder / 'rows'
  prepare.prepare(tiny_run.until(cfg, 4), output, rows_per_shard=5)
  there = tiny_run.make(
    run_folder, sample__prompts=(), data__prepared=str(output)
  )
  for given, steps_ in ((cfg, 2), (there, 4)):
    loop.run(tiny_run.until(given, steps_), run_folder / 'prepared')
  want = tiny_run.read_metrics(run_folder / 'stream')
  assert tiny_run.read_metrics(run_folder / 'prepared') == want
  _, extras = tiny_run.committed(cfg, run_folder / 'prepared', 4)
  assert extras['rows'] == 8 and extras['loader'] == {}
  with pytest.raises(errors.InputError, match=r'data\.prepared is empty, '):
    loop.run(tiny_run.until(cfg, 5), run_folder / 'prepared')


@pytest.mark.parametrize(
  ('changes', 'damage', 'expected'),
  [
    ({'seed': 1}, None, 'was prepared with seed=0, but here it is 1'),
    ({'data__fim_rate': 0.9}, None, 'was prepared with fim_rate='),
    ({'data__prepared': 'nowhere'}, None, "data.prepared='nowhere': prepared"),
    ({}, 'unlink', 'rows-000001 is damaged: it is missing'),
    ({}, 'cut', 'rows-000001 is damaged: it has '),
    (
      {'data__prepared': '', 'data__dedup__exact': True},
      None,
      r'data\.filters, data\.dedup and data\.max_epochs take effect in dsv3 pr',
    ),
    ({'data__prepared': '', 'data__max_epochs': 1.0}, None, 'max_epochs take'),
    ({'data__dedup__exact': True}, None, r'prepared with dedup\.exact=False'),
    (
      {'train__total_tokens': 12 * 32},
      None,
      'has 8 rows, but the run needs 12',
    ),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_compiles(
  run_folder, tmp_path, monkeypatch, changes, damage, expected
):
  cfg = tiny_run.make(run_folder)
  output = tmp_path / 'rows'
  prepare.prepare(cfg, output, rows=8, rows_per_shard=5)
  if damage == 'unlink':
    (output / 'rows-000001').unlink()
  elif damage:
    (output / 'rows-000001').write_bytes(b'x')
  fixed = {'data__prepared': str(output), 'train__total_tokens': 8 * 32}
  cfg = tiny_run.make(run_folder, **(fixed | changes))
  never = lambda *args, **options: pytest.fail('something compiles')
  monkeypatch.setattr(jax, 'jit', never)
  with pytest.raises(errors.InputError, match=expected):
    loop.run(cfg, tmp_path / 'run')
