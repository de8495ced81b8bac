"""A trained model: config, params, logits, mtp_logits, generate."""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax import config, errors
from dsv3_jax.checkpoint import source
from dsv3_jax.checkpoint.hf import generation_config
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import generate as generation
from dsv3_jax.inference import mesh as inference_mesh
from dsv3_jax.inference import model_runner, redundant_experts
from dsv3_jax.nn import model

Tokens = Int[Array, 'B T'] | Int[np.ndarray, 'B T']

_PRECISIONS = {'float32': 'f32', 'bfloat16': 'bf16'}
# Old keyword arguments, accepted until the next release.
_RENAMED = {
  'num_drafts': 'num_speculative_tokens',
  'plan': 'redundancy',
  'invariant': 'batch_invariant',
  'tell': 'on_finished',
}


class LLM:
  """A model with its parameters, router biases and tokenizer."""

  def __init__(
    self,
    cfg: config.Config,
    params: dict,
    router_biases: model.RouterBiases,
    tokenizer: tokenizers.Tokenizer | None,
    sampling_defaults: Mapping[str, float | int] | None = None,
    **runner_options: Any,
  ):
    """Args:
    sampling_defaults: of `generation_config.json`, for whoever samples.
    runner_options: of `model_runner.ModelRunner`.
    """
    self._runner_options = _rename_old(runner_options)
    self.sampling_defaults = dict(sampling_defaults or {})
    self.config, self.params, self.router_biases = cfg, params, router_biases
    self._tokenizer = tokenizer
    self._forward = jax.jit(model.build(cfg).apply)

  @property
  def router(self) -> model.RouterBiases:
    """The old name of `router_biases`."""
    message = 'router is deprecated: use router_biases'
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return self.router_biases

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """Text to ids and back.

    Raises:
      InputError: there was no `tokenizer.json` beside the weights.
    """
    if self._tokenizer is None:
      raise errors.InputError('there is no tokenizer.json beside this model')
    return self._tokenizer

  def logits(self, tokens_BT: Tokens) -> Float[Array, 'B T V']:
    """f32 logits of t_{i+1} at every position i.

    Raises:
      InputError: an id outside the vocabulary, or rows beyond
        `model.max_seq_len`.
    """
    return self._apply(tokens_BT)[0]

  def mtp_logits(self, tokens_BT: Tokens) -> Float[Array, 'B T V']:
    """f32 logits of t_{i+2} at position i, from the first MTP module.

    Position i also sees t_{i+1}; the last position sees none and has no
    meaning.

    Raises:
      InputError: the model has no MTP module.
    """
    if not self.config.model.mtp.depth:
      raise errors.InputError('model.mtp.depth=0: this model has no MTP module')
    return self._apply(tokens_BT)[1][0]

  def generate(
    self, prompts: Sequence[str], max_new_tokens: int, **options
  ) -> list[str]:
    """Continues each prompt; `options` as in `inference.generate.generate`."""
    encode = functools.partial(self.tokenizer.encode, add_bos=True)
    ids = [encode(prompt).tolist() for prompt in prompts]
    options = {'stop_id': self.tokenizer.eos_ids} | _rename_old(options)
    output = generation.generate(self.runner, ids, max_new_tokens, **options)
    return [self.tokenizer.decode_answer(row) for row in output.tokens]

  @functools.cached_property
  def runner(self) -> model_runner.ModelRunner:
    """Prefill and decode steps, compiled at first use."""
    args = (self.config, self.params, self.router_biases)
    return model_runner.ModelRunner(*args, **self._runner_options)

  def _apply(self, tokens_BT):
    rows = np.asarray(tokens_BT).tolist()
    generation.check_prompts(self.config.model, rows, 0)
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    positions_BT = jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
    )
    ones_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    batch = model.Batch(
      tokens_BT, targets_BT, positions_BT, ones_BT, ones_BT.astype(jnp.float32)
    )
    return self._forward({'params': self.params}, batch, self.router_biases)


def load(
  directory: str | pathlib.Path,
  base: Mapping[str, Any],
  *,
  dtype: str = 'float32',
  step: int = -1,
  ema: bool = False,
  num_speculative_tokens: int = 0,
  fp8_cache: bool = False,
  mesh: jax.sharding.Mesh | None = None,
  redundancy: redundant_experts.RedundancyConfig | None = None,
  **renamed: Any,
) -> LLM:
  """Loads a training workdir or a Hugging Face folder, hashes checked.

  Args:
    base: settings that a Hugging Face folder does not name.
    dtype: of matrices and activations; norms, gates and biases are f32.
    step: of a workdir; -1 is the newest.
    ema: of a workdir: the average of the weights (TR 3.2.3) in their place.
    num_speculative_tokens: that the MTP module drafts a step of generation.
    fp8_cache: generation stores latents in e4m3, 128 values under one scale.
    mesh: where the parameters are sharded and generation runs
      (`inference.mesh.make_mesh`); None is the first device.
    redundancy: redundant experts; None: there are none.
    renamed: `num_drafts`, `plan`: old names of `num_speculative_tokens` and
      `redundancy`.

  Raises:
    InputError: bad `dtype`, nothing to load in `directory`, no such step, no
      average, damage, or a mesh or redundancy that the model does not fit.
    TypeError: an unknown keyword argument.
  """
  options = {
    'num_speculative_tokens': num_speculative_tokens,
    'fp8_cache': fp8_cache,
    'mesh': mesh,
    'redundancy': redundancy,
  }
  options |= _load_options(renamed, options)
  if dtype not in _PRECISIONS:
    raise errors.InputError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
  directory = pathlib.Path(directory)
  with source.open_source(directory, base, step=step, ema=ema) as (cfg, leaves):
    model_runner.check_num_speculative_tokens(
      cfg.model, options['num_speculative_tokens']
    )
    model_mesh = inference_mesh.InferenceMesh(cfg, mesh)
    if options['redundancy'] is not None:
      redundant_experts.check(cfg.model, model_mesh, options['redundancy'])
    cfg = dataclasses.replace(cfg, precision=_PRECISIONS[dtype])
    params, router_biases = source.to_devices(
      leaves, cfg, dtype, mesh, inference_mesh.RULES
    )
  tokenizer = source.read_tokenizer(directory)
  options['sampling_defaults'] = generation_config.read(directory).sampling
  return LLM(cfg, params, router_biases, tokenizer, **options)


def _load_options(
  renamed: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
  """Options of `load` that have old names, by their new names.

  Raises:
    TypeError: an unknown name, or an option that also has its new name.
  """
  if unknown := renamed.keys() - {'num_drafts', 'plan'}:
    raise TypeError(f'load() got unexpected arguments: {sorted(unknown)}')
  for old in renamed:
    if given[_RENAMED[old]]:
      raise TypeError(f'give {_RENAMED[old]} only, not {old} too')
  # Level 5: the caller of `dsv3_jax.load`.
  return _rename_old(renamed, stacklevel=5)


def _rename_old(options: dict[str, Any], stacklevel: int = 3) -> dict[str, Any]:
  """Options by their new names; warns if one has its old name."""
  for old in options.keys() & _RENAMED.keys():
    message = f'{old} is deprecated: use {_RENAMED[old]}'
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
  return {_RENAMED.get(name, name): value for name, value in options.items()}
