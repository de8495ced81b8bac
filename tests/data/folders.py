"""Folders of a tokenizer as Hugging Face has them, with templates of our own.

The templates have what published ones have: namespaces, loops with `break` and
`continue`, macros, calls of tools, thoughts, and what they refuse.
"""

import functools
import json

import tokenizers as hf_tokenizers
from tokenizers import (
  decoders,
  models,
  pre_tokenizers,
  processors,
  trainers,
)

from dsv3_jax.data import chat, tokenizer, tokenizer_files

TEXT = (
  'def add(a, b):\n  return a + b\n\n\nprint(add(1, 2));\n'
  'The weather in Paris: sunny, 22 degrees. Think, then answer.\n'
) * 40
THINK, END_THINK = '<think>', '</think>'
# As a reasoning model has it: thoughts of earlier answers are cut off, and the
# prompt opens the next.
REASONING = (
  """
{%- if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}
{% endif %}
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages %}
  {%- if message['role'] == 'system' %}
    {%- set ns.system = ns.system + ('' if ns.first else '\n\n') -%}
    {%- set ns.system = ns.system + message['content'] -%}
    {%- set ns.first = false -%}
  {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = message['content'] | default('', true) -%}
    {%- if '</think>' in content -%}
      {%- set content = content.split('</think>')[-1] | trim -%}
    {%- endif -%}
    {{- 'ASSISTANT' + content -}}
    {%- for call in message['tool_calls'] or [] -%}
      {{- ('CALLS' if loop.first else '\n') + call['function']['name'] -}}
      {{- '\n```json\n' + call['function']['arguments'] + '\n```' -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif message['role'] == 'tool' -%}
    {{- 'OUTPUT' ~ message['content'] -}}
  {%- elif message['role'] != 'system' -%}
    {{- raise_exception('No role ' + message['role'] + ' here.') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'ASSISTANT<think>\n' -}}
{%- endif -%}
""".replace('USER', chat.USER)
  .replace('ASSISTANT', chat.ASSISTANT)
  .replace('CALLS', chat.CALLS_BEGIN)
  .replace('OUTPUT', chat.OUTPUT_BEGIN)
)
# As a model with tools and a switch for thoughts has it.
TOOLS = """
{%- macro spelled(tool) -%}
  {{ tool.function.name }}{% if tool.function.parameters %}: {{
    tool.function.parameters | tojson(indent=2) }}{% endif %}
{%- endmacro -%}
{{ bos_token }}
{% if tools %}
  Tools ({{ tools | length }}):
  {% for tool in tools %}
  {% if tool.type != 'function' %}{% continue %}{% endif %}
- {{ spelled(tool) }}
  {% endfor %}
{% endif %}
{% for message in messages %}
{% if loop.index0 > 8 %}{% break %}{% endif %}
[{{ message.role | upper }}]
{% if message.content is string %}
{{ message.content }}
{% else %}
{% for part in message.content or [] %}{{ part.text }}{% endfor %}

{% endif %}
{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{% for call in message.tool_calls or [] %}
{% generation %}{{ call | tojson }}{% endgeneration %}

{% endfor %}
{% endfor %}
{% if add_generation_prompt %}
[ASSISTANT]{{ strftime_now('%Y') | length }}
{%- if enable_thinking is defined and enable_thinking is false %}

<think></think>
{%- endif %}
{% endif %}"""
TURNS = [
  {'role': 'system', 'content': 'Be kind. f\u00fcr <dich> & "mich"'},
  {'role': 'user', 'content': 'Hi! \u4f60\u597d'},
  {'role': 'assistant', 'content': '<think>add(1, 2)</think> print 3'},
  {'role': 'user', 'content': 'The weather?'},
  {
    'role': 'assistant',
    'content': None,
    'reasoning': 'Paris, then.',
    'tool_calls': [
      {
        'type': 'function',
        'function': {'name': 'weather', 'arguments': '{"at": "Paris"}'},
      }
    ],
  },
  {'role': 'tool', 'content': 'sunny', 'name': 'weather'},
  {'role': 'user', 'content': 'Thanks'},
]
FUNCTIONS = [
  {
    'type': 'function',
    'function': {
      'name': 'weather',
      'parameters': {
        'type': 'object',
        'properties': {'at': {'type': 'string', 'description': 'f\u00fcr <'}},
      },
    },
  },
  {'type': 'other', 'function': {'name': 'none'}},
]


@functools.cache
def thinking_text():
  """JSON of a tokenizer with think tags and tokens of tools."""
  spec = json.loads(tokenizer.train([TEXT], 300, tools=True).text)
  for i, tag in enumerate((THINK, END_THINK)):
    entry = dict(spec['added_tokens'][0])
    entry |= {'id': 300 + i, 'content': tag, 'special': False}
    spec['added_tokens'].append(entry)
  return json.dumps(spec)


@functools.cache
def plain_text():
  """JSON of a byte-level BPE with other special tokens than DeepSeek's."""
  bpe = hf_tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=['<s>', '</s>', '<end>'],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator([TEXT], trainer)
  return bpe.to_str()


def with_processor(text, kind, bos):
  """The same tokenizer, with bos in its own file, or as it is published."""
  full = hf_tokenizers.Tokenizer.from_str(text)
  full.post_processor = processors.ByteLevel(trim_offsets=False)
  if kind == 'bos':
    full.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A',
      pair=f'{bos} $A $B:1',
      special_tokens=[(bos, full.token_to_id(bos))],
    )
  return full.to_str()


def config(**changes):
  """A `tokenizer_config.json` of DeepSeek's tokens."""
  body = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': tokenizer_files.BOS,
    'eos_token': {'__type': 'AddedToken', 'content': chat.EOS},
    'pad_token': chat.EOS,
    'add_bos_token': True,
  } | changes
  return {name: value for name, value in body.items() if value is not None}


def write(folder, text, body=None, **files):
  """A folder of `tokenizer.json`, `tokenizer_config.json` and other files."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
  if body is not None:
    dumped = json.dumps(body)
    (folder / 'tokenizer_config.json').write_text(dumped, encoding='utf-8')
  for name, content in files.items():
    path = folder / name.replace('__', '/').replace('_jinja', '.jinja')
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding='utf-8')
  return folder


def load(folder):
  """Our tokenizer of a folder."""
  settings = tokenizer_files.read(folder)
  return tokenizer.Tokenizer.from_file(folder / 'tokenizer.json', settings)


def load_theirs(folder):
  import transformers  # slow, so not by those who only collect tests

  return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
