"""Where parameters, rows and latents of inference are on a mesh (TR 3.4).

Rows and pages are cut over `data`, `node` and `expert`: a rank is a device of
these, with rows, block tables and a pool of pages of its own. Experts are
spread over `node` and `expert`. `model` cuts heads and FFN width; its devices
have the same rows and the same latents. A step is one mapped program, as in
training; without a mesh it is the plain one.
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
WHOLE = Spec()
ROWS = Spec(sharding.BATCH_AXES)  # any array whose first dim is that of rows
PAGES = Spec(None, sharding.BATCH_AXES)  # [layers, pages, ...]


def make_mesh(
  *, data: int = 1, node: int = 1, expert: int = 1, model: int = 1
) -> jax.sharding.Mesh:
  """A mesh for inference.

  Raises:
    InputError: there are fewer devices.
  """
  unused = {'schedule': 'dualpipe', 'fsdp': (), 'deterministic': False}
  sizes = {'data': data, 'node': node, 'expert': expert, 'model': model}
  return sharding.make_mesh(
    config.ParallelConfig(pipe=1, context=1, **sizes, **unused)
  )


class InferenceMesh:
  """A model on a mesh, or on one device.

  params: a partition for each parameter. num_ranks: devices, or groups of them
  along `model`, with rows of their own. num_holders: likewise, with experts.
  """

  def __init__(
    self,
    cfg: config.Config,
    mesh: jax.sharding.Mesh | None,
    home: jax.sharding.Sharding | None = None,
  ):
    """Args: home: without a mesh, where all is.

    Raises:
      InputError: an axis does not divide what it cuts.
    """
    self.mesh, self._home = mesh, home
    self.sizes = dict.fromkeys(sharding.AXES, 1) if mesh is None else mesh.shape
    config_rules.check_inference(cfg.model, self.sizes)
    count = lambda axes: math.prod(self.sizes[axis] for axis in axes)
    self.num_ranks = count(sharding.BATCH_AXES)
    self.num_holders = count(sharding.EXPERT_AXES)
    self.params = model.param_specs(model.build(cfg), RULES, self.sizes)

  def place(self, tree: Any, specs: Any) -> Any:
    """Arrays where they belong; what is there stays as it is."""
    # Bound to its place even if there is no other: what steps return is, and
    # a step would be compiled once more for what is not.
    where = self._home
    if self.mesh is not None:
      where = sharding.named_shardings(specs, self.mesh)
    return jax.device_put(tree, where)

  def jit(
    self,
    function: Callable,
    in_specs: Sequence[Any],
    out_specs: Any,
    **how: Any,
  ) -> Callable:
    """`function` on every device, each with its part, compiled.

    Args:
      in_specs, out_specs: trees of partitions, or beginnings of them. how: as
        of `jax.jit`.
    """
    if self.mesh is not None:
      specs = {'in_specs': tuple(in_specs), 'out_specs': out_specs}
      function = sharding.shard_map_step(function, self.mesh, RULES, **specs)
    return jax.jit(function, **how)

  def zeros(self, make: Callable[[], Any], spec: Spec) -> Any:
    """What `make` makes of nothing, each device its part of it."""
    if self.mesh is None:
      return self.place(make(), spec)
    return jax.jit(
      make, out_shardings=sharding.named_shardings(spec, self.mesh)
    )()
