"""Bodies of vLLM's endpoints from text to ids and back."""

from typing import Any

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.server import conversation, protocol


def parse_tokenize(
  body: Any, tokenizer: tokenizers.Tokenizer, limits: protocol.Limits
) -> list[int]:
  """Ids of a text, or of a conversation; raises as `parse_completion`."""
  known = {
    'model': str,
    'prompt': str,
    'messages': list,
    'add_special_tokens': bool,
    'add_generation_prompt': bool,
    'tools': list,
    'chat_template_kwargs': dict,
  }
  neutral = {'return_token_strs': (False,), 'continue_final_message': (False,)}
  values = protocol.known_values(body, known, limits, neutral)
  if ('prompt' in values) == ('messages' in values):
    raise errors.InputError('give either prompt or messages')
  chat_only = ('add_generation_prompt', 'tools', 'chat_template_kwargs')
  alone = {'prompt': chat_only, 'messages': ('add_special_tokens',)}
  for name, others in alone.items():
    for other in others:
      if name in values and other in values:
        raise errors.InputError(f'{other} has no meaning with {name}')
  if 'prompt' in values:
    add_bos = values.get('add_special_tokens', True)
    return protocol.encode(tokenizer, values['prompt'], add_bos)
  tools = conversation.parse_tools(
    values, tokenizer, limits.compiler(tokenizer)
  )
  return conversation.render(
    tokenizer,
    conversation.parse_messages(values),
    tools and tools.definitions,
    values.get('add_generation_prompt', True),
    **values.get('chat_template_kwargs', {}),
  ).ids


def parse_detokenize(body: Any, limits: protocol.Limits) -> list[int]:
  """Ids to decode; raises as `parse_completion`."""
  ids = protocol.known_values(
    body, {'model': str, 'tokens': list}, limits, {}
  ).get('tokens', [])
  most = limits.vocab_size - 1
  if not all(type(x) is int and 0 <= x <= most for x in ids):
    raise errors.InputError(f'tokens must be ids from 0 to {most}')
  return ids
