"""Fuzzes headers, indexes and configs of checkpoint folders.

  python -m tests.checkpoint.safetensors.fuzz 1000000 [seed]

Every third case is a config, the others are headers and indexes.
"""

import pathlib
import sys

from tests import fuzzing
from tests.checkpoint.safetensors import fuzz_config, fuzz_shards

_DEEP = 20  # each so manyth config is opened in full, which takes long


def run(folder: pathlib.Path, count: int, seed: int = 0) -> dict[str, list]:
  """Checks `count` cases; of either kind, how many were accepted and refused.

  Raises:
    AssertionError: with the case, or whatever it was that a case raised.
  """
  counts = {'shards': [0, 0], 'configs': [0, 0]}
  places = {kind: folder / kind for kind in counts}
  for place in places.values():
    place.mkdir()
  fuzz_config.make(places['configs'])
  configs = fuzz_config.cases(seed, count)
  folders = fuzz_shards.cases(seed, count)
  for i in range(count):
    kind = 'configs' if i % 3 == 2 else 'shards'
    case = next(configs if kind == 'configs' else folders)
    try:
      if kind == 'configs':
        good = fuzz_config.check(case, places[kind], i % (3 * _DEEP) == 2)
      else:
        good = fuzz_shards.check(case, places[kind])
    except BaseException as error:
      error.add_note(f'case {i} of seed {seed}, {kind}: {case!r:.5000}')
      raise
    counts[kind][not good] += 1
    if (i + 1) % 10_000 == 0:
      print(f'{i + 1}: [accepted, refused] {counts}', flush=True)
  return counts


if __name__ == '__main__':
  fuzzing.main(run, sys.argv)
