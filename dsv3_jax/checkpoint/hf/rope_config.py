"""RoPE and YaRN in the `config.json` of a Hugging Face folder.

Old versions of transformers write `rope_theta` and `rope_scaling`, new ones
`rope_parameters`. Where readers disagree on what a file means, it is refused.
"""

from collections.abc import Callable
from typing import Any

from dsv3_jax import config, errors

FIELDS = ('rope_theta', 'rope_scaling', 'rope_parameters')
# What transformers and the released code take for numbers that are not given.
_YARN = {
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'mscale': 1.0,
  'mscale_all_dim': 0.0,
}
_ORIGINAL = 'original_max_position_embeddings'
_MUST = {'truncate': True, 'partial_rotary_factor': 1.0}  # their defaults
_MOST = 1e12  # of all numbers; their minimum is its inverse

Refuse = Callable[[str, str], errors.InputError]


def write(net: config.ModelConfig) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling`.

  transformers applies YaRN at every length; we and the released code apply it
  only beyond the original length. So `rope_scaling` is written only then.

  Raises:
    InputError: transformers would compute something else.
  """
  rope = net.rope
  if not net.yarn:
    return {'rope_theta': rope.theta, 'rope_scaling': None}
  if not rope.mscale_all_dim and rope.mscale != 1.0:
    raise errors.InputError(
      f'model.rope.mscale={rope.mscale} must be 1.0 with '
      'model.rope.mscale_all_dim=0.0 to be exported: transformers then '
      'ignores it'
    )
  scaling = {name: getattr(rope, name) for name in ('factor', *_YARN)}
  scaling[_ORIGINAL] = rope.original_seq_len
  scaling = {'type': 'yarn', **scaling}
  return {'rope_theta': rope.theta, 'rope_scaling': scaling}


def read(
  body: dict[str, Any], max_seq_len: int, refuse: Refuse
) -> dict[str, Any]:
  """Settings below `model.` by dotted name.

  Args:
    body: of the `config.json`.
    refuse: makes the error from a field and the rule that it breaks.
  """
  field, given = 'rope_parameters', body.get('rope_parameters')
  if given is None:
    field, given = 'rope_scaling', body.get('rope_scaling')
    given = {} if given is None else given
  elif body.get('rope_scaling') is not None:
    raise refuse('rope_scaling', 'is ambiguous beside rope_parameters')
  if not isinstance(given, dict):
    raise refuse(field, 'must be an object or null')
  given = {name: value for name, value in given.items() if value is not None}
  outer = body.get('rope_theta')
  if outer is not None and given.setdefault('rope_theta', outer) != outer:
    raise refuse('rope_theta', f'is ambiguous: {field} has another')
  for name, value in _MUST.items():
    if given.pop(name, value) != value:
      raise refuse(field, f'is not built: {name} must be {value}')
  kind = given.pop('rope_type', given.get('type', 'default'))
  given.pop('type', None)
  for name, x in given.items():
    # Larger numbers, which no model has, would overflow in YaRN's formulas.
    good = type(x) in (int, float) and 1 / _MOST <= x <= _MOST
    if not good and (name, x) != ('mscale_all_dim', 0):
      raise refuse(
        field,
        f'with rope_theta must hold numbers > 0, {1 / _MOST:.0e} to '
        f'{_MOST:.0e}',
      )
  theta = given.pop('rope_theta', None)
  if theta is None:
    raise refuse(field, 'with rope_theta must hold numbers: none is given')
  if kind == 'default' and not given:
    alone = {'rope.original_seq_len': max_seq_len, 'rope.factor': 1.0}
    return alone | {'rope.theta': theta}
  _check_yarn(field, kind, given, max_seq_len, refuse)
  original = given.pop(_ORIGINAL)
  settings = {f'rope.{name}': x for name, x in (_YARN | given).items()}
  return settings | {'rope.theta': theta, 'rope.original_seq_len': original}


def _check_yarn(
  field: str,
  kind: Any,
  given: dict[str, Any],
  max_seq_len: int,
  refuse: Refuse,
) -> None:
  """Checks that the numbers are YaRN's and mean one thing to all readers."""
  needed = {'factor', _ORIGINAL}
  if kind != 'yarn' or not needed <= given.keys() <= {*needed, *_YARN}:
    raise refuse(
      field,
      f"must be of type 'yarn' with {sorted(needed)}, and no more than "
      f'{sorted(_YARN)}',
    )
  both = [name in given for name in ('mscale', 'mscale_all_dim')]
  if any(both) and not all(both):
    raise refuse(field, 'must have both of mscale and mscale_all_dim, or none')
  if not given.get('mscale_all_dim', 1) and given['mscale'] != 1:
    raise refuse(
      field,
      'is ambiguous: with mscale_all_dim 0, transformers ignores mscale, the '
      'released code does not',
    )
  if max_seq_len <= given[_ORIGINAL]:
    raise refuse(
      field,
      'is ambiguous: the released code has YaRN off up to '
      f'{given[_ORIGINAL]} positions, transformers on; drop it, or raise '
      'max_position_embeddings',
    )
