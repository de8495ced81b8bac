"""The `config.json` of a workdir, those of earlier releases included."""

import json
import pathlib
from typing import Any

from dsv3_jax import errors

# What `data` did not have in release 0.2, and did not do.
_DATA_OF_OLD_RUNS = {
  'bad_records': 'refuse',
  'on_change': 'refuse',
  'prepared': '',
  'mixture': [],
  'max_epochs': 0.0,
  'filters': {
    'min_chars': 0,
    'max_chars': 0,
    'languages': [],
    'gopher_repetition': False,
  },
  'dedup': {
    'exact': False,
    'near': 0.0,
    'shingle_words': 5,
    'bands': 14,
    'rows_per_band': 8,
  },
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in the `config.json` of a workdir.

  Runs of version 0.2.0 have no `latent_norm_eps`: all norms had `norm_eps`; no
  `moe.buffer_factor`, which changes the order of sums alone; and what `data`
  did not have, they did not do.

  Raises:
    InputError: the file, which the message names, is missing or damaged.
  """
  try:
    body = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise errors.InputError(
      f'{path} cannot be read ({error.strerror}): name the workdir of a '
      'training run, or a Hugging Face folder'
    ) from error
  except (ValueError, RecursionError) as error:
    raise errors.InputError(f'{path} is not JSON: {error}') from error
  if not isinstance(body, dict):
    raise errors.InputError(f'{path} must hold one JSON object')
  model = body.get('model')
  if isinstance(model, dict) and 'norm_eps' in model:
    model.setdefault('latent_norm_eps', model['norm_eps'])
    if isinstance(model.get('moe'), dict):
      model['moe'].setdefault('buffer_factor', 1.5)
  if isinstance(body.get('data'), dict):
    body['data'] = _DATA_OF_OLD_RUNS | body['data']
  return body
