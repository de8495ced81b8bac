"""One word a thing: names and phrases that the code no longer uses.

docs/glossary.md has the words that it does use, beside the field's.
"""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Globs of folders and files.
SCOPE = (
  'dsv3_jax',
  'pallas_kernels',
  'benchmarks',
  'experiments',
  'launch',
  'tests',
)
EXCEPT = ('tests/test_words.py',)  # has the phrases in its strings
PAGES = ('README.md', 'CONTRIBUTING.md', 'docs')  # for phrases only
CONTENTS = 'a name for what it holds'

# Variables, parameters, attributes, functions, classes and keys of dicts -> the
# word to use.
NAMES = {
  'told': f'{CONTENTS}: metrics, output',
  'made': f'{CONTENTS}: tokens_BT, schedule',
  'found': f'{CONTENTS}: arrays, settings',
  'how': f'{CONTENTS}: options',
  'each': f'{CONTENTS}: per_rank, spec',
  'said': f'{CONTENTS}: message, stdout',
  'twin': 'shares_prompt_with',
  'one_way': 'unidirectional',
  'fixed_order': 'deterministic',
  'own_tokens': 'shard_sequence',
  'whole_rows': 'all_gather_sequence',
  'add_up': 'psum_f32',
  'in_step': 'compile_then_barrier',
  'together': 'propagate_errors',
  'meet': 'barrier',
  'num_drafts': 'num_speculative_tokens',
  'Ranks': 'Scheduler',
  'Ticket': 'Request',
  'News': 'TokenOutput',
  'Told': 'TokenOutput',
  'Made': 'StepOutput',
  'Ask': 'ChatRequest',
  'amount': 'num_microbatches',
  'guard': 'spike_state',
  'mapped': 'shard_map_step',
  'drafts': 'speculative_tokens',
  'alike': 'batch_invariant',
  'further': 'shard_largest_dim',
  'tell': 'broadcast',
  'talk': 'chat',
  'warming': 'warmup',
  'Plan': 'whose plan: AllToAllPlan',
  'Layout': 'ParamLayout, StateLayout',
  'Stage': 'PipelineStage',
  'Run': 'TrainingRun',
  'Cache': 'LatentCache',
  'Session': 'Engine',
  'Steps': 'ModelRunner',
  'Pool': 'BlockPool',
  'Cut': 'ShardedSpec',
}
# Where the old spelling stays, for who wrote it into a script.
ALLOWED = {
  'num_drafts': (
    'dsv3_jax/__init__.py',
    'dsv3_jax/cli/engine_flags.py',
    'dsv3_jax/inference/llm.py',
  ),
  'tell': ('dsv3_jax/inference/llm.py',),
  'guard': (  # checkpoints have this key
    'dsv3_jax/training/step.py',
    'tests/parallel/test_layouts.py',
    'tests/training/test_loop.py',
  ),
}
# In comments and strings, docstrings included.
PHRASES = {
  'in lockstep': 'in ticks',
  'prompt cache': 'prefix cache',
  'copies of busy experts': 'redundant experts',
  'made again': 'recomputed',
  'is told': 'is given, is passed',
  'are told': 'are given, are passed',
  'gives its pages back': 'is preempted',
  'cut over an axis': 'sharded over an axis',
  'whole on every device': 'replicated',
  'kept for the backward pass': 'saved for the backward pass',
}
_PHRASE = re.compile(rf'\b(?:{"|".join(PHRASES)})\b')


def files(root, scope):
  """Python files, shell scripts and pages of `root`; scope: globs."""
  for place in (place for pattern in scope for place in root.glob(pattern)):
    for path in sorted(place.rglob('*')) if place.is_dir() else (place,):
      where = path.relative_to(root).as_posix()
      if path.suffix in ('.md', '.py', '.sh') and where not in EXCEPT:
        yield where, path.read_text('utf-8')


def problems(root, scope=(*SCOPE, *PAGES)):
  """A line for each retired word, with the one to use."""
  for where, text in files(root, scope):
    if where.endswith('.md'):
      named, written = (), paragraphs(text)
    elif where.endswith('.sh'):
      named, written = shell_names(text), shell_comments(text)
    else:
      tree = ast.parse(text)
      named, written = names(tree), [*comments(text), *strings(tree)]
    for line, name in named:
      word = name.strip('_')
      if word in NAMES and where not in ALLOWED.get(word, ()):
        yield f'{where}:{line}: {name} -> {NAMES[word]}'
    for line, prose in written:
      for phrase in set(_PHRASE.findall(' '.join(prose.split()).lower())):
        yield f'{where}:{line}: {phrase!r} -> {PHRASES[phrase]}'


def names(tree):
  """(line, name) of whatever a module gives a name to."""
  for node in ast.walk(tree):
    line = getattr(node, 'lineno', 0)
    match node:
      case ast.Name(id=name, ctx=ast.Store()):
        yield line, name
      case ast.Attribute(attr=name, ctx=ast.Store()):
        yield line, name
      case ast.arg(arg=name):
        yield line, name
      case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
        yield line, node.name
      case ast.ExceptHandler(name=str(name)):
        yield line, name
      case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
        yield line, name
      case ast.Import() | ast.ImportFrom():
        yield from ((line, x.asname) for x in node.names if x.asname)
      case ast.Dict(keys=keys):
        yield from (
          (key.lineno, key.value)
          for key in keys
          if isinstance(key, ast.Constant) and isinstance(key.value, str)
        )
      case ast.Subscript(slice=ast.Constant(value=str(key)), ctx=ast.Store()):
        yield line, key


