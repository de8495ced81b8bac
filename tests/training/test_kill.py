"""`kill -9` at random moments never loses a committed step.

Two hundred kills: `python -m benchmarks.kill_and_resume --kills=200`.
"""

import pytest

from benchmarks import kill_and_resume
from tests import tiny_run


@pytest.mark.nightly
def test_six_kills_lose_nothing(tmp_path, monkeypatch):
  # Bits are compared: compiled as users do.
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '0')
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  cfg = tiny_run.make(
    tmp_path / 'data', checkpoint__every_steps=2, checkpoint__keep=1000
  )
  folder = tmp_path / 'runs'
  folder.mkdir()
  counts = kill_and_resume.kill_and_resume(cfg, folder, kills=6, seed=0)
  assert counts['kills'] == 6
  assert counts['newest'] >= 2
