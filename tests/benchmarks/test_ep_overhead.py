"""The exchange's overhead on one device, and the rows that it counts."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import ep_overhead
from dsv3_jax.ops import all_to_all


def experts(**changes):
  plain = {'num_experts': 8, 'num_groups': 2, 'top_groups': 2, 'top_k': 8}
  return dataclasses.replace(ep_overhead.published(), **(plain | changes))


def samples(*seconds, cpu):
  return [ep_overhead.Sample(wall, cpu) for wall in seconds]


def test_ratios_are_to_the_plain_path_of_the_same_precision():
  measured = {
    ('bf16', 'plain'): samples(1.0, 2.0, 3.0, cpu=4.0),
    ('bf16', 'one hop'): samples(3.0, 3.0, 1.5, cpu=5.0),
    ('fp8', 'plain'): samples(4.0, 4.0, 4.0, cpu=2.0),
    ('fp8', 'one hop'): samples(6.0, 5.0, 5.0, cpu=3.0),
  }
  _, bf16, _, fp8 = ep_overhead.to_rows(measured)
  ratios = lambda row: [v for name, v in row.items() if 'ratio' in name]
  assert ratios(bf16) == [1.5, 1.5, 1.25]
  assert ratios(fp8) == [1.25, 1.25, 1.5]


def test_forced_hops_lead_to_the_device_itself():
  with ep_overhead.forced():
    assert all_to_all.live(('a', ('b', 'c'))) == (('a',), ('b', 'c'))


def test_paths_do_the_same_work(monkeypatch):
  """A sum of one part is that part: not even rounding differs."""
  calls, all_to_all = [], jax.lax.all_to_all

  def spy(*args, **options):
    calls.append(args)
    return all_to_all(*args, **options)

  monkeypatch.setattr(jax.lax, 'all_to_all', spy)
  layer = ep_overhead.Layer(ep_overhead.DRY, 'bf16')
  plain = layer.run('plain')()
  assert not calls
  forced = layer.run('two hops')()
  assert calls
  for want, got in zip(*map(jax.tree.leaves, (plain, forced)), strict=True):
    assert np.any(np.asarray(want))
    np.testing.assert_array_equal(got, want)


def test_rows_of_one_hop_are_split_by_node():
  """Two nodes of two: rows to itself 1, to its neighbour 10, elsewhere 100."""
  sent = np.full((2, 2, 4), 100)
  for node, peer in np.ndindex(2, 2):
    sent[node, peer, [2 * node, 2 * node + 1]] = 10
    sent[node, peer, 2 * node + peer] = 1
  assert ep_overhead.rows_of(sent, 2, 2) == (4 * 200, 4 * 10)


def test_tokens_of_all_experts_go_everywhere_once():
  rows = ep_overhead.count(experts(), nodes=2, peers=4, tokens=3)
  assert rows['one hop'] == (4, 3)
  assert rows['two hops'] == (1, 2 * 3)  # and on from each of both nodes


def test_limited_routing_keeps_the_bound():
  """All experts of one group, so of one node: of half the tokens, another."""
  moe = experts(top_groups=1, top_k=4)
  rows = ep_overhead.count(moe, nodes=2, peers=4, tokens=64)
  over_nodes = rows['two hops'].over_nodes
  assert 0.3 < over_nodes < 0.7
  assert rows['one hop'].over_nodes == 4 * over_nodes
  assert rows['two hops'].within_node == 3


@pytest.mark.parametrize('path', ['one hop', 'two hops'])
def test_payload_is_that_of_the_report(path):
  """By hand, for 7168 channels in 56 tiles and 8 experts a token."""
  dispatched = 7168 + 4 * 56
  size = {
    'ids': 4 * 8,
    'tokens, gates': dispatched + 4 * 8,
    'outputs': 2 * 7168,
    'their gradients': dispatched,
    "tokens' and gates' gradients": 2 * 7168 + 4 * 8,
  }
  axes = ep_overhead.PATHS[path]
  got = ep_overhead.payload(axes, 7168, ep_overhead.published())
  assert got == sum(size.values())


def test_table_has_both_routings_of_every_size(monkeypatch):
  rows = ep_overhead.Rows(over_nodes=3.0, within_node=2.0)
  count = lambda *args: {'one hop': rows, 'two hops': rows}
  monkeypatch.setattr(ep_overhead, 'count', count)
  monkeypatch.setattr(ep_overhead, 'payload', lambda *args: 1000)
  moe = experts(top_groups=1)
  table = ep_overhead.traffic(moe, 24, tokens=2, peers=4)
  column = lambda name: [row[name] for row in table]
  assert column('nodes') == [1, 1, 2, 2, 4, 4, 8, 8]
  assert column('routing_groups') == [1, 2] * 4
  assert column('bound') == [0, 0, 1, 1, 1, 2, 1, 2]
  assert set(column('kilobytes_over_nodes_two_hops')) == {3.0}
  assert set(column('kilobytes_within_node_two_hops')) == {2.0}


def test_report_holds_both_tables(monkeypatch, tmp_path):
  names = ep_overhead.PRECISIONS
  measured = {(name, 'plain'): samples(1.0, cpu=1.0) for name in names}
  measure = lambda *args: ep_overhead.to_rows(measured)
  monkeypatch.setattr(ep_overhead, 'measure', measure)
  traffic = lambda *args: [{'nodes': 8, 'bound': 4}]
  monkeypatch.setattr(ep_overhead, 'traffic', traffic)
  output = tmp_path / 'results.md'
  assert ep_overhead.main(['--dry_run', f'--output={output}']) == 0
  text = output.read_text(encoding='utf-8')
  assert '| fp8 | plain |' in text and '| 8 | 4 |' in text


def test_no_rounds_are_bad_input(capsys):
  with pytest.raises(SystemExit) as ended:
    ep_overhead.main(['--rounds=0'])
  assert ended.value.code == 2
  assert '--rounds=0 must be at least 1' in capsys.readouterr().err
