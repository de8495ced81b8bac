"""A run that stops and goes on, or goes back, is one run to the bit."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from dsv3_jax import errors
from dsv3_jax.checkpoint import store
from dsv3_jax.training import loop, metrics
from dsv3_jax.training import step as steps
from tests import tiny_run


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


def test_checkpoints_keep_the_names_of_their_arrays(folder):
  """An older run resumes: its spike state is under 'guard'."""
  state = steps.state_shapes(tiny_run.make(folder))
  assert sorted(state) == ['guard', 'opt', 'params', 'router']
  names = ['count', 'halted', 'mean', 'skips', 'variance']
  assert sorted(state['guard']) == names


@pytest.mark.nightly
def test_going_back_makes_the_later_steps_anew(folder):
  """restore_step: later steps are moved aside, and come out the same."""
  cfg = tiny_run.make(folder, checkpoint__every_steps=4, eval__every_steps=4)
  workdir = folder / 'back'
  loop.run(tiny_run.until(cfg, 12), workdir)
  want, _ = tiny_run.committed(cfg, workdir, 12)
  back = dataclasses.replace(cfg.checkpoint, restore_step=4)
  backwards = dataclasses.replace(cfg, checkpoint=back)
  # A start that does not get there leaves the request unanswered.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store.Store, 'roll_back', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      loop.run(tiny_run.until(backwards, 12), workdir)
  loop.run(tiny_run.until(backwards, 12), workdir)
  got, _ = tiny_run.committed(cfg, workdir, 12)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  names = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
  assert names == ['000000004', '000000008', '000000008.aside-1',
                   '000000012', '000000012.aside-1']  # fmt: skip
  assert [line['step'] for line in tiny_run.read_metrics(workdir)] == list(
    range(1, 13)
  )
  lines = metrics.read_metrics(workdir)
  held_out = [line for line in lines if line['kind'] == 'eval']
  assert [line['step'] for line in held_out] == [4, 8, 12]
  assert held_out[-1]['tokens'] == tiny_run.tokens_after(12)

  # It goes on with its own tokenizer, whatever becomes of the cache; with
  # another corpus it does not.
  shutil.rmtree(cfg.data.cache_dir)
  # Asked again it goes on, so that a stopped run can be started again.
  loop.run(tiny_run.until(backwards, 13), workdir)
  assert len(list((workdir / 'checkpoints').glob('*.aside-*'))) == 2
  assert [line['step'] for line in tiny_run.read_metrics(workdir)] == list(
    range(1, 14)
  )
  (folder / 'corpus' / 'more.txt').write_text('more text', encoding='utf-8')
  try:
    expected = (
      r'the corpus is .* but .*back .* after step 13 by data\.on_change='
    )
    with pytest.raises(errors.InputError, match=expected):
      loop.run(tiny_run.until(cfg, 14), workdir)
  finally:
    (folder / 'corpus' / 'more.txt').unlink()
  assert not list(pathlib.Path(cfg.data.cache_dir).glob('tokenizer-*'))


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')  # the last test, which alone needs it
@pytest.mark.parametrize(
  ('num_steps', 'breaks'),
  [
    (20, ((7,),)),
    pytest.param(40, ((20,), (7, 20)), marks=pytest.mark.nightly),
  ],
)
def test_resume_is_bitwise(tmp_path, num_steps, breaks):
  """20 == 7 + 13: arrays, EMA, loader, loss lines."""
  cfg = tiny_run.until(tiny_run.make(tmp_path), num_steps)
  straight = tmp_path / 'straight'
  loop.run(cfg, straight)
  want, documents = tiny_run.committed(cfg, straight, num_steps)
  progress = {'step': num_steps, 'tokens': cfg.train.total_tokens}
  assert documents['progress'] == progress
  assert np.any(np.asarray(want['train']['router']['moe']))
  assert np.any(np.asarray(want['train']['router']['mtp']))
  for stops in breaks:
    workdir = tmp_path / '+'.join(map(str, stops))
    for stop in (*stops, num_steps):
      loop.run(tiny_run.until(cfg, stop), workdir)
    got, same = tiny_run.committed(cfg, workdir, num_steps)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert same == documents
    assert tiny_run.read_metrics(workdir) == tiny_run.read_metrics(straight)
  assert len(tiny_run.read_metrics(straight)) == num_steps
  for line in tiny_run.read_metrics(straight):
    assert line['skipped'] == 0
  for name in ('loss.png', 'samples.txt', 'config.json', 'tokenizer.json'):
    assert (straight / name).stat().st_size > 0
  first, *_, last = tiny_run.read_metrics(straight)
  assert last['loss'] < first['loss'] - 0.25
