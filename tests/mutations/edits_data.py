"""Edits of prepared rows: rows of `mutants.Mutant`."""

_PREPARE = 'tests/data/test_prepare.py'
_FEEDS = 'tests/training/test_feeds.py'

DATA = (
  (
    'prepare: a restart goes on a shard early',
    'dsv3_jax/data/prepare.py',
    'self._iterator.set_state(self.index[i - 1].state)',
    'self._iterator.set_state(self.index[max(i - 2, 0)].state)',
    (_PREPARE + '::test_a_killed_start_goes_on_with_the_same_bytes',),
  ),
  (
    'prepare: a filter counts and keeps',
    'dsv3_jax/data/selection.py',
    '        _drop(dropped, rule, size, example)\n        continue\n',
    '        _drop(dropped, rule, size, example)\n',
    ('tests/data/test_selection.py',),
  ),
  (
    'mixture: shares of documents, not of bytes',
    'dsv3_jax/data/mixture.py',
    's.share / _mean_bytes(s.documents) for s',
    's.share for s',
    ('tests/data/test_mixture.py::test_shares_are_those_of_bytes',),
  ),
  (
    'prepare: near duplicates are not compared',
    'dsv3_jax/data/dedup.py',
    'if index >= self._cfg.near:',
    'if index >= 0.0:',
    ('tests/data/test_dedup.py',),
  ),
  (
    'prepared rows: one is left out at each step',
    'dsv3_jax/training/feeds.py',
    '    self.row += count * shape[1]\n    following',
    '    self.row += count * shape[1] + 1\n    following',
    (_FEEDS + '::test_prepared_arrays_are_those_of_the_stream',),
  ),
  (
    "prepared rows: every process reads the first one's",
    'dsv3_jax/training/feeds.py',
    'range(*sequences.indices(shape[1]))}',
    'range(len(range(*sequences.indices(shape[1]))))}',
    (_FEEDS + '::test_a_process_reads_its_own_rows_only',),
  ),
  (
    'prepared rows: a shard in the place of another',
    'dsv3_jax/data/shards.py',
    'if found_number != number:',
    'if found_number < number:',
    ('tests/data/test_shards.py',),
  ),
)
