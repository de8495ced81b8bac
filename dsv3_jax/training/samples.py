"""Continuations of `sample.prompts`, written at the end of a training run."""

from typing import Any

import jax

from dsv3_jax import config, errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.distributed import processes, sharding
from dsv3_jax.inference import generate, model_runner

RULE = '\n' + '-' * 72 + '\n'


def check(cfg: config.Config, tokenizer: tokenizers.Tokenizer) -> None:
  """Checks that the prompts can be continued.

  Raises:
    InputError: a prompt is too long for the model.
  """
  if not cfg.sample.prompts:
    return
  prompts, count = _prompts(cfg, tokenizer), cfg.sample.max_new_tokens
  try:
    generate.check_prompts(cfg.model, prompts, count)
  except errors.InputError as error:
    raise errors.InputError(f'sample.prompts: {error}') from error


def make(
  cfg: config.Config, state: dict, tokenizer: tokenizers.Tokenizer
) -> str:
  """Continues all prompts, on the first device of the first process.

  Args:
    state: in the model's form. All processes must call this, as sharded arrays
      are gathered. All but the first then get ''.
  """
  params, router_biases = _on_first_device((state['params'], state['router']))
  if processes.index():
    return ''
  output = generate.generate(
    model_runner.ModelRunner(cfg, params, router_biases),
    _prompts(cfg, tokenizer),
    cfg.sample.max_new_tokens,
    temperature=cfg.sample.temperature,
    top_p=cfg.sample.top_p,
    seed=cfg.seed,
    stop_id=tokenizer.eos_id,
  )
  return RULE.join(
    prompt + tokenizer.decode(row, skip_special=True)
    for prompt, row in zip(cfg.sample.prompts, output.tokens, strict=True)
  )


def _prompts(
  cfg: config.Config, tokenizer: tokenizers.Tokenizer
) -> list[list[int]]:
  encode = lambda prompt: tokenizer.encode(prompt, add_bos=True)
  return [encode(prompt).tolist() for prompt in cfg.sample.prompts]


def _on_first_device(tree: Any) -> Any:
  """Gathers arrays there, one by one: each is replicated for a moment."""
  device = jax.local_devices()[0]

  def move(x):
    if not x.is_fully_addressable:
      replicated = jax.sharding.NamedSharding(x.sharding.mesh, sharding.Spec())
      gather = jax.jit(lambda x: x, out_shardings=replicated)
      x = processes.compile_then_barrier(gather)(x).addressable_data(0)
    if processes.index():
      return None
    return jax.block_until_ready(jax.device_put(x, device))

  return jax.tree.map(move, tree)
