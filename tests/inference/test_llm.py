"""A loaded run: the trainer's very state, its oracle, its text, its damage."""

import contextlib
import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import errors
from dsv3_jax.checkpoint import store
from dsv3_jax.inference import engine_stats, generate, llm, redundant_experts
from dsv3_jax.nn import model
from dsv3_jax.training import evaluate, loop
from tests import reference, tiny_run, tolerances
from tests.nn import models


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Configuration, workdir, last evaluation and its figures, of a real run."""
  folder, seen = tmp_path_factory.mktemp('loaded'), []
  heldout = evaluate.heldout

  def spy(evaluation):
    seen.append(evaluation)
    return heldout(evaluation)

  changes = {'train__total_tokens': tiny_run.tokens_after(6)}
  changes['sample__prompts'] = ()  # nobody reads them
  cfg = tiny_run.make(folder, checkpoint__every_steps=3, **changes)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, 'heldout', spy)
    metrics = loop.run(cfg, folder / 'run')
  return cfg, folder / 'run', seen[-1], metrics


@pytest.fixture(scope='module')
def trained(run):
  return dsv3_jax.load(run[1])


SHAPE = (2, 20)  # one, as each is compiled


def tokens_of(cfg, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.array(rng.integers(0, cfg.model.vocab_size, SHAPE), jnp.int32)


def batch_of(tokens_BT):
  ones_BT = jnp.ones_like(tokens_BT)
  return model.Batch(
    tokens_BT=tokens_BT,
    targets_BT=jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1))),
    positions_BT=jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
    ),
    segments_BT=ones_BT,
    weights_BT=ones_BT.astype(jnp.float32),
  )


def test_weights_and_biases_are_the_trainer_s_last(run, trained):
  cfg, _, last, _ = run
  assert trained.config == cfg  # it trains in f32, as it is loaded
  got = (trained.params, trained.router_biases)
  want = (last.params, last.router_biases)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.any(trained.router_biases['moe'])  # trained, not fresh


def test_logits_are_those_of_the_trainer_s_state(run, trained):
  cfg, _, last, _ = run
  tokens_BT = tokens_of(cfg)
  args = (last.params, last.router_biases, batch_of(tokens_BT))
  want, (deeper,) = models.logits(cfg)(*args)
  np.testing.assert_array_equal(trained.logits(tokens_BT), want)
  np.testing.assert_array_equal(trained.mtp_logits(tokens_BT), deeper)


def test_logits_are_the_oracle_s(run, trained):
  cfg = run[0]
  tokens_BZ = tokens_of(cfg, seed=1)
  exact = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  last_B = (tokens_BZ[:, -1], np.full(2, 19), np.ones(2, np.int32))
  weights = (exact(trained.params), exact(trained.router_biases))
  batch = batch_of(tokens_BZ[:, :-1])
  rows = reference.forward(*weights, cfg, batch, last_B, False)
  main, deeper = trained.logits(tokens_BZ), trained.mtp_logits(tokens_BZ)
  for b, (main_ZV, deeper_ZV, _) in enumerate(rows):
    tolerances.assert_close(main[b], main_ZV)
    # Position i of depth 1 sees t_{i+1}; the last has none.
    tolerances.assert_close(deeper[b, :-1], deeper_ZV[0])


def test_its_score_is_the_figure_that_training_ended_with(run, trained):
  _, _, last, metrics = run
  own = dataclasses.replace(
    last, params=trained.params, router_biases=trained.router_biases
  )
  again = evaluate.heldout(own)
  assert again == {name: metrics[name] for name in again}
  uniform = math.log(own.cfg.model.vocab_size)
  assert metrics['loss_nats_per_token'] < uniform


def test_text_is_what_the_logits_prefer(trained):
  tokenizer, prompts = trained.tokenizer, ['import sys\n', 'def']
  output = trained.generate(prompts, 7, stop_id=-1)
  for prompt, text in zip(prompts, output, strict=True):
    ids = tokenizer.encode(prompt, add_bos=True).tolist()
    assert ids[0] == tokenizer.bos_id
    for _ in range(7):
      padded = ids + [0] * (32 - len(ids))  # one shape; nobody sees ahead
      logits_TV = trained.logits(jnp.array([padded], jnp.int32))[0]
      ids.append(int(jnp.argmax(logits_TV[len(ids) - 1])))
    assert text == tokenizer.decode(ids[-7:])


def generation(tokens):
  """Of these tokens, by an engine that took no time."""
  rest = {'prefill_seconds': 0.0, 'decode_seconds': 0.0, 'decoded': 1}
  counts = [
    f.name
    for f in dataclasses.fields(engine_stats.EngineStats)
    if f.type is int
  ]
  rest['stats'] = engine_stats.EngineStats(**dict.fromkeys(counts, 0))
  return generate.Generation(tokens=tokens, **rest)


def test_text_is_asked_of_the_engine_until_eos(trained, monkeypatch):
  calls = []

  def spy(runner, prompts, max_new_tokens, **options):
    assert runner is asked.runner
    calls.append((prompts, max_new_tokens, options))
    return generation([[40, 41]])

  tokenizer = trained.tokenizer
  args = (trained.config, trained.params, trained.router_biases, tokenizer)
  asked = llm.LLM(*args)
  monkeypatch.setattr(generate, 'generate', spy)
  assert asked.generate(['def'], 9) == [tokenizer.decode([40, 41])]
  asked.generate(['def'], 9, stop_id=7, temperature=0.5, seed=3)
  ids = [tokenizer.encode('def', add_bos=True).tolist()]
  assert ids[0][0] == tokenizer.bos_id
  options = {'stop_id': 7, 'temperature': 0.5, 'seed': 3}
  eos = {'stop_id': (tokenizer.eos_id,)}
  assert calls == [(ids, 9, eos), (ids, 9, options)]


@pytest.mark.nightly
def test_old_keywords_are_accepted_with_a_warning(run, trained, monkeypatch):
  match = 'num_drafts is deprecated: use num_speculative_tokens'
  with pytest.warns(DeprecationWarning, match=match):
    loaded = dsv3_jax.load(run[1], num_drafts=1)
  assert loaded.runner.num_speculative_tokens == 1
  calls = []
  spy = lambda *args, **options: calls.append(options) or generation([[40]])
  with monkeypatch.context() as patch:
    patch.setattr(generate, 'generate', spy)
    with pytest.warns(DeprecationWarning, match='invariant is deprecated'):
      trained.generate(['def'], 3, invariant=True)
    trained.generate(['def'], 3, batch_invariant=True)
  assert calls[0] == calls[1] and calls[0]['batch_invariant']
  with pytest.raises(TypeError, match=r"unexpected arguments: \['num_draft'\]"):
    dsv3_jax.load(run[1], num_draft=1)
  with pytest.raises(TypeError, match='num_speculative_tokens only'):
    dsv3_jax.load(run[1], num_drafts=1, num_speculative_tokens=1)
  config = redundant_experts.RedundancyConfig(redundant=-1)
  match = 'plan is deprecated: use redundancy'
  with (
    pytest.warns(DeprecationWarning, match=match),
    pytest.raises(errors.InputError, match='redundant_experts=-1'),
  ):
    dsv3_jax.load(run[1], plan=config)
  with pytest.raises(TypeError, match='redundancy only'):
    dsv3_jax.load(run[1], plan=config, redundancy=config)
  with pytest.warns(DeprecationWarning, match='router is deprecated'):
    assert trained.router is trained.router_biases


def test_bfloat16_computes_in_bfloat16(run, trained):
  low = dsv3_jax.load(run[1], 'bfloat16')
  assert (low.config.precision, trained.config.precision) == ('bf16', 'f32')
  tokens_BT = tokens_of(run[0], seed=2)
  got, want = low.logits(tokens_BT), trained.logits(tokens_BT)
  assert got.dtype == jnp.float32 and np.any(got != want)
  tolerances.assert_close(got, want, 'bfloat16')


def test_a_model_without_mtp_has_no_mtp_logits(run, trained):
  cfg = trained.config
  mtp = dataclasses.replace(cfg.model.mtp, depth=0)
  plain = dataclasses.replace(cfg.model, mtp=mtp)
  cfg = dataclasses.replace(cfg, model=plain)
  args = (trained.params, trained.router_biases, trained.tokenizer)
  model_without = llm.LLM(cfg, *args)
  tokens_BT = tokens_of(cfg)
  with pytest.raises(errors.InputError, match=r'model\.mtp\.depth=0'):
    model_without.mtp_logits(tokens_BT)
  np.testing.assert_array_equal(
    model_without.logits(tokens_BT), trained.logits(tokens_BT)
  )


def test_any_committed_step_can_be_loaded(run, trained):
  third = dsv3_jax.load(run[1], step=3)
  assert np.any(third.params['head']['w'] != trained.params['head']['w'])
  for a, b in zip(
    jax.tree.leaves(dsv3_jax.load(run[1], step=6).params),
    jax.tree.leaves(trained.params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(errors.InputError, match=r'000000004.*step 3 is'):
    dsv3_jax.load(run[1], step=4)


def test_the_average_of_the_weights_can_be_loaded(run, trained, copied):
  averaged = dsv3_jax.load(run[1], ema=True)
  np.testing.assert_array_equal(
    averaged.router_biases['moe'], trained.router_biases['moe']
  )
  path = run[1] / 'checkpoints'
  with contextlib.closing(store.Store(path, keep=1)) as checkpoints:
    kept = checkpoints.open(6)['ema', 'head', 'w']
    np.testing.assert_array_equal(averaged.params['head']['w'], kept[:])
  assert np.any(averaged.params['head']['w'] != trained.params['head']['w'])
  config_path = copied[0] / 'config.json'
  source = json.loads(config_path.read_text())
  source['optim']['ema_decay'] = 0.0
  config_path.write_text(json.dumps(source))
  with pytest.raises(errors.InputError, match=r'optim\.ema_decay=0\.0'):
    dsv3_jax.load(copied[0], ema=True)


@pytest.mark.parametrize(
  ('tokens', 'message'),
  [([[1, 512]], r'ids outside 0\.\.511'), ([[1] * 65], 'has 65')],
)
def test_logits_of_what_is_no_token_are_refused(trained, tokens, message):
  with pytest.raises(errors.InputError, match=message):
    trained.logits(np.array(tokens, np.int32))


@pytest.mark.parametrize('dtype', ['bf16', 'float16', ''])
def test_other_dtypes_are_refused_before_anything_is_read(tmp_path, dtype):
  with pytest.raises(errors.InputError, match=f"dtype='{dtype}' must be"):
    dsv3_jax.load(tmp_path / 'nowhere', dtype)


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(
    errors.InputError, match=r'config\.json cannot be read \(No such'
  ):
    dsv3_jax.load(tmp_path / 'nowhere')
  (tmp_path / 'config.json').write_text('{"seed": 1,', encoding='utf-8')
  with pytest.raises(errors.InputError, match=r'config\.json is not JSON'):
    dsv3_jax.load(tmp_path)
  (tmp_path / 'config.json').write_text('{"seed": 1}', encoding='utf-8')
  with pytest.raises(errors.InputError, match='precision is missing'):
    dsv3_jax.load(tmp_path)


@pytest.fixture
def copied(run, tmp_path):
  """A copy of the run that a test may spoil, and its newest step."""
  shutil.copytree(run[1], tmp_path / 'copy')
  steps = (tmp_path / 'copy/checkpoints').iterdir()
  return tmp_path / 'copy', max(s for s in steps if s.name.isdigit())


def test_a_flipped_bit_is_refused_by_the_file_s_name(copied):
  workdir, step = copied
  files = [path for path in (step / 'arrays').rglob('*') if path.is_file()]
  path = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(errors.InputError, match=f'{path.name} does not match'):
    dsv3_jax.load(workdir)


@pytest.mark.parametrize('name', ['manifest.json', 'progress.json'])
def test_a_missing_file_is_refused_by_its_name(copied, name):
  workdir, step = copied
  (step / name).unlink()
  with pytest.raises(errors.InputError, match=f'{name} is missing'):
    dsv3_jax.load(workdir)


def test_a_run_without_steps_or_tokenizer_is_refused(copied):
  workdir, _ = copied
  (workdir / 'tokenizer.json').unlink()
  without = dsv3_jax.load(workdir)
  with pytest.raises(errors.InputError, match=r'no tokenizer\.json'):
    without.generate(['def'], 3)
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises(errors.InputError, match='holds no committed step'):
    dsv3_jax.load(workdir)
