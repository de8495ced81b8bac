"""Text generation: prefill once, then one jitted step a token (TR 2.1.1).

Prefill runs whole prompts in the naive form and fills the latent caches; each
decode step attends to them in the absorbed form. Rows of a batch may have
prompts of different lengths: row b's token lies at its own index, and what
padding wrote beyond a prompt's end is overwritten before anything may see it.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, errors
from dsv3_jax.inference import sampling
from dsv3_jax.nn import attention, model

_BUCKET = 64  # prompts are padded to a multiple, so that few shapes compile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """New tokens of each prompt, and how fast they came.

  Prefill gives each row its first token and the first decode step its second;
  decoding is timed from there, as that step may have to compile. So may
  prefill, at a new shape. `decoded` counts tokens of rows not yet at their end.
  """

  tokens: list[list[int]]
  prefill_seconds: float
  decode_seconds: float
  decoded: int

  @property
  def tokens_per_second(self) -> float:
    """Decoded tokens of all rows; 0 if there is none to time."""
    return self.decoded / self.decode_seconds if self.decoded else 0.0


class Engine:
  """Generates from parameters and router biases on one device."""

  def __init__(self, cfg: config.Config, params: dict, router: model.Router):
    self.cfg = cfg
    self._dtype = model.compute_dtype(cfg)
    kept = lambda path: model.is_f32(path[-1].key)
    cast = lambda path, x: x if kept(path) else x.astype(self._dtype)
    self._params = jax.tree_util.tree_map_with_path(cast, params)
    self._router = router
    self._prefill = jax.jit(functools.partial(_forward, model.build(cfg)))
    self._decode = jax.jit(
      functools.partial(_forward, model.build(cfg, absorbed=True)),
      donate_argnames=('caches',),
    )

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int = -1,
  ) -> Generation:
    """Continues each prompt until `stop_id` or `max_new_tokens`.

    Raises:
      InputError: an empty prompt, a token outside the vocabulary, or a prompt
        that leaves no room for `max_new_tokens`.
    """
    if max_new_tokens < 1:
      raise errors.InputError(f'max_new_tokens={max_new_tokens} must be >= 1')
    check_prompts(self.cfg.model, prompts, max_new_tokens)
    lengths_B = np.array([len(p) for p in prompts])
    padded = -(-int(lengths_B.max()) // _BUCKET) * _BUCKET
    total = int(lengths_B.max()) + max_new_tokens
    length = max(padded, -(-total // _BUCKET) * _BUCKET)
    tokens_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
      row[: len(prompt)] = prompt
    index_BT = np.broadcast_to(np.arange(padded), tokens_BT.shape)
    keys = [
      jax.random.fold_in(jax.random.key(seed), b) for b in range(len(prompts))
    ]
    draw = (jnp.stack(keys), jnp.float32(temperature), jnp.float32(top_p))

    start = time.perf_counter()
    caches = empty_caches(self.cfg.model, len(prompts), length, self._dtype)
    args = (self._params, self._router, tokens_BT, index_BT, lengths_B - 1)
    next_B, caches = self._prefill(*args, caches=caches, draw=draw)
    made = [np.asarray(next_B)]
    prefilled = begun = time.perf_counter()
    done_B, decoded = made[0] == stop_id, 0
    while len(made) < max_new_tokens and not done_B.all():
      index_B1 = jnp.asarray(lengths_B + len(made) - 1)[:, None]
      zeros_B = np.zeros(len(prompts), np.int32)
      args = (self._params, self._router, next_B[:, None], index_B1, zeros_B)
      next_B, caches = self._decode(*args, caches=caches, draw=draw)
      made.append(np.asarray(next_B))
      if len(made) == 2:
        begun = time.perf_counter()
      else:
        decoded += int(np.sum(~done_B))
      done_B |= made[-1] == stop_id
    return Generation(
      tokens=[_until(row, stop_id) for row in np.stack(made, axis=1).tolist()],
      prefill_seconds=prefilled - start,
      decode_seconds=time.perf_counter() - begun,
      decoded=decoded,
    )


def check_prompts(
  cfg: config.ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
) -> None:
  """What `Engine.generate` can take.

  Raises:
    InputError: see there.
  """
  if not prompts:
    raise errors.InputError('prompts=[] must hold at least one prompt')
  room = cfg.max_seq_len - max_new_tokens
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise errors.InputError(
        f'prompt {i} is empty: it needs one token at least'
      )
    if len(prompt) > room:
      raise errors.InputError(
        f'prompt {i} has {len(prompt)} tokens; with max_new_tokens='
        f'{max_new_tokens} and model.max_seq_len={cfg.max_seq_len} at most '
        f'{room} fit'
      )
    if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
      raise errors.InputError(
        f'prompt {i} has ids outside 0..{cfg.vocab_size - 1}'
      )


def _forward(net, params, router, tokens_BT, index_BT, last_B, caches, draw):
  """One pass through the caches and one sampled token a row."""
  logits_BV, caches = net.apply(
    {'params': params},
    tokens_BT,
    index_BT,
    last_B,
    router,
    caches,
    method='cached',
  )
  keys_B, temperature, top_p = draw
  # The key depends on the place in the row only, not on how it was reached.
  place_B = jnp.take_along_axis(index_BT, last_B[:, None], axis=1)[:, 0]
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, place_B)
  return sampling.sample(logits_BV, keys_B, temperature, top_p), caches


def empty_caches(
  cfg: config.ModelConfig, batch: int, length: int, dtype
) -> model.Caches:
  """Caches of both stacks for `length` tokens a row."""
  make = functools.partial(attention.empty_cache, cfg)
  return model.Caches(
    make(cfg.num_dense_layers, batch, length, dtype),
    make(cfg.num_moe_layers, batch, length, dtype),
  )


def _until(tokens: list[int], stop_id: int) -> list[int]:
  """Cuts after the first `stop_id`, which is kept."""
  return tokens[: tokens.index(stop_id) + 1] if stop_id in tokens else tokens
