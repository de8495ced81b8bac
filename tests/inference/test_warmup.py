"""What a server compiles ahead is what its steps then need."""

import pytest

from dsv3_jax.inference import engine, warmup
from tests.inference import counting


def opened(
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


def recorded(session, monkeypatch):
  """The sizes of steps from now on."""
  seen, runner = set(), session.runner

  def record(kind):
    run = getattr(runner, kind)

    def step(rows, *rest):
      sizes = (*rows.tokens_BT.shape, rows.table_Bb.shape[1])
      seen.add(engine.StepShape(*sizes, kind))
      return run(rows, *rest)

    monkeypatch.setattr(runner, kind, step)

  for kind in ('prefill', 'extend', 'decode'):
    record(kind)
  return seen


@pytest.mark.parametrize(
  ('room', 'most_rows', 'count'), [(256, 16, 21), (4096, 16, 48), (64, 1, 3)]
)
def test_how_many(room, most_rows, count):
  sizes = warmup.shapes(opened(room, most_rows), room)
  assert len(set(sizes)) == len(sizes) == count


def test_a_warm_up_runs_these_sizes_and_changes_nothing(monkeypatch):
  session = opened(256)
  seen = recorded(session, monkeypatch)
  sizes = warmup.shapes(session, 256)
  before = session._caches.copy()
  for size in sizes:
    session.warm_up(size)
  assert seen == set(sizes)
  assert (session._caches == before).all() and session.is_idle


@pytest.mark.parametrize('num_speculative_tokens', [0, 2])
@pytest.mark.parametrize('room', [64, 256, 1500])
def test_one_request_at_a_time_meets_no_other_size(
  monkeypatch, room, num_speculative_tokens
):
  session = opened(room, num_speculative_tokens=num_speculative_tokens)
  seen = recorded(session, monkeypatch)
  for length in range(1, room - 2, 37):
    asked = [session.submit([1, 2] * (length // 2) + [3], 2)]
    asked.append(
      session.submit([1, 2] * (length // 2) + [4], 2, shares_prompt_with=None)
    )
    session.cancel(asked[1])
    while not session.is_idle:
      session.step()
  assert seen <= set(warmup.shapes(session, room))


def test_bursts_of_short_prompts_meet_no_other_size(monkeypatch):
  session = opened(256)
  seen = recorded(session, monkeypatch)
  for count in (2, 5, 16):
    for i in range(count):
      session.submit([i, count] * 20, 100)
    while not session.is_idle:
      session.step()
  assert seen <= set(warmup.shapes(session, 256))


@pytest.mark.parametrize('num_speculative_tokens', [0, 1])
def test_an_invariant_session_has_two_sizes(
  monkeypatch, num_speculative_tokens
):
  session = opened(
    256, num_speculative_tokens=num_speculative_tokens, batch_invariant=True
  )
  seen = recorded(session, monkeypatch)
  for i, length in enumerate((1, 70, 200)):
    session.submit([i] * length, 9)
  while not session.is_idle:
    session.step()
  sizes = warmup.shapes(session, 256)
  assert seen == set(sizes) and len(sizes) == 2
