"""Functions run on a mesh of fake devices, each with its part of the arrays.

As the training step will: one shard_map, manual over all axes, the gradient
taken inside, so that a device's loss is that of its own tokens only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.distributed import sharding
from dsv3_jax.ops import experts as expert_ops

AXES = ('node', 'expert')
ONE_HOP, TWO_HOPS = (AXES,), AXES
HOPS = {'one_hop': ONE_HOP, 'two_hops': TWO_HOPS}
MESHES = ((1, 2), (2, 1), (1, 4), (2, 2), (2, 4))
TOKENS, DIM, WIDTH, EXPERTS, TOP_K, BLOCK = 48, 5, 6, 8, 3, 4
SIZES = (TOKENS, TOP_K, EXPERTS)


def over(shape, body, data=1):
  """`body` on each device of a node x expert mesh, its first dims sharded.

  data: as many groups of these devices, each with its own part of the arrays.
  """
  return on(mesh(shape, data), body)


def mesh(shape, data=1):
  """The first devices as data x node x expert."""
  sizes = dict.fromkeys(sharding.AXES, 1)
  sizes |= dict(zip(AXES, shape, strict=True), data=data)
  options = {'schedule': 'dualpipe', 'fsdp': (), 'deterministic': False}
  return sharding.make_mesh(config.ParallelConfig(**sizes, **options))


def on(mesh, body):
  """As `over`, on a mesh of devices, or an abstract one."""
  spec = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
  specs = {'in_specs': spec, 'out_specs': spec, 'check_vma': False}
  return jax.jit(jax.shard_map(body, mesh=mesh, **specs))


def value_and_grads(apply):
  """(values, ids, dy) -> (y, gradients of values) of sum(y * dy)."""

  def run(values, ids_MK, dy_MD):
    def loss(values):
      y_MD = apply(values, ids_MK)
      return jnp.sum(y_MD.astype(jnp.float32) * dy_MD), y_MD

    return jax.grad(loss, has_aux=True)(values)[::-1]

  return run


def draw(seed=0):
  """Tokens, gates and weights in f32, and the gradient of the output."""
  rng = np.random.default_rng(seed)
  up, down = (EXPERTS, DIM, WIDTH), (EXPERTS, WIDTH, DIM)
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  values = {
    'x_MD': normal(TOKENS, DIM),
    'gates_MK': jnp.float32(rng.uniform(0.1, 1.0, (TOKENS, TOP_K))),
    'experts': expert_ops.Experts(normal(*up), normal(*up), normal(*down)),
  }
  return values, normal(TOKENS, DIM)


def step(product='blocks', axes=(), transport='auto'):
  """Output and gradients of the routed product."""
  options = expert_ops.ExpertOptions(product, BLOCK, axes, transport)
  return value_and_grads(
    lambda v, ids_MK: expert_ops.expert_ffn(
      v['x_MD'], ids_MK, v['gates_MK'], v['experts'], options
    )
  )


@functools.cache
def one_device(product='blocks'):
  return jax.jit(step(product))


@functools.cache
def devices(shape, product, axes):
  return over(shape, step(product, axes))


ROUTINGS = ('random', 'all_to_one', 'empty_experts', 'uneven')


def draw_ids(routing, tokens, top_k, experts, seed=0):
  """Ids, distinct in a row, that fall in one of the ways of `ROUTINGS`."""
  rng = np.random.default_rng(seed)
  weight_E = np.ones(experts)
  if routing == 'all_to_one':  # and to its neighbours, as a row is distinct
    return np.tile(np.arange(2, 2 + top_k, dtype=np.int32), (tokens, 1))
  if routing == 'empty_experts':
    weight_E[[0, 3, experts - 1]] = 0.0
  if routing == 'uneven':
    weight_E = 0.4 ** np.arange(experts)
  choose = functools.partial(rng.choice, experts, top_k, replace=False)
  rows = [choose(p=weight_E / weight_E.sum()) for _ in range(tokens)]
  return np.array(rows, np.int32)


def error(got, want):
  """The largest difference, relative to the largest wanted."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  assert got.shape == want.shape
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


def equations(jaxpr):
  """All equations of a program, also those of inner ones."""
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values())):
      if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
        yield from equations(inner)
