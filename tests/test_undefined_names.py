"""Every global name that a module's code reads is defined there.

ruff's F821 would tell, but takes the dims of jaxtyping's strings for names.
"""

import builtins
import collections
import dis
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ('dsv3_jax', 'experiments', 'pallas_kernels', 'benchmarks', 'tests')
_GIVEN = {*dir(builtins), '__file__', '__annotations__', '__path__'}


def code_objects(code):
  """This one and all that are nested in it."""
  yield code
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      yield from code_objects(constant)


def undefined_names(text):
  """(line, name) of each global that is read and never assigned."""
  module = compile(text, 'module', 'exec')
  known, reads = set(_GIVEN), []
  for code in code_objects(module):
    seen = collections.defaultdict(set)
    for instruction in dis.get_instructions(code):
      if '_GLOBAL' in instruction.opname or '_NAME' in instruction.opname:
        seen[instruction.opname].add(instruction.argval)
    known |= seen['STORE_GLOBAL']
    if code is module:
      known |= seen['STORE_NAME']
    # A module and a class body read with LOAD_NAME, also what is their own.
    read = seen['LOAD_GLOBAL'] | seen['LOAD_NAME'] - seen['STORE_NAME']
    reads += [(code.co_firstlineno, name) for name in sorted(read)]
  return [(line, name) for line, name in reads if name not in known]


def test_every_name_is_defined():
  paths = [path for top in FOLDERS for path in (ROOT / top).rglob('*.py')]
  assert len(paths) > 200
  undefined = [
    f'{path.relative_to(ROOT)}:{line} reads {name}'
    for path in paths
    for line, name in undefined_names(path.read_text(encoding='utf-8'))
  ]
  assert not undefined


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('def f():\n  return jnp.zeros(3)\n', ['jnp']),
    ('class C:\n  def f(self):\n    return lambda: np\n', ['np']),
    ('class C:\n  x = missing\n', ['missing']),
    ('x = [missing for _ in range(3)]\n', ['missing']),
    ("def f(x: 'Float[Array, \"B T\"]'):\n  return x\n", []),
    ('import a.b\nfrom c import d as e\n\ndef f(x):\n  return a, e, x\n', []),
    ('class C:\n  x = 1\n  y = x\n\nglobal_ = C\n', []),
    ('def f():\n  global x\n  x = 1\n\n\ndef g():\n  return x\n', []),
    ('try:\n  import a\nexcept ImportError as error:\n  a = error\n', []),
  ],
)  # fmt: skip
def test_each_kind_of_name(text, expected):
  assert [name for _, name in undefined_names(text)] == expected
