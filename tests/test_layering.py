"""The map of the tree as a test: who may import whom, how long files are."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Layer of each room: a folder, or a module that stands alone. A module that is
# not here fails. A room imports lower layers only, and no room of its own.
LAYERS = {
  'pallas_kernels': 0,
  'dsv3_jax.errors': 0,
  'dsv3_jax.config': 3,
  'dsv3_jax.config_files': 1,
  'dsv3_jax.config_rules': 2,
  'dsv3_jax.precision': 1,
  'dsv3_jax.distributed': 4,
  'dsv3_jax.ops': 5,
  'dsv3_jax.nn': 6,
  'dsv3_jax.data': 4,
  'dsv3_jax.planning': 4,
  'dsv3_jax.checkpoint': 7,
  'dsv3_jax.parallel.schedules': 1,
  'dsv3_jax.parallel.pipeline': 7,
  'dsv3_jax.parallel': 8,
  'dsv3_jax.inference': 8,
  'dsv3_jax.training': 9,
  'dsv3_jax.server': 9,
  'experiments': 0,
  'dsv3_jax': 10,  # `load`
  'dsv3_jax.cli': 11,
}
# Third parties that only some may import.
ONLY = {
  'flax': ('dsv3_jax.nn',),
  'ml_collections': (
    'experiments',
    'dsv3_jax.cli',
  ),
}
NEVER = {
  'experiments': ('jax', 'flax', 'numpy'),
  'pallas_kernels': ('flax',),
  'dsv3_jax.parallel.schedules': ('jax', 'flax'),
}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
SOURCE = ('dsv3_jax', 'experiments', 'pallas_kernels')
# In no layer, but without private names of other modules.
USERS = ('benchmarks', 'tests')


def modules(root, tops=SOURCE):
  """Dotted name -> path of every module of the source."""
  paths = {}
  for top in tops:
    for path in sorted((root / top).rglob('*.py')):
      parts = path.relative_to(root).with_suffix('').parts
      name = '.'.join(p for p in parts if p != '__init__')
      paths[name] = path
  return paths


def imports(tree, known):
  """Dotted names that a module imports, also inside functions."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'relative import'
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in known else node.module


def unit(name):
  """The longest prefix of a module's name that has a layer."""
  parts = name.split('.')
  for size in range(len(parts), 0, -1):
    if (prefix := '.'.join(parts[:size])) in LAYERS:
      if prefix == 'dsv3_jax' and size < len(parts):
        break  # an unknown module of the package
      return prefix
  return None


def problems(root):
  """Every rule that the source below `root` breaks, as text."""
  known = modules(root)
  graph = {}
  for name, path in known.items():
    text = path.read_text(encoding='utf-8')
    tree = ast.parse(text)
    if (home := unit(name)) is None:
      yield f'{name} is in no layer'
      continue
    graph[name] = set()
    for other in imports(tree, known):
      top = other.split('.')[0]
      if top in ONLY and not any(home == h for h in ONLY[top]):
        yield f'{name} imports {top}'
      if top in (*NEVER.get(home, ()), *NEVER.get(home.split('.')[0], ())):
        yield f'{name} imports {top}'
      if other not in known:
        continue
      graph[name].add(other)
      there = unit(other)
      if there is None or (there != home and LAYERS[there] >= LAYERS[home]):
        yield f'{name} imports {other}, which is not below it'
    yield from private(name, tree, known)
  yield from circles(graph)
  for name, path in modules(root, (*SOURCE, 'benchmarks', 'tests')).items():
    yield from too_long(name, path.read_text(encoding='utf-8'))
  known = modules(root, (*SOURCE, *USERS))
  for name, path in modules(root, USERS).items():
    tree = ast.parse(path.read_text(encoding='utf-8'))
    yield from private(name, tree, known)


