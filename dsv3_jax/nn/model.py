"""The whole network: embedding, dense and MoE stacks, head, MTP modules.

Methods, for `Model.apply(..., method=...)`:
  __call__        logits of the main model and of each MTP depth
  loss            training losses of one micro-batch, and expert loads
  token_losses    cross-entropy of each main target
  forward_cached  logits of some tokens, through a latent cache
  draft           logits of the first MTP module, through its own cache
The router's biases are an input, `{'moe': [layers, E], 'mtp': [depth, E]}`;
each is there only if there are such layers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.nn import attention, block, layers, moe, mtp
from dsv3_jax.ops import cross_entropy, fp8_linear, mtp_loss
from pallas_kernels.fp8_matmul import reference as formats

RouterBiases = dict[str, Array]


class Batch(NamedTuple):
  """One micro-batch of whole rows, as the loader makes it.

  tokens_BT, targets_BT int32; positions_BT int32 rotary positions; segments_BT
  int32, the sample of each token, 0 on padding; weights_BT f32, 1 where the
  target counts. Every device on `context` has the whole rows, as MTP needs the
  targets of later positions, and computes its own tokens only
  (`collectives.shard_sequence`).
  """

  tokens_BT: Array
  targets_BT: Array
  positions_BT: Array
  segments_BT: Array
  weights_BT: Array


class Caches(NamedTuple):
  """Latent caches of both stacks and, for drafting, of the MTP module.

  tokens_1ps1: the tokens of the latents. The model leaves them as they are; see
  `inference.token_cache`.
  """

  dense: attention.LatentCache
  moe: attention.LatentCache
  mtp: attention.LatentCache | None = None
  tokens_1ps1: Int[Array, '1 p s 1'] | None = None


class Model(nn.Module):
  """DeepSeek-V3 (TR 2).

  isolated: samples packed in one row do not see each other (SFT, TR 5.1).
  absorbed: attend to the cache in the latent space (decode).
  """

  cfg: config.ModelConfig
  balance: config.BalanceConfig
  policy: precision.Policy
  isolated: bool = False
  absorbed: bool = False

  def setup(self):
    cfg, common = self.cfg, (self.cfg, self.balance, self.policy)
    make_stack = functools.partial(block.Stack, absorbed=self.absorbed)
    self.embed = layers.Embedding(cfg, self.policy)
    if cfg.num_dense_layers:
      self.dense_layers = make_stack(
        cfg.num_dense_layers, *common, is_moe=False
      )
    if cfg.num_moe_layers:
      self.moe_layers = make_stack(cfg.num_moe_layers, *common, is_moe=True)
    self.final_norm = layers.RMSNorm(cfg)
    self.head = layers.Head(cfg, self.policy)
    self.mtp = [
      mtp.MtpModule(*common, absorbed=self.absorbed)
      for _ in range(cfg.mtp.depth)
    ]

  def __call__(
    self, batch: Batch, router_biases: RouterBiases
  ) -> tuple[Float[Array, 'B T V'], list[Float[Array, 'B T V']]]:
    """Logits, f32: of t_{i+1} and, for each depth k, of t_{i+k+1}."""
    h_BTD, raw_BTD, _ = self._main(batch, router_biases)
    deeper, _ = self._mtp_chain(batch, router_biases, h_BTD, raw_BTD)
    head_DV = self.head()
    return _logits(h_BTD, head_DV), [_logits(h, head_DV) for h in deeper]

  def token_losses(
    self, batch: Batch, router_biases: RouterBiases
  ) -> Float[Array, 'B T']:
    """Cross-entropy of every main target, f32 [nats]."""
    h_BTD, _, _ = self._main(batch, router_biases)
    targets_BT = collectives.shard_sequence(batch.targets_BT)
    losses_BT = cross_entropy.head_token_losses(h_BTD, self.head(), targets_BT)
    return collectives.all_gather_sequence(losses_BT)

  def loss(
    self, batch: Batch, router_biases: RouterBiases, scales: dict[str, Array]
  ) -> tuple[Float[Array, ''], dict[str, Array]]:
    """This micro-batch's share of the step's loss (TR eqs. 17, 24, 25).

    Args:
      scales: what each sum is multiplied by, of `mtp_loss.loss_scales`: 'main',
        'mtp' (one a depth), 'balance', and 'mtp_weight', lambda.
    Returns:
      The loss, and its parts: 'loss' (main), 'mtp_loss' (mean over depths,
      without lambda), 'balance', 'load' and 'mtp_load' [layers, E].
    """
    h_BTD, raw_BTD, stats = self._main(batch, router_biases)
    head_DV = self.head()
    head_loss = lambda h_BTD, depth: cross_entropy.head_loss(
      h_BTD, head_DV, *loss_targets(batch, scales, depth, self.isolated)
    )
    parts = {'loss': head_loss(h_BTD, 0)}
    deeper, mtp_stats = self._mtp_chain(batch, router_biases, h_BTD, raw_BTD)
    parts['mtp_loss'] = jnp.zeros((), jnp.float32)
    for k, h_k in enumerate(deeper, start=1):
      parts['mtp_loss'] += head_loss(h_k, k)
    balance = jnp.sum(stats.balance) + jnp.sum(mtp_stats.balance)
    parts['balance'] = balance * scales['balance']
    loads = {'load': stats.load_E, 'mtp_load': mtp_stats.load_E}
    return mtp_loss.total(parts, scales), parts | loads

  def forward_cached(
    self,
    tokens_BT: Int[Array, 'B T'],
    index_BT: Int[Array, 'B T'],
    at_Bt: Int[Array, 'B t'],
    table_Bb: Int[Array, 'B b'],
    router_biases: RouterBiases,
    caches: Caches,
  ) -> tuple[
    Float[Array, 'B t V'], Float[Array, 'B T D'], Caches, Float[Array, 'L E']
  ]:
    """Logits after the tokens `at_Bt` of each row, f32; fills the caches.

    Args:
      index_BT: place of each token in its row, also its rotary position;
        negative on padding. table_Bb: block table of each row.
    Returns:
      Also the hidden states that `draft` takes, and how many tokens each
      expert got, padding left out.
    """
    context = _cached_context(self.cfg, index_BT, table_Bb)
    raw_BTD, caches, stats = self._stacks(
      tokens_BT, router_biases, context, caches
    )
    h_BTD = self.final_norm(raw_BTD)
    h_BtD = jnp.take_along_axis(h_BTD, at_Bt[:, :, None], axis=1)
    previous_BTD = h_BTD if self._takes_normed else raw_BTD
    logits_BtV = _logits(h_BtD, self.head())
    return logits_BtV, previous_BTD, caches, stats.load_E

  def draft(
    self,
    previous_BTD: Float[Array, 'B T D'],
    next_BT: Int[Array, 'B T'],
    index_BT: Int[Array, 'B T'],
    at_B1: Int[Array, 'B 1'],
    table_Bb: Int[Array, 'B b'],
    router_biases: RouterBiases,
    caches: Caches,
  ) -> tuple[Float[Array, 'B 1 V'], Float[Array, 'B 1 D'], Caches]:
    """Logits after the tokens `next_BT`, by the first MTP module (TR 2.2).

    Fills the module's own cache.

    Args:
      previous_BTD: hidden states of `forward_cached`, or of this method for one
        token more. next_BT: the token behind each of them.
      at_B1: the tokens whose logits and hidden states are returned.
    """
    context = _cached_context(self.cfg, index_BT, table_Bb)
    args = (self.embed(next_BT), router_biases['mtp'][0], context, caches.mtp)
    raw_BTD, h_BTD, _, cache = self.mtp[0](previous_BTD, *args)
    at = lambda x: jnp.take_along_axis(x, at_B1[:, :, None], axis=1)
    previous_B1D = at(h_BTD if self._takes_normed else raw_BTD)
    logits_B1V = _logits(at(h_BTD), self.head())
    return logits_B1V, previous_B1D, caches._replace(mtp=cache)

  @property
  def _takes_normed(self) -> bool:
    """Whether MTP modules take the hidden state that the head takes."""
    return self.cfg.mtp.hidden == 'post_norm'

  def _main(self, batch: Batch, router_biases: RouterBiases):
    """Hidden states after and before the final norm, and MoE statistics."""
    context = make_context(self.cfg, batch, self.isolated)
    tokens_BT = collectives.shard_sequence(batch.tokens_BT)
    raw_BTD, _, stats = self._stacks(tokens_BT, router_biases, context, None)
    return self.final_norm(raw_BTD), raw_BTD, stats

  def _stacks(self, tokens_BT, router_biases, context, caches):
    """Embedding and all layers."""
    cfg = self.cfg
    with jax.named_scope('embed'):
      x_BTD = self.embed(tokens_BT)
    dense, routed = (None, None) if caches is None else caches[:2]
    if cfg.num_dense_layers:
      no_bias = jnp.zeros((cfg.num_dense_layers, 0), jnp.float32)
      x_BTD, dense, _ = self.dense_layers(x_BTD, dense, no_bias, context)
    stats = moe.MoeStats(jnp.zeros((0, cfg.moe.num_experts)), jnp.zeros(0))
    if cfg.num_moe_layers:
      args = (x_BTD, routed, router_biases['moe'], context)
      x_BTD, routed, stats = self.moe_layers(*args)
    if caches is not None:
      caches = caches._replace(dense=dense, moe=routed)
    return x_BTD, caches, stats

  def _mtp_chain(
    self, batch: Batch, router_biases: RouterBiases, h_BTD, raw_BTD
  ):
    """Normed hidden states of each MTP depth, and their MoE statistics."""
    context = make_context(self.cfg, batch, self.isolated)
    ahead = [self.embed(t) for t in tokens_ahead(batch, self.cfg.mtp.depth)]
    args = (h_BTD, raw_BTD, ahead, router_biases, context)
    return mtp.chain(self.cfg, self.mtp, *args)


def make_context(
  cfg: config.ModelConfig, batch: Batch, isolated: bool
) -> attention.AttentionContext:
  """What all layers share for a batch."""
  valid_BT = (batch.segments_BT > 0).astype(jnp.float32)
  segments_BT = batch.segments_BT if isolated else None
  return attention.make_context(cfg, batch.positions_BT, valid_BT, segments_BT)


def _cached_context(cfg, index_BT, table_Bb) -> attention.AttentionContext:
  """The context of rows with a cache; padding does not count."""
  valid_BT = (index_BT >= 0).astype(jnp.float32)
  return attention.make_context(
    cfg, index_BT, valid_BT, index_BT=index_BT, table_Bb=table_Bb
  )


def tokens_ahead(batch: Batch, depth: int) -> list[Int[Array, 'B T']]:
  """t_{i+k} at i, for k = 1 to depth; 0 past the end, where nothing counts."""
  shifted = [mtp_loss.mtp_shift(batch.targets_BT, k) for k in range(depth)]
  return [collectives.shard_sequence(x_BS) for x_BS in shifted]


def loss_targets(
  batch: Batch, scales: dict[str, Array], depth: int, isolated: bool
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
  """Targets of a depth (0: the main model) and what each counts."""
  rows = (batch.targets_BT, batch.weights_BT, batch.segments_BT)
  return mtp_loss.depth_targets(*rows, scales, depth, isolated)


def _logits(h_BTD: Float[Array, 'B T D'], head_DV) -> Float[Array, 'B T V']:
  with jax.named_scope('head'):
    return jnp.einsum(
      'btd,dv->btv',
      h_BTD,
      head_DV.astype(h_BTD.dtype),
      preferred_element_type=jnp.float32,
    )


def init_router_biases(cfg: config.ModelConfig) -> RouterBiases:
  """Zero biases of all MoE layers, f32."""
  layers_of = {'moe': cfg.num_moe_layers, 'mtp': cfg.mtp.depth}
  shape = lambda count: (count, cfg.moe.num_experts)
  return {name: jnp.zeros(shape(n)) for name, n in layers_of.items() if n}


def build(
  cfg: config.Config, *, absorbed: bool = False, training: bool = False
) -> Model:
  """The model of an experiment.

  Args:
    absorbed: for decoding from a cache.
    training: in the experiment's precision; under FP8, variables then need
      `quantize`d weights. Without, FP8 experiments are computed in BF16.
  """
  policy = precision.POLICIES[cfg.precision]
  if not training:
    policy = dataclasses.replace(policy, fp8=False)
  return Model(
    cfg.model,
    cfg.balance,
    policy,
    isolated=cfg.data.isolate_samples,
    absorbed=absorbed,
  )


def quantize(policy: precision.Policy, params: dict) -> dict:
  """Variables next to `params`: FP8 forms of its weights, if there are any.

  `{'quantized': tree}` with (Fprop's, Dgrad's) for every FP8 weight, or `{}`.
  """
  if not policy.fp8 or sharding.rules().fsdp:  # there, modules make them
    return {}

  def subtree(node):
    forms = {}
    for name, leaf in node.items():
      if isinstance(leaf, dict):
        forms[name] = subtree(leaf)
      elif policy.of(name) == 'fp8':
        flat = fp8_linear.flat(leaf, precision.FP8_MATRICES[name])
        forms[name] = formats.quantize_weight(flat)
    return {name: form for name, form in forms.items() if form}

  with jax.named_scope('quantize_weights'):
    return {'quantized': subtree(params)}


def compute_dtype(cfg: config.Config) -> jnp.dtype:
  """Dtype of activations and of products outside FP8."""
  return jnp.dtype(precision.POLICIES[cfg.precision].compute)


def is_f32(name: str) -> bool:
  """True for parameters that stay f32 whatever the precision, by last key."""
  return precision.POLICIES['bf16'].of(name) == 'float32'


def init_params(model: Model, key: Array) -> dict:
  """Fresh f32 parameters as a plain nested dict (traceable)."""
  return nn.meta.unbox(_init_boxed(model, key))


def param_shapes(model: Model) -> dict:
  """What `init_params` would give, as `jax.ShapeDtypeStruct`s."""
  return nn.meta.unbox(_boxed_shapes(model))


def param_specs(
  model: Model,
  rules: sharding.ShardingRules = sharding.RULES,
  sizes: Mapping[str, int] | None = None,
) -> dict:
  """A PartitionSpec for every parameter, from its logical axes.

  Args:
    sizes: devices along each mesh axis, which `rules.fsdp` needs.
  """
  sizes = sizes or dict.fromkeys(sharding.AXES, 1)
  is_boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)
  return jax.tree.map(
    lambda box: (
      sharding.storage_spec(box.value.shape, box.names, rules, sizes).spec
    ),
    _boxed_shapes(model),
    is_leaf=is_boxed,
  )


def _boxed_shapes(model: Model) -> dict:
  """What sizes alone decide: not how layers are computed."""
  cfg = dataclasses.replace(model.cfg, remat='none')
  return _traced_shapes(Model(cfg, model.balance, precision.POLICIES['f32']))


@functools.lru_cache(maxsize=16)  # tracing takes a while
def _traced_shapes(model: Model) -> dict:
  return jax.eval_shape(lambda: _init_boxed(model, jax.random.key(0)))


def _init_boxed(model: Model, key: Array) -> dict:
  """Parameters with their logical axes, declared by the least of batches."""
  shape = (1, model.cfg.mtp.depth + 1)
  ints, ones = jnp.zeros(shape, jnp.int32), jnp.ones(shape)
  batch = Batch(ints, ints, ints, ints, ones)
  return model.init(key, batch, init_router_biases(model.cfg))['params']
