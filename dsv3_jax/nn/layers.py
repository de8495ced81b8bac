"""Declares parameters; modules that hold a single one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import config, precision
from dsv3_jax.distributed import collectives, sharding
from dsv3_jax.ops import fp8_linear, linear, norm
from pallas_kernels.fp8_matmul import reference as formats


def weight(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  std: float,
) -> Array:
  """Declares an f32 matrix, normal with `std` (TR 4.2); axes are logical.

  Args:
    shape: of the whole matrix. The parameter and the result are this device's
      shard; what `ShardingRules.fsdp` shards further is gathered.
  """
  stored = sharding.storage_spec(
    shape, axes, sharding.rules(), collectives.axis_sizes()
  )
  shape = collectives.local_shape(shape, stored.spec)
  init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
  w = module.param(name, init, shape, jnp.float32)
  if not stored.axes:
    return w
  with jax.named_scope('gather_weights'):
    return jax.lax.all_gather(w, stored.axes, axis=stored.dim, tiled=True)


def matrix(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  std: float,
) -> linear.Weight:
  """Declares a weight of a linear, with its FP8 forms if the policy says so.

  Outside FP8 the weight stays f32: products cast it, so that their weight
  gradient is f32. The FP8 forms are an input, the collection 'quantized', made
  once a step and not once a micro-batch. Under `ShardingRules.fsdp` they are
  made from the gathered weight.

  Raises:
    ValueError: the variables lack the FP8 forms.
  """
  w = weight(module, name, shape, axes, std)
  if module.policy.of(name) != 'fp8':
    return w
  flat = fp8_linear.flat(w, precision.FP8_MATRICES[name])
  if sharding.rules().fsdp:
    forms = formats.quantize_weight(jax.lax.stop_gradient(flat))
    return fp8_linear.Weight(flat, *forms)
  if not module.has_variable('quantized', name):
    where = '/'.join((*module.path, name))
    raise ValueError(
      f"variables['quantized'] lacks {where}: precision is FP8, so apply with "
      "{'params': params} | model.quantize(policy, params)"
    )
  return fp8_linear.Weight(flat, *module.get_variable('quantized', name))


def norm_weight(module: nn.Module, name: str, size: int, axis: str) -> Array:
  """Declares the f32 weight of an RMSNorm, initially ones."""
  init = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
  return module.param(name, init, (size,), jnp.float32)


class RMSNorm(nn.Module):
  """RMSNorm over the model dim."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    w_D = norm_weight(self, 'norm', self.cfg.d_model, 'embed')
    return norm.rms_norm(x_BTD, w_D, self.cfg.norm_eps)


class Embedding(nn.Module):
  """The token table, shared by the main model and the MTP modules (TR 2.2)."""

  cfg: config.ModelConfig
  policy: precision.Policy

  @nn.compact
  def __call__(self, tokens_BT: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    shape = (self.cfg.vocab_size, self.cfg.d_model)
    w_VD = weight(self, 'w', shape, ('vocab', 'embed'), self.cfg.init_std)
    return w_VD[tokens_BT].astype(self.policy.compute)


class Head(nn.Module):
  """The untied output matrix, shared by the main model and MTP (TR 2.2)."""

  cfg: config.ModelConfig
  policy: precision.Policy

  @nn.compact
  def __call__(self) -> Float[Array, 'D V']:
    shape = (self.cfg.d_model, self.cfg.vocab_size)
    return matrix(self, 'w', shape, ('embed', 'vocab'), self.cfg.init_std)


class SwiGLU(nn.Module):
  """Weights of one SwiGLU of width `d_ff`."""

  cfg: config.ModelConfig
  d_ff: int
  policy: precision.Policy

  @nn.compact
  def __call__(self) -> tuple[linear.Weight, linear.Weight, linear.Weight]:
    dim, width, std = self.cfg.d_model, self.d_ff, self.cfg.init_std
    up_axes, down_axes = ('embed', 'ffn'), ('ffn', 'embed')
    return (
      matrix(self, 'w_gate', (dim, width), up_axes, std),
      matrix(self, 'w_up', (dim, width), up_axes, std),
      matrix(self, 'w_down', (width, dim), down_axes, std),
    )