def private(name, tree, known):
  """Names with an underscore that are used from another module."""
  modules = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        if full in known:
          modules[alias.asname or alias.name] = full
        elif node.module in known and alias.name.startswith('_'):
          yield f'{name} imports private {full}'
  for node in ast.walk(tree):
    match node:
      case ast.Attribute(ast.Name(module), used):
        pass
      case ast.Call(args=[ast.Name(module), ast.Constant(str(used)), *_]):
        pass  # setattr, getattr, patch.object
      case _:
        continue
    there = modules.get(module)
    if there and used.startswith('_') and not used.endswith('__'):
      yield f'{name} uses private {there}.{used}'


def too_long(name, text):
  """A file or a function with too many lines."""
  if (lines := text.count('\n')) > MOST_LINES:
    yield f'{name} has {lines} lines'
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      size = node.end_lineno - node.lineno + 1
      if size > MOST_FUNCTION_LINES:
        yield f'{name}.{node.name} has {size} lines'


def circles(graph):
  """Modules that reach themselves."""
  for start in graph:
    seen, todo = set(), list(graph[start])
    while todo:
      name = todo.pop()
      if name in seen or name not in graph:
        continue
      seen.add(name)
      todo += graph[name]
    if start in seen:
      yield f'{start} imports itself in a circle'


def test_the_source_keeps_the_map():
  assert len(modules(ROOT)) > 30
  assert not list(problems(ROOT))


@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    ({'dsv3_jax/ops/a.py': 'from dsv3_jax.nn import b', 'dsv3_jax/nn/b.py': ''},
     'not below it'),
    ({'dsv3_jax/ops/a.py': 'def f():\n  import dsv3_jax.nn.b\n',
      'dsv3_jax/nn/b.py': ''}, 'not below it'),
    ({'dsv3_jax/ops/a.py': 'import flax.linen'}, 'imports flax'),
    ({'dsv3_jax/ops/a.py': 'import ml_collections'}, 'ml_collections'),
    ({'experiments/a.py': 'import jax.numpy'}, 'imports jax'),
    ({'pallas_kernels/a.py': 'from dsv3_jax import config',
      'dsv3_jax/config.py': ''}, 'not below it'),
    ({'dsv3_jax/ops/a.py': 'from dsv3_jax.ops import b',
      'dsv3_jax/ops/b.py': 'from dsv3_jax.ops import a'}, 'circle'),
    ({'dsv3_jax/ops/a.py': 'from dsv3_jax.ops import b\nb._x',
      'dsv3_jax/ops/b.py': ''}, 'uses private'),
    ({'dsv3_jax/ops/a.py': 'from dsv3_jax.ops.b import _x',
      'dsv3_jax/ops/b.py': ''}, 'imports private'),
    ({'tests/benchmarks/a.py': 'from benchmarks import b\nb._x',
      'benchmarks/b.py': ''}, 'uses private'),
    ({'tests/ops/a.py': "from benchmarks import b\nset(b, '_x', 1)",
      'benchmarks/b.py': ''}, 'uses private'),
    ({'benchmarks/a.py': 'from dsv3_jax.ops import b\nb._x',
      'dsv3_jax/ops/b.py': ''}, 'uses private'),
    ({'dsv3_jax/parallel/schedules/a.py': 'import jax'}, 'imports jax'),
    ({'dsv3_jax/helpers.py': ''}, 'no layer'),
    ({'dsv3_jax/ops/a.py': 'x = 1\n' * 401}, '401 lines'),
    ({'tests/ops/a.py': 'x = 1\n' * 401}, '401 lines'),
    ({'dsv3_jax/ops/a.py': 'def f():\n' + '  x = 1\n' * 60}, 'f has 61'),
    ({'tests/a.py': 'async def f():\n' + '  x = 1\n' * 60}, 'f has 61'),
  ],
)  # fmt: skip
def test_each_rule_can_fail(tmp_path, files, expected):
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
  assert [p for p in problems(tmp_path) if expected in p]
