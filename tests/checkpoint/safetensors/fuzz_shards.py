"""Checkpoint folders with something wrong, made by changing valid ones.

JSON is a tree whose objects are lists of pairs, so that a key can be there
twice. Some changes leave a folder valid: then the safetensors package must
read the same tensors from it.
"""

import json
import math
import pathlib
import random
from collections.abc import Iterator

import safetensors

from dsv3_jax import errors
from dsv3_jax.checkpoint.safetensors import reader as shards

WIDTHS = {name: dtype.itemsize for name, dtype in shards.DTYPES.items()}
TENSOR_NAMES = ('a', 'b.weight', 'c', 'layer.0.w', 'n\u00e4me', 'x"y', '\u2028')
FILES = ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')


class Pairs(list):
  """An object of JSON: a list of [key, value]."""


class Text(str):
  """Is put into the JSON as it stands."""


NUMBERS = (
  *(-1, 0, 1, 2, 3, 7, 8, 9, 2**31, 2**32, 2**61, 2**63 - 1, 2**63, 2**64),
  *(-(2**63), 2**65, 10**30, True, False, None, 1.0, 0.5, -0.0, 1e300, '1'),
  *(Text('-0'), Text('1e0'), Text('01'), Text('NaN'), Text('-Infinity')),
  *(Text('1' * 5000), Text('+1'), Text('0x1'), Text('1_0'), Text('1.')),
)
DTYPE_NAMES = (
  *WIDTHS,
  *('F4', 'F6_E2M3', 'F8_E8M0', 'U16', 'U32', 'U64', 'C64', 'f32', 'F32 ', ''),
)
STRINGS = (
  *(
    '',
    'a',
    'c',
    '__metadata__',
    'dtype',
    '\ud800',
    '\x00',
    'a\nb',
    'x' * 9999,
  ),
  *('pt', '../up.safetensors', '/abs.safetensors', 'sub/a.safetensors'),
  *('a\\b.safetensors', 'gone.safetensors', 'nul\0.safetensors', 'model.bin'),
  *('line\n.safetensors', 'x' * 300 + '.safetensors', '.safetensors', *FILES),
)
NESTED = (
  *([], [[]], [[[[1]]]], Pairs(), Pairs([['a', 1]]), [Pairs([['a', []]])]),
  *(Text('[' * 100_000), Text('{"a":' * 2000), Text('[' * 900 + ']' * 900)),
  *(Text('{"a":' * 300 + '1' + '}' * 300), Text('"\\ud800"'), Text('"\\x"')),
)
FILLS = (
  *(b' ', b'   ', b'\n', b'\x00', b'\xff', b'\xef\xbb\xbf', b'{', b'}', b','),
  *(b'\xed\xa0\x80', b'"', b'\\', b'/**/', b'\t', b'\xc3\xa9', b'0' * 64),
)


def dump(node) -> str:
  """The tree as JSON, or nearly."""
  if isinstance(node, Text):
    return node
  if isinstance(node, Pairs):
    pairs = [f'{json.dumps(key)}:{dump(value)}' for key, value in node]
    return '{' + ','.join(pairs) + '}'
  if isinstance(node, list):
    return '[' + ','.join(map(dump, node)) + ']'
  return json.dumps(node)


def copy(node):
  """A tree that shares no list: a change must not reach two places."""
  return type(node)(map(copy, node)) if isinstance(node, list) else node


def slots(node) -> Iterator[tuple[list, int]]:
  """Every place of a value: the list that holds it, and its index."""
  for i, value in enumerate(node):
    if isinstance(node, Pairs):
      yield value, 1
      value = value[1]
    else:
      yield node, i
    if isinstance(value, list):
      yield from slots(value)


def get(pairs, key):
  """The value of a key, if there is one."""
  values = [v for k, v in pairs if k == key] if isinstance(pairs, Pairs) else []
  return values[0] if values else None


# Changes of a tree in place; each may find nothing to do.


def change_dtype(rng, tree):
  places = [p for p in slots(tree) if p[0][0] == 'dtype']
  if places:
    place, i = rng.choice(places)
    place[i] = rng.choice(DTYPE_NAMES)


def change_number(rng, tree):
  places = [p for p in slots(tree) if type(p[0][p[1]]) is int]
  if places:
    place, i = rng.choice(places)
    near = place[i] + rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
    place[i] = near if rng.random() < 0.5 else rng.choice(NUMBERS)


