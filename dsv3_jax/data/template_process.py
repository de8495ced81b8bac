"""Renders chat templates for another process, by the rules of transformers.

A template is a program of an unknown author. Jinja's sandbox keeps it from
Python's internals. This process bounds what the sandbox does not: time, memory
and the length of the text. Run as a script, it answers each line of JSON:

  {"template": text, "variables": {...}}   without variables: checks its syntax
  {"text": ...}, or {"error": one line}

Jinja's environment is that of transformers 5.23: blocks are trimmed, loops
have `break` and `continue`, `tojson` keeps characters as they are, and there
are `raise_exception`, `strftime_now` and blocks of `generation`.
"""

import contextlib
import datetime
import functools
import json
import resource
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox, utils

CPU_SECONDS = 5  # of a template
MEMORY = 1 << 30  # bytes of the process
CHARACTERS = 1 << 24  # of the text
# What a template can raise; anything else ends the process.
_FAULTS = (
  *(jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError),
  *(LookupError, RuntimeError, StopIteration, TypeError, ValueError),
)


class _Refused(Exception):
  """What a template says when it calls `raise_exception`."""


class _Generation(ext.Extension):
  """{% generation %} marks the tokens of answers; here it says nothing."""

  tags = {'generation'}

  def parse(self, parser: parser.Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


class _Dict:
  """`dict` without the attributes of a class."""

  def __call__(self, *args: Any, **values: Any) -> dict:
    return dict(*args, **values)

  def fromkeys(self, *args: Any) -> dict:
    return dict.fromkeys(*args)


class _Namespace(utils.Namespace):
  """`namespace` without names that begin with an underscore."""

  def __init__(*args: Any, **values: Any):
    for name in dict(*args[1:], **values):
      _check_name(name)
    utils.Namespace.__init__(*args, **values)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith('_'):
    raise sandbox.SecurityError(f'{name!r} is no name for a namespace')


def _raise_exception(message: Any) -> None:
  raise _Refused(str(message))


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
  )
  environment.filters['tojson'] = _to_json
  environment.globals |= {
    'raise_exception': _raise_exception,
    'strftime_now': lambda form: datetime.datetime.now().strftime(form),
    'dict': _Dict(),
    'namespace': _Namespace,
  }
  return environment.from_string(source)


def render(source: str, variables: dict[str, Any]) -> str:
  """The text of a template.

  Raises:
    Exception: one of `_FAULTS`, or the text is too long.
  """
  pieces, size = [], 0
  for piece in _compiled(source).generate(**variables):
    pieces.append(piece)
    size += len(piece)
    if size > CHARACTERS:
      raise _Refused(f'more than {CHARACTERS} characters are made')
  return ''.join(pieces)


def answer(request: dict[str, Any]) -> dict[str, str]:
  """What the process answers to a request."""
  try:
    if 'variables' not in request:
      _compiled(request['template'])
      return {'text': ''}
    return {'text': render(request['template'], request['variables'])}
  except _Refused as error:
    return {'error': str(error)}
  except jinja2.TemplateSyntaxError as error:
    return {'error': f'line {error.lineno}: {error.message}'}
  except (MemoryError, RecursionError) as error:
    return {'error': f'it needs too much memory ({type(error).__name__})'}
  except _FAULTS as error:
    return {'error': f'{type(error).__name__}: {error}'}


def _limit(kind: int, most: int) -> None:
  hard = resource.getrlimit(kind)[1]
  most = most if hard == resource.RLIM_INFINITY else min(most, hard)
  with contextlib.suppress(ValueError):  # macOS has some of these only
    resource.setrlimit(kind, (most, hard))


def main(seconds: int) -> None:
  """Answers until the other process closes the pipe.

  Args:
    seconds: that a template may compute; the system then ends this process.
  """
  _limit(resource.RLIMIT_CORE, 0)
  _limit(resource.RLIMIT_AS, MEMORY)
  for line in sys.stdin.buffer:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime)
    _limit(resource.RLIMIT_CPU, spent + 1 + seconds)
    reply = json.dumps(answer(json.loads(line)))
    sys.stdout.buffer.write(reply.encode() + b'\n')
    sys.stdout.buffer.flush()


if __name__ == '__main__':
  main(int(sys.argv[1]))
