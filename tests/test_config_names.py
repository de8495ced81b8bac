"""Messages, tables and pages name only settings that exist."""

import ast
import pathlib
import re

import pytest

from dsv3_jax import config
from experiments import base

REPO = pathlib.Path(__file__).resolve().parents[1]
ROOT = REPO / 'dsv3_jax'
PAGES = ('README.md', 'CONTRIBUTING.md', 'docs/**/*.md')
SETTINGS = base.get_config().to_dict()
GROUPS = [name for name, value in SETTINGS.items() if isinstance(value, dict)]
# A setting or a group of them, whole: not after a dot, nor before a blank that
# a value fills in.
_NAME = rf'(?<![\w./\0])(?:{"|".join(GROUPS)})(?:\.[a-z0-9_]+)+\b(?!\.?\0)'


def groups(settings):
  """Names of groups at any depth: `moe` is one of `model`."""
  for name, value in settings.items():
    if isinstance(value, dict):
      yield name
      yield from groups(value)


# In a page a group without those above it counts as a name too, a wrong one.
_NAME_IN_PAGE = re.compile(
  rf'(?<![\w./-])(?:config\.|--config\.)?((?:{"|".join(groups(SETTINGS))})'
  r'(?:\.[a-z0-9_]+)+)'
)


def names_in_page(text):
  """Settings in the code font of a page; files are none."""
  for code in re.findall(r'`([^`]+)`', text.replace('\n', ' ')):
    for name in _NAME_IN_PAGE.findall(code):
      if not re.search(r'\.(?:py|md|json|jsonl|png|txt)$', name):
        yield name


def texts(tree):
  """Strings that are no docstring; what is formatted into them is \\0."""
  inside = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      inside |= {id(x) for part in node.values for x in ast.walk(part)}
    elif isinstance(node, ast.Expr):
      inside.add(id(node.value))
  for node in ast.walk(tree):
    if id(node) in inside:
      continue
    if isinstance(node, ast.JoinedStr):
      parts = (getattr(part, 'value', None) for part in node.values)
      yield ''.join(x if isinstance(x, str) else '\0' for x in parts)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value


def names(text, behind=''):
  """Settings that the strings of some source name."""
  return [
    name
    for message in texts(ast.parse(text))
    for name in re.findall(_NAME + behind, message)
  ]


def test_rules_name_settings_that_exist():
  mentioned = names((ROOT / 'config_rules.py').read_text('utf-8'))
  assert len(mentioned) > 100
  for name in mentioned:
    config.check_path(SETTINGS, name)


def test_every_message_names_settings_that_exist():
  mentioned = {
    name
    for path in ROOT.rglob('*.py')
    for name in names(path.read_text('utf-8'), behind='(?==)')
  }
  assert len(mentioned) > 30
  for name in mentioned:
    config.check_path(SETTINGS, name)


def test_pages_name_settings_that_exist():
  mentioned = {
    name
    for pattern in PAGES
    for path in REPO.glob(pattern)
    for name in names_in_page(path.read_text('utf-8'))
  }
  assert len(mentioned) > 15
  for name in mentioned:
    config.check_path(SETTINGS, name)


def test_what_counts_as_a_name_in_a_page():
  text = 'model.x `moe.top_k` `config.parallel.pipe=2` `data.py` `a/rope.x`'
  text += ' `--config.train.seed=1` `eval.batch_size\nx`'
  assert list(names_in_page(text)) == [
    'moe.top_k',
    'parallel.pipe',
    'train.seed',
    'eval.batch_size',
  ]
  with pytest.raises(ValueError, match=r'moe is unknown|moe\.top_k is unknown'):
    config.check_path(SETTINGS, 'moe.top_k')


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ("x = f'moe.top_k={x}'", []),  # no group of that name
    ("x = f'model.moe.top_k={x} must be > {y}'", ['model.moe.top_k']),
    (
      "x = 'a' f' train.seed=' '1, parallel.pipe'",
      ['train.seed', 'parallel.pipe'],
    ),
    ("x = f'parallel.{axis}=1'", []),
    ("x = f'{prefix}model.dim=1'", []),
    ("def f():\n  'Of train.seed.'", []),
  ],
)
def test_what_counts_as_a_name(text, expected):
  assert names(text) == expected


def test_a_wrong_name_is_refused():
  with pytest.raises(ValueError, match=r'model\.top_k is unknown'):
    config.check_path(SETTINGS, *names("x = f'model.top_k={x}'"))