def change_list(rng, tree):
  key = rng.choice(('shape', 'data_offsets'))
  places = [get(value, key) for _, value in tree]
  places = [place for place in places if type(place) is list]
  if not places:
    return
  place, choice = rng.choice(places), rng.randrange(6)
  if choice == 0:
    place.append(rng.choice((0, 1, 2)))
  elif choice == 1 and place:
    place.pop(rng.randrange(len(place)))
  elif choice == 2:
    rng.shuffle(place)
  elif choice == 3:
    place += [1] * rng.randrange(12)
  elif choice == 4:
    place[:] = [rng.choice((0, 1, 2**16, 2**31, 2**62)) for _ in range(5)]
  else:
    place.clear()


def shift_offsets(rng, tree):
  spans = [get(value, 'data_offsets') for _, value in tree]
  spans = [span for span in spans if type(span) is list and len(span) == 2]
  by = rng.choice((-8, -1, 1, 8))
  some = rng.randint(1, len(spans)) if spans else 0
  for span in rng.sample(spans, some):
    span[:] = [n + by if type(n) is int else n for n in span]


def exchange(rng, tree):
  places = list(slots(tree))
  if len(places) > 1:
    (one, i), (other, k) = rng.sample(places, 2)
    one[i], other[k] = copy(other[k]), copy(one[i])


def change_pairs(rng, tree):
  """A key more, less, twice or of another name; another order."""
  places = [tree, *(p[i] for p, i in slots(tree) if isinstance(p[i], Pairs))]
  place, choice = rng.choice(places), rng.randrange(6)
  if choice == 0 or not place:
    place.append([rng.choice(STRINGS), rng.choice((1, 'x', None, []))])
  elif choice == 1:
    place.pop(rng.randrange(len(place)))
  elif choice == 2:
    place.insert(rng.randrange(len(place) + 1), copy(rng.choice(place)))
  elif choice == 3:
    rng.choice(place)[0] = rng.choice(STRINGS)
  elif choice == 4:
    rng.choice(place)[0] = rng.choice(place)[0]
  else:
    rng.shuffle(place)


def put_junk(rng, tree):
  places = list(slots(tree))
  if places:
    place, i = rng.choice(places)
    place[i] = copy(rng.choice(rng.choice((NUMBERS, STRINGS, NESTED))))


def change_metadata(rng, tree):
  metadata = rng.choice(
    (None, 'x', [], Pairs(), Pairs([['k', rng.choice(STRINGS)]]),
     Pairs([['k', 1]]), Pairs([[rng.choice(STRINGS), 'v']]),
     Pairs([['k', 'v'], ['k', 'w']]), Pairs([['k', Pairs()]]))
  )  # fmt: skip
  tree.insert(rng.randrange(len(tree) + 1), ['__metadata__', metadata])


CHANGES = (
  *(change_dtype, change_number, change_number, change_list, shift_offsets),
  *(exchange, change_pairs, put_junk, change_metadata),
)


def change_bytes(rng, raw: bytes) -> bytes:
  """Cuts, flips, puts in or takes out some bytes."""
  at, choice = rng.randrange(len(raw) + 1), rng.randrange(8)
  if choice == 0:
    return raw[:at]
  if choice == 1:
    return raw + rng.choice(FILLS)
  if choice == 2:
    return raw[:at] + rng.choice(FILLS) + raw[at:]
  if choice == 3:
    return raw[:at] + raw[at + rng.randint(1, 9) :]
  if choice == 4 and len(raw) >= 8:
    length = int.from_bytes(raw[:8], 'little')
    near = length + rng.choice((-8, -1, 1, 8, len(raw) - 8 - length))
    wrong = rng.choice((near, near, 0, 1, 10**8 + 1, 2**60, 2**63, 2**64 - 1))
    return (wrong % 2**64).to_bytes(8, 'little') + raw[8:]
  if choice == 5:
    start = rng.randrange(len(raw) + 1)
    return raw[:at] + raw[start : start + rng.randint(1, 40)] + raw[at:]
  flipped = bytearray(raw)
  for _ in range(rng.randint(1, 3) if raw else 0):
    # Mostly at the front: that is where the header lies.
    place = min(int(rng.expovariate(1 / 80)), len(raw) - 1)
    flipped[place] ^= 1 << rng.randrange(8)
  return bytes(flipped)


