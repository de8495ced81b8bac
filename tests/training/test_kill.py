"""`kill -9` at random moments never loses a committed step."""

import pytest

from benchmarks import kill_and_resume
from tests import tiny_run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_lose_nothing(tmp_path, monkeypatch):
  # Bits are compared: compiled as users do.
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '0')
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  cfg = tiny_run.make(
    tmp_path / 'data', checkpoint__every_steps=2, checkpoint__keep=1000
  )
  folder = tmp_path / 'runs'
  folder.mkdir()
  counts = kill_and_resume.kill_and_resume(cfg, folder, kills=20, seed=0)
  assert counts['kills'] == 20
  assert counts['during_a_save'] >= 1
  assert counts['newest'] >= 2
