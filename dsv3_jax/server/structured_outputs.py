"""Fields of a body that constrain an answer to a grammar.

`response_format` is OpenAI's; `structured_outputs` and `guided_...` are vLLM's.
"""

import json
from collections.abc import Mapping
from typing import Any

from dsv3_jax import errors
from dsv3_jax.inference import grammar
from dsv3_jax.server import fields

TYPES = {
  'response_format': dict,
  'structured_outputs': dict,
  'guided_json': (dict, str),
  'guided_regex': str,
  'guided_choice': list,
}
# Refused by name; of those that vLLM has.
NEUTRAL = {
  'guided_decoding_backend': (),
  'guided_grammar': (),
  'guided_whitespace_pattern': (),
  'response_format': ({'type': 'text'},),
  'structural_tag': (),
}
_NEUTRAL_OPTIONS = {
  'grammar': (),
  'structural_tag': (),
  'whitespace_pattern': (),
  'json_object': (False,),
  'disable_any_whitespace': (False,),
  'disable_additional_properties': (False,),
  'disable_fallback': (False, True),
}


def parse(
  values: Mapping[str, Any], compiler: grammar.Compiler
) -> grammar.Grammar | None:
  """The grammar that an answer must follow; None: any answer.

  Raises:
    InputError: names the field and the rule.
  """
  given = [name for name in TYPES if name in values]
  if not given:
    return None
  if len(given) > 1:
    raise errors.InputError(f'give one of: {", ".join(given)}')
  (name,) = given
  value = values[name]
  if name == 'response_format':
    return _response_format(value, compiler)
  if name == 'structured_outputs':
    return _structured_outputs(value, compiler)
  return _constraint(name.removeprefix('guided_'), value, name, compiler)


def _response_format(
  value: dict[str, Any], compiler: grammar.Compiler
) -> grammar.Grammar:
  kind = value.get('type')
  if kind == 'json_object':
    fields.effective('response_format.', value, ('type',), {})
    return compiler.json_schema({'type': 'object'}, 'response_format')
  if kind != 'json_schema':
    raise errors.InputError(
      f'response_format.type={fields.short(kind)} must be text, json_object or '
      'json_schema'
    )
  fields.effective('response_format.', value, ('type', 'json_schema'), {})
  where = 'response_format.json_schema'
  body = value.get('json_schema')
  if not isinstance(body, dict):
    raise errors.InputError(f'{where} must be an object')
  types = {'name': str, 'description': str, 'schema': dict, 'strict': bool}
  body = fields.effective(f'{where}.', body, types, {})
  fields.check_types(body, types, f'{where}.')
  if 'schema' not in body:
    raise errors.InputError(f'{where}.schema must be an object')
  return compiler.json_schema(body['schema'], f'{where}.schema')


def _structured_outputs(
  value: dict[str, Any], compiler: grammar.Compiler
) -> grammar.Grammar:
  known = ('json', 'regex', 'choice', 'json_object')
  options = fields.effective(
    'structured_outputs.', value, known, _NEUTRAL_OPTIONS
  )
  if len(options) != 1:
    raise errors.InputError(
      f'structured_outputs must have one of: {", ".join(known)}'
    )
  ((name, inner),) = options.items()
  return _constraint(name, inner, f'structured_outputs.{name}', compiler)


def _constraint(
  kind: str, value: Any, where: str, compiler: grammar.Compiler
) -> grammar.Grammar:
  """One of vLLM's kinds of constraint."""
  if kind == 'json_object' and value is True:
    return compiler.json_schema({'type': 'object'}, where)
  if kind == 'json':
    if isinstance(value, str):
      try:
        value = json.loads(value)
      except (ValueError, RecursionError) as error:
        raise errors.InputError(f'{where} must be JSON') from error
    if isinstance(value, dict):
      return compiler.json_schema(value, where)
  if kind == 'regex' and isinstance(value, str):
    return compiler.regex(value, where)
  if kind == 'choice' and isinstance(value, list):
    if value and all(isinstance(text, str) and text for text in value):
      return compiler.choice(value, where)
    raise errors.InputError(f'{where} must be a list of texts, none empty')
  raise errors.InputError(f'{where}={fields.short(value)} has the wrong type')
