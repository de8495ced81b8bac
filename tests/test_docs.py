"""README and docs name files, functions and headings that exist."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
  'README.md',
  'CONTRIBUTING.md',
  *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / 'docs').rglob('*.md')
  ),
]
_CODE = re.compile(r'`([^`]+)`')
_LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
# A word of code is a path of the repo if it begins or ends like one.
_PATH = re.compile(
  r'(?:benchmarks|docs|dsv3_jax|experiments|launch|pallas_kernels|tests)/'
  r'[\w./-]*|[\w./-]+\.(?:py|md|sh|cfg|toml)'
)
# `file.py`: `name`, `name`
_FUNCTIONS = re.compile(r'`([\w./-]+\.py)`:((?:[,\s]+(?:and )?`\w+`)+)')
_MODULE = re.compile(r'(?:python -m benchmarks\.|dsv3 bench )(\w+)')
# As a script it cannot import `benchmarks.common`.
_SCRIPT = re.compile(
  r'\bpython[\d.]*\s+(?:-\w+\s+)*(?:\./)?(benchmarks/[\w/]+\.py)'
)


def paths(text):
  """The files and folders that a page's code names."""
  blocks = re.findall(r'^    (.*)$', text, re.MULTILINE)
  for code in [*_CODE.findall(text.replace('\n', ' ')), *blocks]:
    for word in re.split(r"[\s='\"]+", code):
      if _PATH.fullmatch(word := word.split(':')[0].rstrip('.,')):
        yield word


def heading_slugs(text):
  """Anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
  for title in re.findall(r'^#+ (.*)$', text, re.MULTILINE):
    yield re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


def defined(path):
  """Top-level functions, classes and constants of a module."""
  for node in ast.parse(path.read_text(encoding='utf-8')).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    elif isinstance(node, ast.Assign):
      yield from (t.id for t in node.targets if isinstance(t, ast.Name))


def problems(page, root=ROOT):
  """What a page names and the repo does not have, as text."""
  at = root / page
  text = at.read_text(encoding='utf-8')
  for path in paths(text):
    if not (root / path).exists():
      yield f'{page}: no file {path}'
  for target in _LINK.findall(text):
    if re.match(r'\w+:', target):
      continue
    name, _, anchor = target.partition('#')
    there = at.parent / name if name else at
    if not there.exists():
      yield f'{page}: no file {target}'
    elif anchor and anchor not in heading_slugs(
      there.read_text(encoding='utf-8')
    ):
      yield f'{page}: no heading {target}'
  for path, names in _FUNCTIONS.findall(text):
    if not (root / path).exists():
      continue  # reported above
    for name in set(_CODE.findall(names)) - set(defined(root / path)):
      yield f'{page}: {path} has no {name}'
  for name in _MODULE.findall(text):
    if name != 'NAME' and not (root / 'benchmarks' / f'{name}.py').exists():
      yield f'{page}: no benchmark {name}'
  for path in _SCRIPT.findall(text):
    yield f'{page}: {path} runs as python -m only'


@pytest.mark.parametrize('page', PAGES)
def test_what_a_page_names_exists(page):
  assert not list(problems(page))


def test_the_paper_map_is_complete():
  """A reader finds each mechanism of the report, with its function."""
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  rows = text.split('## Paper map')[1].split('\n## ')[0]
  assert len(set(paths(rows))) > 35
  assert len(_FUNCTIONS.findall(rows)) > 20
  for topic in (
    'gate', 'bias update', 'eqs. 17-20', 'MTP modules', 'MTP loss', 'YaRN',
    'absorbed', "DualPipe's table", "DualPipe's execution", 'E5M6',
    'promotion', 'node-limited routing', 'batch ramp', 'FIM',
  ):  # fmt: skip
    assert topic in rows, topic


def test_decisions_have_one_form():
  folder = ROOT / 'docs' / 'decisions'
  pages = sorted(folder.glob('*.md'))
  for number, path in enumerate(pages, 1):
    text = path.read_text(encoding='utf-8')
    assert path.name.startswith(f'{number:04d}-')
    assert re.match(rf'# {number}\. \w', text), path.name
    parts = re.findall(r'^## (.*)$', text, re.MULTILINE)
    parts = [part for part in parts if part != 'Alternatives']
    assert parts == ['Context', 'Decision', 'Consequences'], path.name


def test_no_link_is_left_to_an_untracked_file():
  """What the pages link to is committed, not made by a run."""
  listed = subprocess.run(
    ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=False
  )
  if listed.returncode:
    pytest.skip('not a clone')
  tracked = set(listed.stdout.split())
  for page in PAGES:
    text = (ROOT / page).read_text(encoding='utf-8')
    for target in _LINK.findall(text):
      there = (ROOT / page).parent / target.partition('#')[0]
      if re.match(r'\w+:', target) or there.is_dir() or target[0] == '#':
        continue
      name = str(there.resolve().relative_to(ROOT))
      assert name in tracked, f'{page}: {name}'


@pytest.mark.parametrize(
  ('text', 'reported'),
  [
    ('`dsv3_jax/ops/gone.py`', 'no file dsv3_jax/ops/gone.py'),
    ('`gone.py`', 'no file gone.py'),
    ('    pytest tests/gone', 'no file tests/gone'),
    ('`pytest tests/gone\ntests/ops`', 'no file tests/gone'),
    ('`dsv3 train --config=experiments/gone.py:pod`', 'experiments/gone.py'),
    ('[x](gone.md)', 'no file gone.md'),
    ('[x](#gone)', 'no heading #gone'),
    ('`a.py`: `f`, `g`', 'a.py has no g'),
    ('`a.py`:\n`g`', 'a.py has no g'),
    ('`dsv3 bench gone`', 'no benchmark gone'),
    ('    python benchmarks/a.py --x', 'benchmarks/a.py runs as python -m'),
    ('`A=1 python3 -u\nbenchmarks/a.py`', 'benchmarks/a.py runs as python -m'),
  ],
)
def test_each_check_can_fail(tmp_path, text, reported):
  (tmp_path / 'a.py').write_text('def f(): pass\n', encoding='utf-8')
  (tmp_path / 'tests' / 'ops').mkdir(parents=True)
  good = '# A b-c, d\n[x](#a-b-c-d) `a.py`: `f`. `tests/ops/` [y](a.py)\n'
  page = tmp_path / 'page.md'
  page.write_text(good, encoding='utf-8')
  assert not list(problems('page.md', tmp_path))
  page.write_text(good + text + '\n', encoding='utf-8')
  assert [p for p in problems('page.md', tmp_path) if reported in p]
