"""The minimum cut of a directed graph, by Dinic's algorithm."""

from collections.abc import Hashable, Iterable


def source_side(
  edges: Iterable[tuple[Hashable, Hashable, int]],
  source: Hashable,
  sink: Hashable,
) -> set:
  """Nodes on the source's side of a minimum cut; the smallest such side.

  Args:
    edges: from, to, capacity. A cut costs the capacities of all edges from the
      source's side to the sink's.
  """
  heads, free, leaving = [], [], {source: [], sink: []}
  for tail, head, capacity in edges:
    for a, b, c in ((tail, head, capacity), (head, tail, 0)):
      leaving.setdefault(a, []).append(len(heads))
      heads.append(b)
      free.append(c)  # edge i ^ 1 is the way back along edge i
  while sink in (levels := _levels(heads, free, leaving, source)):
    _saturate(heads, free, leaving, levels, source, sink)
  return set(levels)


def _levels(heads, free, leaving, source):
  """How many edges with free capacity lie between the source and each node."""
  levels, queue = {source: 0}, [source]
  for node in queue:
    for edge in leaving[node]:
      if free[edge] and heads[edge] not in levels:
        levels[heads[edge]] = levels[node] + 1
        queue.append(heads[edge])
  return levels


def _saturate(heads, free, leaving, levels, source, sink):
  """Sends flow along shortest paths until each has a full edge."""
  tried, path, node = dict.fromkeys(levels, 0), [], source
  while True:
    if node == sink:
      flow = min(free[edge] for edge in path)
      for edge in path:
        free[edge] -= flow
        free[edge ^ 1] += flow
      path, node = [], source
    elif tried[node] < len(leaving[node]):
      edge = leaving[node][tried[node]]
      if free[edge] and levels.get(heads[edge]) == levels[node] + 1:
        path.append(edge)
        node = heads[edge]
      else:
        tried[node] += 1
    elif path:
      node = heads[path.pop() ^ 1]
      tried[node] += 1
    else:
      return
