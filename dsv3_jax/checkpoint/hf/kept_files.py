"""Files of a Hugging Face folder that a workdir keeps and an export writes.

They say how the model reads and writes text. None changes a weight.
"""

import json
import pathlib
from collections.abc import Mapping

import tokenizers as hf_tokenizers
from tokenizers import processors

from dsv3_jax.checkpoint.hf import generation_config
from dsv3_jax.checkpoint.safetensors import reader as shards
from dsv3_jax.data import chat, tokenizer_files
from dsv3_jax.data import tokenizer as tokenizers

TOKENIZER = 'tokenizer.json'
NAMES = (
  TOKENIZER,
  tokenizer_files.CONFIG,
  tokenizer_files.SPECIAL_MAP,
  'added_tokens.json',
  tokenizer_files.TEMPLATE,
  generation_config.NAME,
)
_NAME_TOKENS = {tokenizer_files.CONFIG, tokenizer_files.SPECIAL_MAP}


def read(directory: pathlib.Path) -> dict[str, bytes]:
  """Path below the folder -> content, of the files that are there.

  A Hugging Face folder without a `generation_config.json` has one with the
  token ids of its `config.json`, as transformers makes it.

  Raises:
    InputError: one of them cannot be read.
  """
  paths = [directory / name for name in NAMES]
  paths += sorted(directory.glob(f'{tokenizer_files.TEMPLATES}/*.jinja'))
  files = {
    path.relative_to(directory).as_posix(): shards.read_bytes(path)
    for path in paths
    if path.exists()
  }
  if generation_config.NAME not in files:
    settings = tokenizer_files.read_object(directory / 'config.json')
    if 'model_type' in settings:
      files |= generation_config.from_config(settings)
  return files


def write(directory: pathlib.Path, files: Mapping[str, bytes]) -> None:
  """Writes files that `read` has read."""
  for name, content in files.items():
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def documents(
  directory: pathlib.Path,
  tokenizer: tokenizers.Tokenizer | None,
  max_seq_len: int,
) -> dict[str, bytes]:
  """What an export writes beside the weights: files that are kept, or ours.

  A `tokenizer.json` that leaves bos to others adds it of itself: transformers 5
  does not read `add_bos_token` beside one.

  Raises:
    InputError: a file cannot be read, or `generation_config.json` is damaged.
  """
  generation_config.read(directory)
  kept = read(directory)
  if tokenizer is None:
    return kept
  own = ours(tokenizer, max_seq_len)
  if not kept.keys().isdisjoint(_NAME_TOKENS):
    del own[tokenizer_files.CONFIG]
  if tokenizer.adds_bos and not tokenizer.file_adds_bos:
    del kept[TOKENIZER]
  return own | kept


def ours(tokenizer: tokenizers.Tokenizer, max_seq_len: int) -> dict[str, bytes]:
  """The files of a model that was trained here; transformers loads them.

  Texts begin with bos there as well. Special tokens and a chat template are
  named if the tokenizer has them.
  """
  names = ('bos_token', 'eos_token', 'pad_token')
  tokens = {name: tokenizer.named_token(name) for name in names}
  tokens = {name: token for name, token in tokens.items() if token is not None}
  body = {'tokenizer_class': 'PreTrainedTokenizerFast'} | tokens
  body |= {
    'add_bos_token': tokenizer.adds_bos,
    'model_max_length': max_seq_len,
    'clean_up_tokenization_spaces': False,
  }
  if tokenizer.has_chat_format and not tokenizer.templates:
    body['chat_template'] = chat.TEMPLATE
  generation = {
    'bos_token_id': tokenizer.bos_id if 'bos_token' in tokens else None,
    'eos_token_id': _one_or_more(tokenizer.eos_ids),
  }
  generation = {k: v for k, v in generation.items() if v is not None}
  generation |= {'do_sample': True, 'temperature': 0.7, 'top_p': 0.95}
  dump = lambda body: (json.dumps(body, indent=2) + '\n').encode()
  return {
    TOKENIZER: _with_bos(tokenizer).encode(),
    tokenizer_files.CONFIG: dump(body),
    generation_config.NAME: dump(generation),
  }


def _one_or_more(ids: tuple[int, ...]) -> int | list[int] | None:
  return ids[0] if len(ids) == 1 else list(ids) or None


def _with_bos(tokenizer: tokenizers.Tokenizer) -> str:
  """The `tokenizer.json`, which adds bos of itself if ours does."""
  if not tokenizer.adds_bos or tokenizer.file_adds_bos:
    return tokenizer.text
  full = hf_tokenizers.Tokenizer.from_str(tokenizer.text)
  bos = tokenizer.named_token('bos_token')
  template = processors.TemplateProcessing(
    single=f'{bos} $A',
    pair=f'{bos} $A {bos}:1 $B:1',
    special_tokens=[(bos, tokenizer.bos_id)],
  )
  before = full.post_processor
  both = template if before is None else processors.Sequence([before, template])
  full.post_processor = both
  return full.to_str()
