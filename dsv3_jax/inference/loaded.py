"""A trained model: config, params, logits, mtp_logits, generate."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax import config
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
    """f32 logits of t_{i+1} at every position i."""
    return self._apply(tokens_BT)[0]

  def mtp_logits(self, tokens_BT: Tokens) -> Float[Array, 'B T V']:
    """f32 logits of t_{i+2} at position i, from the first MTP module.

    Position i also sees t_{i+1}; the last position has none and is void.

    Raises:
      ValueError: the model has no MTP module.
    """
    if not self.config.model.mtp.depth:
      raise ValueError('model.mtp.depth=0: this model has no MTP module')
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


def read_config(directory: str | pathlib.Path) -> config.Config:
  """The experiment that a workdir was started with.

  Raises:
    ValueError: there is no readable `config.json`.
  """
  path = pathlib.Path(directory) / 'config.json'
  try:
    return config.from_config_dict(json.loads(path.read_text(encoding='utf-8')))
  except OSError as error:
    raise ValueError(
      f'{path} cannot be read ({error.strerror}): name the workdir of a '
      'training run'
    ) from error
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error


def load(directory: str | pathlib.Path, dtype: str = 'float32') -> LoadedModel:
  """Loads the newest committed step of a training workdir, hashes checked.

  Raises:
    ValueError: bad `dtype`, no run in `directory`, or a damaged checkpoint.
  """
  if dtype not in _PRECISIONS:
    raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
  directory = pathlib.Path(directory)
  cfg = read_config(directory)
  cfg = dataclasses.replace(cfg, precision=_PRECISIONS[dtype])
  tokenizer = tokenizers.Tokenizer.from_file(directory / 'tokenizer.json')
  checkpoints = store.Store(directory / 'checkpoints', keep=cfg.checkpoint.keep)
  step = checkpoints.latest()
  if step is None:
    raise ValueError(f'{checkpoints.directory} holds no committed step')
  like = jax.eval_shape(lambda: steps.init_state(cfg, jax.random.key(cfg.seed)))
  like = {name: like[name] for name in ('params', 'router')}
  state, _ = checkpoints.restore(step, {'train': like}, partial=True)
  state = jax.tree.map(jnp.asarray, state['train'])
  return LoadedModel(cfg, state['params'], state['router'], tokenizer)
