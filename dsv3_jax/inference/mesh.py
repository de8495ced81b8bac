"""Where parameters, rows and latents of inference are on a mesh (TR 3.4).

Rows and blocks are sharded over `data`, `node` and `expert`: a rank is a device
of these axes, with rows, block tables and a block pool of its own. Experts are
sharded over `node` and `expert`. Heads and FFN width are sharded over `model`,
whose devices have the same rows and the same latents. A step is one
shard_map'ed program, as in training; without a mesh it is the plain function.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsv3_jax import config, config_rules
from dsv3_jax.distributed import sharding
from dsv3_jax.nn import model

Spec = sharding.Spec
RULES = sharding.TENSOR_RULES
REPLICATED = Spec()
ROWS = Spec(sharding.BATCH_AXES)  # arrays whose first dim is the row
BLOCKS = Spec(None, sharding.BATCH_AXES)  # [layers, blocks, ...]


def make_mesh(
  *, data: int = 1, node: int = 1, expert: int = 1, model: int = 1
) -> jax.sharding.Mesh:
  """A mesh for inference.

  Raises:
    InputError: there are fewer devices than that.
  """
  unused = {'schedule': 'dualpipe', 'fsdp': (), 'deterministic': False}
  sizes = {'data': data, 'node': node, 'expert': expert, 'model': model}
  return sharding.make_mesh(
    config.ParallelConfig(pipe=1, context=1, **sizes, **unused)
  )


class InferenceMesh:
  """How a model lies on a mesh, or on one device.

  params: a partition spec for each parameter.
  num_ranks: of data parallelism: devices, or groups of them along `model`, that
    have rows of their own.
  num_expert_ranks: of expert parallelism: those that have experts of their own.
  """

  def __init__(
    self,
    cfg: config.Config,
    mesh: jax.sharding.Mesh | None,
    device: jax.sharding.Sharding | None = None,
  ):
    """Args: device: where all arrays are, without a mesh.

    Raises:
      InputError: an axis does not divide a dim that is sharded over it.
    """
    self.mesh, self._device = mesh, device
    self.sizes = dict.fromkeys(sharding.AXES, 1) if mesh is None else mesh.shape
    config_rules.check_inference(cfg.model, self.sizes)
    count = lambda axes: math.prod(self.sizes[axis] for axis in axes)
    self.num_ranks = count(sharding.BATCH_AXES)
    self.num_expert_ranks = count(sharding.EXPERT_AXES)
    self.params = model.param_specs(model.build(cfg), RULES, self.sizes)

  def place(self, tree: Any, specs: Any) -> Any:
    """Puts arrays where they belong; those already there are not copied."""
    # Committed even to the only device: the results of steps are, and a step
    # would be compiled once more for arrays that are not.
    shardings = self._device
    if self.mesh is not None:
      shardings = sharding.named_shardings(specs, self.mesh)
    return jax.device_put(tree, shardings)

  def jit(
    self,
    function: Callable,
    in_specs: Sequence[Any],
    out_specs: Any,
    **options: Any,
  ) -> Callable:
    """A jitted `function`; on a mesh, shard_map'ed over all devices.

    Args:
      in_specs, out_specs: trees, or prefixes of trees, of partition specs.
      options: of `jax.jit`.
    """
    if self.mesh is not None:
      specs = {'in_specs': tuple(in_specs), 'out_specs': out_specs}
      function = sharding.shard_map_step(function, self.mesh, RULES, **specs)
    return jax.jit(function, **options)

  def zeros(self, make: Callable[[], Any], spec: Spec) -> Any:
    """The arrays that `make` returns; each device makes its own part."""
    if self.mesh is None:
      return self.place(make(), spec)
    return jax.jit(
      make, out_shardings=sharding.named_shardings(spec, self.mesh)
    )()
