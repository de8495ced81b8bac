"""What a server compiles ahead is what its steps then need."""

import pytest

from dsv3_jax.inference import engine, warmup
from tests.inference import counting


def opened(room, max_rows=16, num_pages=200, num_drafts=0, **how):
  made = counting.Steps(room=room, num_drafts=num_drafts)
  return engine.Engine(
    made,
    num_pages=num_pages,
    max_rows=max_rows,
    least_pages=warmup.least_pages(room),
    **how,
  )


def recorded(session, monkeypatch):
  """The sizes of steps from now on."""
  found, made = set(), session.steps

  def record(kind):
    run = getattr(made, kind)

    def step(rows, *rest):
      sizes = (*rows.tokens_BT.shape, rows.table_Bb.shape[1])
      found.add(engine.Size(*sizes, kind))
      return run(rows, *rest)

    monkeypatch.setattr(made, kind, step)

  for kind in ('prefill', 'extend', 'decode'):
    record(kind)
  return found


@pytest.mark.parametrize(
  ('room', 'most_rows', 'count'), [(256, 16, 21), (4096, 16, 48), (64, 1, 3)]
)
def test_how_many(room, most_rows, count):
  sizes = warmup.sizes(opened(room, most_rows), room)
  assert len(set(sizes)) == len(sizes) == count


def test_a_warm_up_runs_these_sizes_and_changes_nothing(monkeypatch):
  session = opened(256)
  found = recorded(session, monkeypatch)
  sizes = warmup.sizes(session, 256)
  before = session._caches.copy()
  for size in sizes:
    session.warm(size)
  assert found == set(sizes)
  assert (session._caches == before).all() and session.is_idle


@pytest.mark.parametrize('num_drafts', [0, 2])
@pytest.mark.parametrize('room', [64, 256, 1500])
def test_one_request_at_a_time_meets_no_other_size(
  monkeypatch, room, num_drafts
):
  session = opened(room, num_drafts=num_drafts)
  found = recorded(session, monkeypatch)
  for length in range(1, room - 2, 37):
    asked = [session.submit([1, 2] * (length // 2) + [3], 2)]
    asked.append(session.submit([1, 2] * (length // 2) + [4], 2, twin=None))
    session.cancel(asked[1])
    while not session.is_idle:
      session.step()
  assert found <= set(warmup.sizes(session, room))


def test_bursts_of_short_prompts_meet_no_other_size(monkeypatch):
  session = opened(256)
  found = recorded(session, monkeypatch)
  for count in (2, 5, 16):
    for i in range(count):
      session.submit([i, count] * 20, 100)
    while not session.is_idle:
      session.step()
  assert found <= set(warmup.sizes(session, 256))


@pytest.mark.parametrize('num_drafts', [0, 1])
def test_an_invariant_session_has_two_sizes(monkeypatch, num_drafts):
  session = opened(256, num_drafts=num_drafts, invariant=True)
  found = recorded(session, monkeypatch)
  for i, length in enumerate((1, 70, 200)):
    session.submit([i] * length, 9)
  while not session.is_idle:
    session.step()
  sizes = warmup.sizes(session, 256)
  assert found == set(sizes) and len(sizes) == 2
