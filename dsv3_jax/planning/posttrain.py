"""Post-training in numbers: one RL step, and the report's recipe.

An RL step rolls out, updates, and sends the new weights to the engines (refit):

  rollout = max(longest output * time per token, all tokens / throughput)
  update  = tokens * 4/3 / training throughput   (reference log-probabilities:
            one more forward pass, a third of a step)
  refit   = weights of a device / bandwidth of the slow tier
"""

import dataclasses

from dsv3_jax import config, precision
from dsv3_jax.planning import chips, flops, kernels, memory, serving


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlStepTime:
  """Seconds of one RL step."""

  rollout: float
  update: float
  refit: float

  @property
  def seconds(self) -> float:
    return self.rollout + self.update + self.refit


def rl_step(
  cfg: config.Config,
  chip: chips.Chip,
  *,
  devices: int,
  outputs: int,
  mean_tokens: int,
  longest: int,
  training_speed: float,
  engine_devices: int = 144,
) -> RlStepTime:
  """One step on `devices`, which first roll out and then train.

  Args:
    outputs: sampled in the step; mean_tokens and longest: their lengths.
    training_speed: tokens a second and device.
    engine_devices: over which one copy of the engine's experts is sharded.
  """
  engine_devices = min(engine_devices, devices)
  batch = max(1, outputs // devices)
  step = serving.decode(
    cfg, chip, devices=engine_devices, batch=batch, context=mean_tokens // 2
  )
  tokens = outputs * mean_tokens
  speed = devices * batch / step.seconds
  policy = precision.POLICIES[cfg.precision]
  weights = 0.0
  for part in flops.main_parts(cfg.model):
    size = part.copies * memory.compute_bytes(part, policy)
    size /= 2 if policy.fp8 else 1
    experts = part.name.endswith('experts')
    weights += size / (engine_devices if experts else 1)
  rate = chip.inter * kernels.Rates().combine
  return RlStepTime(
    rollout=max(longest * step.seconds, tokens / speed),
    update=tokens * 4 / 3 / (training_speed * devices),
    refit=weights / rate,
  )


# Not published; chosen from what the report says of its data and RL.
RECIPE = {
  'instances': 1_500_000,  # TR 5.1
  'epochs': 2,
  'tokens of an instance': 1200,  # TR table 9: outputs of 718 to 1,510
  'experts': 3,  # code, maths, general: SFT and RL each
  'instances of an expert': 200_000,
  'RL steps': 500,  # "hundreds"
  'outputs of a step': 1024,  # as in DeepSeekMath
  'longest output': 8192,
  'devices': 256,
}


def published_recipe(
  cfg: config.Config, chip: chips.Chip, training_speed: float
) -> float:
  """Device-hours of the report's post-training, with `RECIPE`.

  Args:
    training_speed: tokens a second and device.
  """
  r = RECIPE
  instances = r['instances'] * r['epochs']
  instances += r['experts'] * r['instances of an expert'] * r['epochs']
  tokens = instances * r['tokens of an instance']
  seconds = tokens / training_speed
  step = rl_step(
    cfg,
    chip,
    devices=r['devices'],
    outputs=r['outputs of a step'],
    mean_tokens=r['tokens of an instance'],
    longest=r['longest output'],
    training_speed=training_speed,
  )
  runs = r['experts'] + 1  # the experts' and the final model's
  seconds += runs * r['RL steps'] * step.seconds * r['devices']
  return seconds / 3600
