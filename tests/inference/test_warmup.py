"""What a server compiles ahead is what its steps then need."""

import pytest

from dsv3_jax.inference import engine, warmup
from dsv3_jax.inference import request as requests
from tests.inference import counting

SCORED = requests.SamplingParams(logprobs=0, prompt_logprobs=True)


def make_engine(
  room, max_rows=16, num_blocks=200, num_speculative_tokens=0, **options
):
  runner = counting.Runner(
    room=room, num_speculative_tokens=num_speculative_tokens
  )
  return engine.Engine(
    runner,
    num_blocks=num_blocks,
    max_rows=max_rows,
    min_blocks=warmup.min_blocks(room),
    **options,
  )


def recorded(monkeypatch):
  """The sizes of steps from now on."""
  seen, extend = set(), counting.Runner.extend

  def record(kind):
    run = getattr(counting.Runner, kind)

    def step(runner, rows, *rest):
      sizes = (*rows.tokens_BT.shape, rows.table_Bb.shape[1])
      seen.add(engine.StepShape(*sizes, kind))
      with monkeypatch.context() as patch:  # a step may be made of another
        patch.setattr(counting.Runner, 'extend', extend)
        return run(runner, rows, *rest)

    monkeypatch.setattr(counting.Runner, kind, step)

  for kind in ('prefill', 'extend', 'score', 'decode'):
    record(kind)
  return seen


@pytest.mark.parametrize(
  ('room', 'most_rows', 'count'), [(256, 16, 24), (4096, 16, 57), (64, 1, 4)]
)
def test_how_many(room, most_rows, count):
  sizes = warmup.shapes(make_engine(room, most_rows), room)
  assert len(set(sizes)) == len(sizes) == count


def test_a_warm_up_runs_these_sizes_and_changes_nothing(monkeypatch):
  model_engine = make_engine(256)
  seen = recorded(monkeypatch)
  sizes = warmup.shapes(model_engine, 256)
  before = model_engine._caches.copy()
  for size in sizes:
    model_engine.warm_up(size)
  assert seen == set(sizes)
  assert (model_engine._caches == before).all() and model_engine.is_idle


@pytest.mark.parametrize('num_speculative_tokens', [0, 2])
@pytest.mark.parametrize('room', [64, 256, 1500])
def test_one_request_at_a_time_meets_no_other_size(
  monkeypatch, room, num_speculative_tokens
):
  model_engine = make_engine(
    room, num_speculative_tokens=num_speculative_tokens
  )
  seen = recorded(monkeypatch)
  for length in range(1, room - 2, 37):
    asked = [model_engine.submit([1, 2] * (length // 2) + [3], 2)]
    asked.append(
      model_engine.submit(
        [1, 2] * (length // 2) + [4], 2, shares_prompt_with=None
      )
    )
    model_engine.cancel(asked[1])
    while not model_engine.is_idle:
      model_engine.step()
  assert seen <= set(warmup.shapes(model_engine, room))


def test_bursts_of_short_prompts_meet_no_other_size(monkeypatch):
  model_engine = make_engine(256)
  seen = recorded(monkeypatch)
  for count in (2, 5, 16):
    for i in range(count):
      model_engine.submit([i, count] * 20, 100)
    while not model_engine.is_idle:
      model_engine.step()
  assert seen <= set(warmup.shapes(model_engine, 256))


@pytest.mark.parametrize('room', [64, 256, 1500])
def test_one_scored_prompt_at_a_time_meets_no_other_size(monkeypatch, room):
  model_engine = make_engine(room)
  seen = recorded(monkeypatch)
  for length in range(1, room - 2, 37):
    model_engine.submit([1] * length, 2, SCORED)
    while not model_engine.is_idle:
      model_engine.step()
  assert {size.kind for size in seen} == {'score', 'decode'}
  assert seen <= set(warmup.shapes(model_engine, room))


@pytest.mark.parametrize('num_speculative_tokens', [0, 1])
def test_a_batch_invariant_engine_has_three_sizes(
  monkeypatch, num_speculative_tokens
):
  model_engine = make_engine(
    256, num_speculative_tokens=num_speculative_tokens, batch_invariant=True
  )
  seen = recorded(monkeypatch)
  for i, length in enumerate((1, 70, 200)):
    model_engine.submit([i] * length, 9, SCORED if i == 1 else requests.GREEDY)
  while not model_engine.is_idle:
    model_engine.step()
  sizes = warmup.shapes(model_engine, 256)
  assert seen == set(sizes) and len(sizes) == 3