def comments(text):
  """(first line, text) of each block of comments."""
  start, last, words = 0, -2, []
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type != tokenize.COMMENT:
      continue
    line = token.start[0]
    if line != last + 1 and words:
      yield start, ' '.join(words)
      words = []
    start = start if words else line
    words.append(token.string.lstrip('#'))
    last = line
  if words:
    yield start, ' '.join(words)


def strings(tree):
  """(line, text) of each string; docstrings are strings."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.lineno, node.value


def paragraphs(text):
  """(line, text) of each paragraph of a page."""
  for match in re.finditer(r'(?:.+\n?)+', text):
    yield 1 + text.count('\n', 0, match.start()), match.group()


def shell_names(text):
  """(line, name) of the variables and functions of a shell script."""
  name = re.compile(r'(?<![\w$-])(?:for (\w+) in|(\w+)\+?=|(\w+)\(\) )')
  for line, words in enumerate(text.splitlines(), 1):
    for groups in name.findall(words):
      yield line, ''.join(groups)


def shell_comments(text):
  """(1, text) of all of a shell script."""
  yield 1, re.sub(r'^ *#', '', text, flags=re.MULTILINE)


def test_the_code_uses_no_retired_word():
  retired = list(problems(ROOT))
  assert not retired, '\n' + '\n'.join(retired)


@pytest.mark.parametrize('word', NAMES)
def test_each_name_can_fail(tmp_path, word):
  (tmp_path / 'a.py').write_text(f'{word} = 1\n', encoding='utf-8')
  (line,) = problems(tmp_path, ['a.py'])
  assert line == f'a.py:1: {word} -> {NAMES[word]}'


@pytest.mark.parametrize(
  'text',
  [
    'a, (*told,) = x',
    'def told(): pass',
    'class told: pass',
    'def f(*, told): pass',
    'def f(**told): pass',
    'lambda told: 1',
    'a.told = 1',
    'class A:\n  told: int',
    '[1 for told in x]',
    'with a as told: pass',
    'import a as told',
    'try: pass\nexcept E as told: pass',
    'match a:\n  case [told]: pass',
    '_told = 1',
    'told_ = 1',
    '(told := 1)',
    "x = {'told': 1}",
    "x['told'] = 1",
  ],
)
def test_each_kind_of_name_can_fail(tmp_path, text):
  (tmp_path / 'a.py').write_text(text, encoding='utf-8')
  assert len(list(problems(tmp_path, ['a.py']))) == 1


@pytest.mark.parametrize(
  'text',
  [
    'told=1',
    '  local told=1',
    'trap "told=1; stop" TERM',
    'told+=(1)',
    'for told in a b; do',
    'told() {',
    '# A job that is\n# told to stop.',
    'a=1 # a job that is told to stop',
  ],
)
def test_shell_scripts_can_fail(tmp_path, text):
  (tmp_path / 'a.sh').write_text(text + '\n', encoding='utf-8')
  assert len(list(problems(tmp_path, ['a.sh']))) == 1


@pytest.mark.parametrize('phrase', PHRASES)
def test_each_phrase_can_fail(tmp_path, phrase):
  first, *rest = phrase.split()
  broken = f'{first.capitalize()}\n{{}}{" ".join(rest)} here.'
  for text in (f'"""{broken.format("")}"""', f'# {broken.format("# ")}\n'):
    (tmp_path / 'a.py').write_text(text, encoding='utf-8')
    (line,) = problems(tmp_path, ['a.py'])
    assert line == f'a.py:1: {phrase!r} -> {PHRASES[phrase]}'


@pytest.mark.parametrize('phrase', PHRASES)
def test_pages_can_fail(tmp_path, phrase):
  first, *rest = phrase.split()
  text = f'# A title\n\nIt is\n- {first}\n  {" ".join(rest)} here\n'
  (tmp_path / 'a.md').write_text(text, encoding='utf-8')
  (line,) = problems(tmp_path, ['a.md'])
  assert line == f'a.md:3: {phrase!r} -> {PHRASES[phrase]}'


def test_what_is_no_retired_word_passes(tmp_path):
  text = '# Each of them was found and told.\nf(each=a.told)\nfounder = 1\n'
  (tmp_path / 'a.py').write_text(text, encoding='utf-8')
  assert not list(problems(tmp_path, ['a.py']))


def test_an_old_flag_keeps_its_spelling(tmp_path):
  path = tmp_path / 'dsv3_jax/__init__.py'
  path.parent.mkdir()
  path.write_text('def load(num_drafts=None): pass\n', encoding='utf-8')
  assert not list(problems(tmp_path, ['dsv3_jax']))
  path.rename(path.with_name('a.py'))
  assert len(list(problems(tmp_path, ['dsv3_jax']))) == 1
