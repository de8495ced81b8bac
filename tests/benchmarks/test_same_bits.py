"""What a comparison of two commits reports."""

import pytest

from benchmarks import same_bits


@pytest.mark.parametrize(
  ('after', 'end'),
  [
    ([{'loss': 0.5}, {'loss': 0.25}], 'equal'),
    ([{'loss': 0.5}, {'loss': 0.25000000000000006}], '0.25000000000000006}'),
    ([{'loss': 0.5}], '2 records, then 1'),
  ],
)
def test_a_difference_is_seen(after, end):
  before = {'case': [{'loss': 0.5}, {'loss': 0.25}]}
  (line,) = same_bits.differences(before, {'case': after})
  assert line.endswith(end)


def test_an_unknown_commit_is_one_line(capsys):
  with pytest.raises(SystemExit) as caught:
    same_bits.main(['--before=no-such-commit'])
  assert caught.value.code == 2
  assert 'no-such-commit is no commit' in capsys.readouterr().err
