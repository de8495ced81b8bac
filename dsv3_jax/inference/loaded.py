"""A trained model: config, params, logits, mtp_logits, generate."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax import config, errors, workdir
from dsv3_jax import train_step as steps
from dsv3_jax.checkpoint import store
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import engine
from dsv3_jax.nn import model

Tokens = Int[Array, 'B T'] | Int[np.ndarray, 'B T']

_PRECISIONS = {'float32': 'f32', 'bfloat16': 'bf16'}


class LoadedModel:
  """A model with its parameters, router biases and tokenizer."""

  def __init__(
    self,
    cfg: config.Config,
    params: dict,
    router: model.Router,
    tokenizer: tokenizers.Tokenizer,
  ):
    self.config, self.params, self.router = cfg, params, router
    self.tokenizer = tokenizer
    self._forward = jax.jit(model.build(cfg).apply)

  def logits(self, tokens_BT: Tokens) -> Float[Array, 'B T V']:
    """f32 logits of t_{i+1} at every position i.

    Raises:
      InputError: an id outside the vocabulary, or rows beyond
        `model.max_seq_len`.
    """
    return self._apply(tokens_BT)[0]

  def mtp_logits(self, tokens_BT: Tokens) -> Float[Array, 'B T V']:
    """f32 logits of t_{i+2} at position i, from the first MTP module.

    Position i also sees t_{i+1}; the last position has none and is void.

    Raises:
      ValueError: the model has no MTP module.
    """
    if not self.config.model.mtp.depth:
      raise errors.InputError('model.mtp.depth=0: this model has no MTP module')
    return self._apply(tokens_BT)[1][0]

  def generate(
    self, prompts: Sequence[str], max_new_tokens: int, **how
  ) -> list[str]:
    """Continues each prompt; `how` as in `inference.engine.Engine.generate`."""
    encode = functools.partial(self.tokenizer.encode, add_bos=True)
    ids = [encode(prompt).tolist() for prompt in prompts]
    how = {'stop_id': self.tokenizer.eos_id} | how
    made = self.engine.generate(ids, max_new_tokens, **how)
    return [self.tokenizer.decode(row) for row in made.tokens]

  @functools.cached_property
  def engine(self) -> engine.Engine:
    """Prefill and decode steps, compiled at first use."""
    return engine.Engine(self.config, self.params, self.router)

  def _apply(self, tokens_BT):
    rows = np.asarray(tokens_BT).tolist()
    engine.check_prompts(self.config.model, rows, 0)
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    positions_BT = jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
    )
    ones_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    batch = model.Batch(
      tokens_BT, targets_BT, positions_BT, ones_BT, ones_BT.astype(jnp.float32)
    )
    return self._forward({'params': self.params}, batch, self.router)


def load(
  directory: str | pathlib.Path,
  dtype: str = 'float32',
  step: int = -1,
  ema: bool = False,
) -> LoadedModel:
  """Loads a committed step of a training workdir, hashes checked.

  Args:
    step: -1 is the newest.
    ema: the average of the weights (TR 3.2.3) in place of the weights.

  Raises:
    InputError: bad `dtype`, no run in `directory`, no such step, no average, or
      a damaged checkpoint.
  """
  if dtype not in _PRECISIONS:
    raise errors.InputError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
  directory = pathlib.Path(directory)
  cfg = workdir.read_config(directory)
  if ema and not cfg.optim.ema_decay:
    raise errors.InputError('optim.ema_decay=0.0: this run kept no average')
  cfg = dataclasses.replace(cfg, precision=_PRECISIONS[dtype])
  tokenizer = tokenizers.Tokenizer.from_file(directory / 'tokenizer.json')
  like = jax.eval_shape(lambda: steps.init_state(cfg, jax.random.key(cfg.seed)))
  params, router = like['params'], {'router': like['router']}
  like = {'train': router | ({} if ema else {'params': params})}
  like |= {'ema': params} if ema else {}
  checkpoints = store.Store(directory / 'checkpoints', keep=cfg.checkpoint.keep)
  with contextlib.closing(checkpoints):
    newest = checkpoints.latest()
    if newest is None:
      raise errors.InputError(
        f'{checkpoints.directory} holds no committed step'
      )
    wanted = newest if step < 0 else step
    arrays, _ = checkpoints.restore(wanted, like, partial=True)
  arrays = jax.tree.map(jnp.asarray, arrays)
  params = arrays['ema'] if ema else arrays['train']['params']
  return LoadedModel(cfg, params, arrays['train']['router'], tokenizer)
