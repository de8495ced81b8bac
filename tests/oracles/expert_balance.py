"""EPLB said literally: one expert at a time, in exact arithmetic."""

import fractions
import itertools


def packed(loads, packs):
  """Balanced packing, item by item: which items each pack has, in order."""
  if len(loads) == packs:
    return [[item] for item in range(packs)]
  contents = [[] for _ in range(packs)]
  total = lambda pack: sum(loads[item] for item in contents[pack])
  for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
    room = [p for p in range(packs) if len(contents[p]) < len(loads) // packs]
    contents[min(room, key=lambda pack: (total(pack), pack))].append(item)
  return contents


def placed(loads, replicas, groups, nodes, gpus):
  """Slots as (expert, number of its copy), in exact arithmetic."""
  if groups % nodes:
    groups = nodes = 1
  size = len(loads) // groups
  members = [range(g * size, g * size + size) for g in range(groups)]
  sums = [sum(loads[e] for e in member) for member in members]
  slots = []
  for node in packed(sums, nodes):
    experts = [e for group in node for e in members[group]]
    copies, count = [(e, 0) for e in experts], dict.fromkeys(experts, 1)
    share = lambda e, count=count: fractions.Fraction(loads[e], count[e])
    while len(copies) < replicas // nodes:
      busy = max(experts, key=share)  # the first of equals
      copies.append((busy, count[busy]))
      count[busy] += 1
    for gpu in packed([share(e) for e, _ in copies], gpus // nodes):
      slots += [copies[item] for item in gpu]
  return slots


def every_packing(items, packs):
  """All ways to put items into packs, equally many into each."""
  if packs == 1:
    yield [items]
    return
  first, *rest = items
  for others in itertools.combinations(rest, len(items) // packs - 1):
    left = [item for item in rest if item not in others]
    for more in every_packing(left, packs - 1):
      yield [[first, *others], *more]
