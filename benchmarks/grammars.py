"""What does it cost to keep an answer to a schema?

Question: how long do llguidance and xgrammar take to compile a schema, and to
compute which tokens may come next?

  python -m benchmarks.grammars TOKENIZER [--json]

TOKENIZER is a `tokenizer.json`, plain or gzipped, of DeepSeek-V3's 128,815
entries, say. xgrammar is measured if it is installed. Each mask is computed
behind the tokens of a text that the schema describes, which must be allowed.
Times are of the CPU, all threads together: others may share the machine.
"""

import importlib.util
import json
import pathlib
import sys
import time

import numpy as np

from benchmarks.common import report
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import grammar

_VALUES = ('some text here', 3.25, ['abc', 'defgh'], '2026-11-30T20:00:00Z')
_TYPES = (
  {'type': 'string'},
  {'type': 'number'},
  {'type': 'array', 'items': {'type': 'string', 'pattern': '^[a-z]{1,20}$'}},
  {'type': 'string', 'format': 'date-time'},
)


def main(argv: list[str] | None = None) -> int:
  parser = report.parser('grammars', __doc__)
  parser.add_argument('tokenizer', type=pathlib.Path)
  parser.add_argument('--rounds', type=int, default=5, help='compiles, texts')
  args = parser.parse_args(argv)
  tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)
  vocab_size = -(-tokenizer.vocab_size // 128) * 128
  libraries = [_llguidance]
  if importlib.util.find_spec('xgrammar'):
    libraries.append(_xgrammar)
  rows = report.Rows(args)
  for library in libraries:
    compile_schema = library(tokenizer, vocab_size)
    for name, schema, value in _cases():
      text = json.dumps(value)
      ids = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
      measured = _measure(compile_schema, schema, ids, args.rounds)
      rows.append({'library': library.__name__[1:], 'schema': name} | measured)
  about = f'{vocab_size} ids; best of {args.rounds} compiles.'
  report.publish('grammars', about, rows, args)
  return 0


def _cases():
  """Name, schema and a value of it."""
  fields = {f'field_{i}': _TYPES[i % 4] for i in range(12)}
  part = _object(fields)
  names = [f'part_{i}' for i in range(10)]
  inner = {f'field_{i}': _VALUES[i % 4] for i in range(12)}
  yield 'any object', {'type': 'object'}, inner
  small = {f'field_{i}': _TYPES[i] for i in range(4)}
  yield '4 properties', _object(small), dict(list(inner.items())[:4])
  nested = _object(dict.fromkeys(names, part))
  yield '10 objects of 12 properties', nested, dict.fromkeys(names, inner)


def _object(properties: dict) -> dict:
  required = list(properties)
  return {
    'type': 'object',
    'properties': properties,
    'required': required,
    'additionalProperties': False,
  }


def _measure(compile_schema, schema, ids, rounds) -> report.Row:
  compiles, masks = [], []
  for _ in range(rounds):
    start = time.process_time()
    make_mask = compile_schema(schema)
    compiles.append(time.process_time() - start)
    mask = make_mask()
    for i in range(len(ids)):
      start = time.process_time()
      bits_v = mask(ids[:i])
      masks.append(time.process_time() - start)
      assert bits_v[ids[i] // 32] >> (ids[i] % 32) & 1, i
  milliseconds = 1e3 * np.array(masks)
  return {
    'compile_ms': 1e3 * min(compiles),
    'mask_mean_ms': float(milliseconds.mean()),
    'mask_p99_ms': float(np.percentile(milliseconds, 99)),
    'masks': len(masks),
  }


def _llguidance(tokenizer, vocab_size):
  compiler = grammar.Compiler(tokenizer, vocab_size)
  compiler.load()
  return lambda schema: _matchers(compiler.json_schema(schema, 'schema'))


def _matchers(compiled: grammar.Grammar):
  return lambda: compiled.matcher().allowed


def _xgrammar(tokenizer, vocab_size):
  import xgrammar

  info = xgrammar.TokenizerInfo(
    [tokenizer.token_bytes(i) for i in range(vocab_size)],
    vocab_type=xgrammar.VocabType.RAW,
    vocab_size=vocab_size,
    stop_token_ids=[tokenizer.eos_id],
  )
  compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
  bits_1v = xgrammar.allocate_token_bitmask(1, vocab_size)

  def compile_schema(schema):
    compiled = compiler.compile_json_schema(json.dumps(schema))

    def make_mask():
      matcher = xgrammar.GrammarMatcher(compiled)

      def mask(ids):
        if ids:
          assert matcher.accept_token(ids[-1])
        matcher.fill_next_token_bitmask(bits_1v)
        return bits_1v[0].numpy().view(np.uint32)

      return mask

    return make_mask

  return compile_schema


if __name__ == '__main__':
  sys.exit(main())