def pack(rng, tree, data: bytes) -> bytes:
  """A file; its header may be padded."""
  text = dump(tree).encode()
  if rng.random() < 0.3:
    text += b' ' * (-len(text) % 8)
  if rng.random() < 0.02:
    text = rng.choice(
      (b' ' + text, text.decode().encode('utf-16'), b'[]', b'1')
    )
  return len(text).to_bytes(8, 'little') + text + data


def valid(rng, names) -> tuple[Pairs, bytes]:
  """The tree and the data of a valid file."""
  tree, data = Pairs(), b''
  for name in names:
    dtype = rng.choice(list(WIDTHS))
    shape = [rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randrange(4))]
    size = math.prod(shape) * WIDTHS[dtype]
    piece = rng.randbytes(size)
    if dtype == 'BOOL' and rng.random() < 0.9:
      piece = bytes(byte & 1 for byte in piece)
    span = [len(data), len(data) + size]
    entry = [['dtype', dtype], ['shape', shape], ['data_offsets', span]]
    tree.append([name, Pairs(entry)])
    data += piece
  if rng.random() < 0.2:
    tree.insert(0, ['__metadata__', Pairs([['format', 'pt']])])
  return tree, data


def case(rng) -> dict[str, bytes]:
  """The files of one folder."""
  names = rng.sample(TENSOR_NAMES, rng.choice((0, 1, 2, 2, 3, 3, 4, 4)))
  if rng.random() < 0.6:
    tree, data = valid(rng, names)
    trees = {rng.choice((shards.SINGLE, 'other.safetensors')): tree}
    parts = {next(iter(trees)): data}
  else:
    trees, parts, weight_map = {}, {}, Pairs()
    split = rng.randint(0, len(names))
    for file, some in zip(FILES, (names[:split], names[split:]), strict=True):
      trees[file], parts[file] = valid(rng, some)
      weight_map += [[name, file] for name in some]
    total = sum(map(len, parts.values()))
    meta = Pairs([['total_size', total]])
    trees[shards.INDEX] = Pairs(
      [['metadata', meta], ['weight_map', weight_map]]
    )
  for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
    rng.choice(CHANGES)(rng, rng.choice(list(trees.values())))
  files = {
    name: dump(tree).encode()
    if name == shards.INDEX
    else pack(rng, tree, parts[name])
    for name, tree in trees.items()
  }
  if rng.random() < 0.35:
    name = rng.choice(list(files))
    files[name] = change_bytes(rng, files[name])
  if rng.random() < 0.05:
    gone = files.pop(rng.choice(list(files)))
    if rng.random() < 0.5:
      files[rng.choice((*FILES, shards.SINGLE, shards.INDEX))] = gone
  return files


def cases(seed: int, count: int) -> Iterator[dict[str, bytes]]:
  """Folders as file -> bytes; the i-th depends on seed and i alone."""
  for i in range(count):
    yield case(random.Random(f'{seed}/{i}'))


def check(files: dict[str, bytes], folder: pathlib.Path) -> bool:
  """Opens and reads one folder; True if it was accepted."""
  for old in folder.iterdir():
    old.unlink()
  for name, raw in files.items():
    (folder / name).write_bytes(raw)
  message = None
  try:
    with shards.Folder(folder) as opened:
      entries = opened.entries
      ours = {name: opened.read(name) for name in entries}
      tails = {
        name: opened.read(name, slice(1, None)).tobytes()
        for name, array in ours.items()
        if array.ndim
      }
  except errors.InputError as error:
    message = str(error)
  if message is not None:
    assert len(message.splitlines()) == 1, message
    assert len(message) < 2000, message
    assert str(folder) in message
    return False
  if shards.INDEX in files:
    read = {entry.path.name for entry in entries.values()}
  else:
    single = shards.SINGLE in files
    read = {shards.SINGLE} if single else set(files)
  theirs = [
    (name, view['dtype'], tuple(view['shape']), bytes(view['data']))
    for file in read
    for name, view in safetensors.deserialize(files[file])
  ]
  assert sorted(theirs) == sorted(
    (name, shards.DTYPE_NAMES[array.dtype], array.shape, array.tobytes())
    for name, array in ours.items()
  )
  assert tails == {name: ours[name][1:].tobytes() for name in tails}
  return True
