"""The settings of an experiment as frozen, checked dataclasses.

`from_config_dict` builds them. It rejects unknown and missing keys by dotted
path, wrong types and impossible combinations, before anything compiles. There
are no defaults here: `experiments/base.py` has them all, with their units and
sections of the technical report (TR).
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from dsv3_jax import config_rules, errors

_frozen = dataclasses.dataclass(frozen=True, kw_only=True)


@_frozen
class MlaConfig:
  """Multi-head latent attention (TR 2.1.1)."""

  num_heads: int
  q_lora_rank: int
  kv_lora_rank: int
  qk_nope_head_dim: int
  qk_rope_head_dim: int
  v_head_dim: int

  @property
  def qk_head_dim(self) -> int:
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def cache_width(self) -> int:
    """Values in the cache a token and layer: latent and RoPE key."""
    return self.kv_lora_rank + self.qk_rope_head_dim


@_frozen
class RopeConfig:
  """Rotary position embedding and its YaRN extension (TR 4.3)."""

  theta: float
  original_seq_len: int
  factor: float
  beta_fast: float
  beta_slow: float
  mscale: float
  mscale_all_dim: float


@_frozen
class MoeConfig:
  """DeepSeekMoE (TR 2.1.2)."""

  num_experts: int
  num_shared_experts: int
  top_k: int
  num_groups: int
  top_groups: int
  d_ff: int
  score_func: str
  norm_topk: bool
  route_scale: float
  product: str
  block_size: int
  buffer_factor: float


@_frozen
class MtpConfig:
  """Multi-token prediction (TR 2.2)."""

  depth: int
  hidden: str
  normalizer: str


@_frozen
class ModelConfig:
  """The whole network."""

  vocab_size: int
  d_model: int
  d_ff: int
  num_layers: int
  num_dense_layers: int
  norm_eps: float
  latent_norm_eps: float
  init_std: float
  max_seq_len: int
  scan_layers: bool
  remat: str
  mla: MlaConfig
  rope: RopeConfig
  moe: MoeConfig
  mtp: MtpConfig

  @property
  def num_moe_layers(self) -> int:
    return self.num_layers - self.num_dense_layers

  @property
  def yarn(self) -> bool:
    """True if positions go beyond the original length."""
    return self.max_seq_len > self.rope.original_seq_len


@_frozen
class BalanceConfig:
  """Auxiliary balance losses (TR 2.1.2, 4.5.3; V2 report 2.2.3)."""

  kind: str
  alpha: float
  v2_expert_alpha: float
  v2_device_alpha: float
  v2_comm_alpha: float


@_frozen
class FilterConfig:
  """Rules that a text must keep, in `dsv3 prepare`."""

  min_chars: int
  max_chars: int
  languages: tuple[str, ...]
  gopher_repetition: bool


@_frozen
class DedupConfig:
  """Which duplicates `dsv3 prepare` drops, and how it finds them."""

  exact: bool
  near: float
  shingle_words: int
  bands: int
  rows_per_band: int


@_frozen
class DataConfig:
  """Corpus, tokenizer and packing (TR 4.1)."""

  source: str
  mixture: tuple[str, ...]
  max_epochs: float
  text_key: str
  valid_fraction: float
  cache_dir: str
  bad_records: str
  on_change: str
  prepared: str
  tokenizer: str
  tokenizer_vocab: int
  seq_len: int
  fim_rate: float
  split_rate: float
  isolate_samples: bool
  packing_bins: int
  shuffle_window: int
  filters: FilterConfig
  dedup: DedupConfig

  @property
  def selects(self) -> bool:
    """True if documents are left out by rules."""
    rules = self.filters
    by_text = rules.min_chars or rules.max_chars or rules.languages
    by_text = by_text or rules.gopher_repetition
    return bool(by_text or self.dedup.exact or self.dedup.near)


@_frozen
class LrConfig:
  """The five phases of the learning rate (TR 4.2)."""

  peak: float
  warmup_steps: int
  constant_tokens: int
  decay_tokens: int
  decay_lr: float
  hold_tokens: int
  final_lr: float


@_frozen
class StepSchedule:
  """`first` for the first `first_tokens` of training, `then` afterwards."""

  first: float
  first_tokens: int
  then: float


@_frozen
class OptimConfig:
  """AdamW, EMA and the schedules over training tokens (TR 4.2)."""

  lr: LrConfig
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip_norm: float
  moments_dtype: str
  ema_decay: float
  mtp_weight: StepSchedule
  bias_rate: StepSchedule


@_frozen
class TrainConfig:
  """Length of the run, batch ramp, logging, spike and hardware checks."""

  total_tokens: int
  batch_size: int
  batch_size_start: int
  batch_ramp_tokens: int
  batch_size_step: int
  microbatch_size: int
  log_every: int
  spike_sigmas: float
  probe_every: int
  watchdog_seconds: float
  peak_flops: float


@_frozen
class ParallelConfig:
  """Devices along each mesh axis (1 if unused), schedule, FSDP, bits."""

  pipe: int
  data: int
  context: int
  node: int
  expert: int
  model: int
  schedule: str
  fsdp: tuple[str, ...]
  deterministic: bool


@_frozen
class CheckpointConfig:
  """When to save, how many steps to keep, what to start from."""

  every_steps: int
  keep: int
  restore_step: int
  init_from: str


@_frozen
class EvalConfig:
  """Held-out evaluation."""

  every_steps: int
  max_bytes: int
  batch_size: int
  stride: int
  baselines: bool


@_frozen
class SampleConfig:
  """Text generated at the end of training."""

  prompts: tuple[str, ...]
  max_new_tokens: int
  temperature: float
  top_p: float


@_frozen
class Config:
  """One experiment."""

  seed: int
  precision: str
  model: ModelConfig
  balance: BalanceConfig
  data: DataConfig
  optim: OptimConfig
  train: TrainConfig
  parallel: ParallelConfig
  checkpoint: CheckpointConfig
  eval: EvalConfig
  sample: SampleConfig


def from_config_dict(source: Any) -> Config:
  """Builds and checks a `Config` from a ConfigDict or nested dict.

  Raises:
    InputError: one line: dotted key, value, rule.
  """
  config = _build(Config, source, '')
  config_rules.check(config)
  return config


def to_dict(config: Any) -> dict[str, Any]:
  """The nested plain dict that `from_config_dict` reads back."""
  return dataclasses.asdict(config)


def to_json(config: Config) -> str:
  """`to_dict` as text for `config.json`."""
  return json.dumps(to_dict(config), indent=2) + '\n'


def check_path(source: Mapping, path: str) -> None:
  """Looks up a dotted path in nested settings.

  Raises:
    InputError: there is no such setting; names the nearest known one.
  """
  node, prefix = source, ''
  for key in path.split('.'):
    if not hasattr(node, 'items'):
      raise errors.InputError(
        f'{prefix}{key} is unknown: {prefix[:-1]} is one value'
      )
    if key not in node:
      raise errors.InputError(_unknown(prefix, key, list(node)))
    node, prefix = node[key], f'{prefix}{key}.'


def _build(cls: type, source: Any, path: str) -> Any:
  """Builds a dataclass from a mapping, recursively."""
  if not isinstance(source, Mapping) and not hasattr(source, 'items'):
    raise errors.InputError(f'{path}={source!r} must be a group of settings')
  hints = typing.get_type_hints(cls)
  prefix = path + '.' if path else ''
  given = dict(source.items())
  for key in given:
    if key not in hints:
      raise errors.InputError(_unknown(prefix, key, list(hints)))
  missing = [prefix + key for key in hints if key not in given]
  if missing:
    raise errors.InputError(
      f'{missing[0]} is missing: experiments start from base'
    )
  values = {}
  for key, hint in hints.items():
    if dataclasses.is_dataclass(hint):
      values[key] = _build(hint, given[key], prefix + key)
    else:
      values[key] = _leaf(hint, given[key], prefix + key)
  return cls(**values)


def _unknown(prefix: str, key: str, known: list[str]) -> str:
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  hint = f'did you mean {prefix}{near[0]}? ' if near else ''
  return f'{prefix}{key} is unknown; {hint}known here: {", ".join(known)}'


def _leaf(hint: Any, value: Any, path: str) -> Any:
  """Checks the type of one value; an int passes as a float."""
  if isinstance(hint, types.GenericAlias):  # tuple[str, ...]
    items = value if isinstance(value, (tuple, list)) else (None,)
    if not all(isinstance(v, str) for v in items):
      raise errors.InputError(f'{path}={value!r} must be a tuple of strings')
    return tuple(value)
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    raise errors.InputError(f'{path}={value!r} must be of type {hint.__name__}')
  return value
