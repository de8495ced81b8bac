"""Small wrong edits of the source, each of which some test must notice.

`before` stands once in the file. `tests` are run in this order until one fails;
they are the fastest ones whose business the edit is.
"""

from typing import NamedTuple

_SCHEDULES = 'tests/training/test_loop_schedules.py'
_LR = 'tests/training/test_lr_schedule.py'
_STEP = 'tests/training/test_loop.py'
_OPTIMIZER = 'tests/training/test_optimizer.py'
_ROUTING = 'tests/ops/test_routing.py'
_LOSSES = 'tests/ops/test_losses.py'
_ATTENTION = 'tests/ops/test_mla.py'
_EXPERTS = 'tests/ops/test_experts.py'
_ALL_TO_ALL = 'tests/ops/test_all_to_all.py'
_FP8 = 'tests/ops/test_fp8_linear.py'
_MODEL = 'tests/nn/test_model_oracle.py'
_CAUSALITY = 'tests/nn/test_model_causality.py'
_LAYOUTS = 'tests/parallel/test_layouts.py'
_ZERO = 'tests/parallel/test_zero.py'
_STORE = 'tests/checkpoint/test_store.py'
_SCHEDULER = 'tests/inference/test_scheduler.py'
_BLOCKS = 'tests/inference/test_block_pool.py'


class Mutant(NamedTuple):
  """One edit: `before` of the file `path` becomes `after`."""

  name: str
  path: str
  before: str
  after: str
  tests: tuple[str, ...]


TRAINING = (
  Mutant(
    'EMA updated twice a step',
    'dsv3_jax/training/loop.py',
    "run.ema.update(run.state['params'])",
    "[run.ema.update(run.state['params']) for _ in range(2)]",
    (_SCHEDULES,),
  ),
  Mutant(
    'bias rate times 10',
    'dsv3_jax/training/loop.py',
    'lr_schedule.value_at(cfg.optim.bias_rate, run.tokens)',
    '10 * lr_schedule.value_at(cfg.optim.bias_rate, run.tokens)',
    (_SCHEDULES,),
  ),
  Mutant(
    'bias rate never 0',
    'dsv3_jax/training/loop.py',
    'lr_schedule.value_at(cfg.optim.bias_rate, run.tokens)',
    'cfg.optim.bias_rate.first',
    (_SCHEDULES,),
  ),
  Mutant(
    'lambda never switches',
    'dsv3_jax/training/loop.py',
    'lr_schedule.value_at(cfg.optim.mtp_weight, run.tokens)',
    'cfg.optim.mtp_weight.first',
    (_SCHEDULES,),
  ),
  Mutant(
    'learning rate one step early',
    'dsv3_jax/training/loop.py',
    'lr_schedule.lr_at(cfg.optim.lr, run.step, run.tokens)',
    'lr_schedule.lr_at(cfg.optim.lr, run.step + 1, run.tokens)',
    (_SCHEDULES,),
  ),
  Mutant(
    'schedule switches one token late',
    'dsv3_jax/training/lr_schedule.py',
    'early = tokens < schedule.first_tokens',
    'early = tokens <= schedule.first_tokens',
    (_LR,),
  ),
  Mutant(
    'batch ramp rounds up',
    'dsv3_jax/data/batch_ramp.py',
    'grown // cfg.batch_ramp_tokens',
    '-(-grown // cfg.batch_ramp_tokens)',
    (_LR,),
  ),
  Mutant(
    'gradient always scaled to the clip norm',
    'dsv3_jax/training/step.py',
    'scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))',
    'scale = limit / jnp.maximum(norm, 1e-12)',
    (_OPTIMIZER, _STEP),
  ),
  Mutant(
    'spikes are not skipped',
    'dsv3_jax/training/step.py',
    '      ~skip & ~halted,\n',
    '      ~halted,\n',
    (_STEP,),
  ),
  Mutant(
    'a step that is not finite advances',
    'dsv3_jax/training/step.py',
    '      ~skip & ~halted,\n',
    '      ~skip,\n',
    (_STEP,),
  ),
  Mutant(
    'last micro-batch left out',
    'dsv3_jax/parallel/accumulation.py',
    'jax.lax.fori_loop(0, num_microbatches, add, zeros)',
    'jax.lax.fori_loop(1, num_microbatches, add, zeros)',
    (_STEP,),
  ),
  Mutant(
    'bias correction one step behind',
    'dsv3_jax/training/optimizer.py',
    'unbias2 = 1.0 / (1.0 - cfg.beta2 ** count.astype(jnp.float32))',
    'unbias2 = 1.0 / (1.0 - cfg.beta2 ** (count + 1).astype(jnp.float32))',
    (_OPTIMIZER,),
  ),
  Mutant(
    'norm weights decay',
    'dsv3_jax/training/optimizer.py',
    "return not path[-1].key.endswith('norm')",
    'return bool(path)',
    (_OPTIMIZER,),
  ),
  Mutant(
    'EMA weights exchanged',
    'dsv3_jax/training/ema.py',
    'part *= self._decay',
    'part *= np.float32(1.0) - self._decay',
    ('tests/training/test_ema.py',),
  ),
)

MODEL = (
  Mutant(
    'bias moves the wrong way',
    'dsv3_jax/ops/routing.py',
    'return bias_E + rate * jnp.sign(',
    'return bias_E - rate * jnp.sign(',
    (_ROUTING,),
  ),
  Mutant(
    'gates from biased scores',
    'dsv3_jax/ops/routing.py',
    'gates_MK = jnp.take_along_axis(scores_ME, ids_MK, axis=-1)',
    'gates_MK = jnp.take_along_axis(scores_ME + bias_E, ids_MK, axis=-1)',
    (_ROUTING,),
  ),
  Mutant(
    'groups scored by their best expert',
    'dsv3_jax/ops/routing.py',
    "best = 2 if cfg.score_func == 'sigmoid' else 1",
    'best = 1',
    (_ROUTING,),
  ),
  Mutant(
    'balance loss times 1.05',
    'dsv3_jax/ops/balance_loss.py',
    'return cfg.alpha * mean /',
    'return 1.05 * cfg.alpha * mean /',
    (_LOSSES,),
  ),
  Mutant(
    'balance loss without gradient',
    'dsv3_jax/ops/balance_loss.py',
    'mean = jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))',
    'mean = jnp.mean(jnp.sum(f_BE * jax.lax.stop_gradient(p_BE), axis=-1))',
    (_LOSSES,),
  ),
  Mutant(
    'MTP targets shifted by one more',
    'dsv3_jax/ops/mtp_loss.py',
    'shifted = x_BT[:, depth:]\n',
    'shifted = x_BT[:, depth + 1 :]\n'
    '  shifted = jnp.pad(shifted, ((0, 0), (0, 1)))\n',
    (_LOSSES,),
  ),
  Mutant(
    'MTP looks across isolated samples',
    'dsv3_jax/ops/mtp_loss.py',
    'shifted_BT = jnp.where(same, shifted_BT, 0.0)',
    'shifted_BT = jnp.where(same, shifted_BT, shifted_BT)',
    (_LOSSES,),
  ),
  Mutant(
    'MTP divided by sequences times T',
    'dsv3_jax/ops/mtp_loss.py',
    'mtp = [main] * cfg.depth',
    'mtp = [inverse(sequences * length)] * cfg.depth',
    (_LOSSES, _MODEL),
  ),
  Mutant(
    'hidden state first in the MTP projection',
    'dsv3_jax/nn/mtp.py',
    'merged = jnp.concatenate(pair, axis=-1)',
    'merged = jnp.concatenate(pair[::-1], axis=-1)',
    (_MODEL,),
  ),
  Mutant(
    'positions without MTP target are routed as valid',
    'dsv3_jax/nn/mtp.py',
    'valid_BS = mtp_loss.mtp_shift(context.valid_BS, k)',
    'valid_BS = context.valid_BS',
    (_MODEL,),
  ),
  Mutant(
    "head's gradient times 1.05",
    'dsv3_jax/ops/cross_entropy.py',
    'dlogits = (p - hot) * weights_Bt[..., None]',
    'dlogits = 1.05 * (p - hot) * weights_Bt[..., None]',
    (_LOSSES,),
  ),
  Mutant(
    'causal mask shifted by one',
    'pallas_kernels/mla_attention/xla.py',
    'mask_BTS = (index_S <= index_T1)[None]',
    'mask_BTS = (index_S - 1 <= index_T1)[None]',
    (_ATTENTION, _CAUSALITY),
  ),
  Mutant(
    'samples see each other',
    'pallas_kernels/mla_attention/xla.py',
    '(query_BT[:, :, None] == key_BS[:, None])',
    '(query_BT[:, :, None] == query_BT[:, :, None])',
    (_ATTENTION, _CAUSALITY),
  ),
  Mutant(
    'softmax gradient without its mean',
    'pallas_kernels/mla_attention/xla.py',
    'ds_BNTS = p_BNTS * (dp_BNTS - delta_BNT[..., None]) * scale',
    'ds_BNTS = p_BNTS * dp_BNTS * scale',
    (_ATTENTION,),
  ),
  Mutant(
    'rotary key without gradient from all heads but one',
    'pallas_kernels/mla_attention/xla.py',
    'dk_rope_BSR = jnp.sum(dk_BSNX[..., width:], axis=2)',
    'dk_rope_BSR = dk_BSNX[:, :, 0, width:]',
    (_ATTENTION,),
  ),
  Mutant(
    'RoPE turns backwards',
    'dsv3_jax/ops/rope.py',
    '[even * cos_BTr - odd * sin_BTr, even * sin_BTr + odd * cos_BTr]',
    '[even * cos_BTr + odd * sin_BTr, odd * cos_BTr - even * sin_BTr]',
    ('tests/ops/test_rope.py',),
  ),
  Mutant(
    'RoPE angles of 32 bits',
    'dsv3_jax/ops/rope.py',
    'positions_BT1 * high_r + ((positions_BT1 * low_r) >> 12)',
    'positions_BT1 * high_r',
    ('tests/ops/test_rope.py',),
  ),
  Mutant(
    "YaRN's softmax scale not squared",
    'dsv3_jax/ops/rope.py',
    'scale *= _mscale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2',
    'scale *= _mscale(cfg.rope.factor, cfg.rope.mscale_all_dim)',
    ('tests/ops/test_rope.py',),
  ),
  Mutant(
    'the rotary key is not rotated',
    'dsv3_jax/ops/mla.py',
    'return Latents(c_BTC, rope.rotate(y_BTY[..., width:], cos_BTr, sin_BTr))',
    'return Latents(c_BTC, y_BTY[..., width:])',
    (_ATTENTION,),
  ),
  Mutant(
    'routing gates without gradient',
    'dsv3_jax/ops/expert_products.py',
    'return dx_MD, dgates_MK.astype(gates_MK.dtype), grads, None',
    'return dx_MD, 0 * dgates_MK.astype(gates_MK.dtype), grads, None',
    (_EXPERTS,),
  ),
  Mutant(
    "gradient of an expert's w_up at the wrong input",
    'dsv3_jax/ops/expert_products.py',
    'dup = dhidden * silu',
    'dup = dhidden * sigmoid',
    (_EXPERTS,),
  ),
)

FP8 = (
  Mutant(
    'FP8 gates times 0.94',
    'dsv3_jax/ops/fp8_linear.py',
    'dscale_M = jnp.sum(dhidden_MF * silu_MF * up_MF, axis=-1)',
    'dscale_M = 0.94 * jnp.sum(dhidden_MF * silu_MF * up_MF, axis=-1)',
    (_FP8,),
  ),
  Mutant(
    "FP8 SwiGLU's derivative with a wrong sign",
    'dsv3_jax/ops/fp8_linear.py',
    'dgate_MF *= sigmoid_MF * (1.0 + gate_MF * (1.0 - sigmoid_MF))',
    'dgate_MF *= sigmoid_MF * (1.0 - gate_MF * (1.0 - sigmoid_MF))',
    (_FP8,),
  ),
  Mutant(
    'FP8 block-wise Dgrad is the plain one',
    'dsv3_jax/ops/fp8_linear.py',
    '  if policy.block_dgrad:\n',
    '  if policy.block_dgrad and not policy.fp8:\n',
    (_FP8,),
  ),
  Mutant(
    'FP8 weight gradient with scales of the other kind',
    'dsv3_jax/ops/fp8_linear.py',
    'products.weight(transposed(saved, policy, pow2=pow2), columns)',
    'products.weight(transposed(saved, policy, pow2=not pow2), columns)',
    (_FP8,),
  ),
)

PARALLEL = (
  Mutant(
    'combine drops a part of a token',
    'dsv3_jax/ops/all_to_all.py',
    'for row_M in hop.back_Mn.T:',
    'for row_M in hop.back_Mn.T[:-1]:',
    (_ALL_TO_ALL,),
  ),
  Mutant(
    'dispatch without gradient',
    'dsv3_jax/ops/all_to_all.py',
    'return dispatch(dy_M, plan), None',
    'return 0 * dispatch(dy_M, plan), None',
    (_ALL_TO_ALL,),
  ),
  Mutant(
    'experts numbered by another device',
    'dsv3_jax/ops/all_to_all.py',
    'ids -= jax.lax.axis_index(over) * span',
    'ids -= (jax.lax.axis_size(over) - 1 - jax.lax.axis_index(over)) * span',
    (_ALL_TO_ALL,),
  ),
  Mutant(
    'ZeRO sums over fewer devices',
    'dsv3_jax/parallel/zero.py',
    'g = collectives.psum(g, reduced)',
    'g = collectives.psum(g, reduced[:-1])',
    (_ZERO, _LAYOUTS),
  ),
  Mutant(
    'gradient norm of one device',
    'dsv3_jax/parallel/zero.py',
    'sum(collectives.psum(value, axes) for axes, value in sums.items())',
    'sum(sums.values())',
    (_ZERO, _LAYOUTS),
  ),
  Mutant(
    'losses not summed over devices',
    'dsv3_jax/training/step.py',
    'parts = collectives.psum(parts, sharding.TOKEN_AXES)',
    'parts = collectives.psum(parts, ())',
    (_LAYOUTS,),
  ),
  Mutant(
    'context: pieces in the wrong order',
    'dsv3_jax/distributed/collectives.py',
    'jnp.concatenate([pieces[here], pieces[-1 - here]], axis=1)',
    'jnp.concatenate([pieces[here], pieces[here - 1]], axis=1)',
    ('tests/ops/test_context_attention.py',),
  ),
  Mutant(
    'context: mask shifted by one',
    'dsv3_jax/ops/context_attention.py',
    'index_s, segments = tile.key + jnp.arange(self.piece), None',
    'index_s, segments = tile.key - 1 + jnp.arange(self.piece), None',
    ('tests/ops/test_context_attention.py',),
  ),
  Mutant(
    'pipeline: chunks exchange their gradients',
    'dsv3_jax/parallel/pipeline/gradient_sums.py',
    'sums[stage_pass.chunk] = chunk',
    'sums[stage_pass.chunk - 1] = chunk',
    (f'{_LAYOUTS}',),
  ),
  Mutant(
    'pipeline: balance loss not summed over ranks',
    'dsv3_jax/parallel/pipeline/gradient_sums.py',
    "losses['balance'] = jax.lax.psum(state['balance'], stage_params.AXIS)",
    "losses['balance'] = state['balance']",
    (_LAYOUTS,),
  ),
  Mutant(
    'pipeline: a transfer goes to the wrong rank',
    'dsv3_jax/parallel/pipeline/exchange.py',
    '(rank, (rank + transfer.hop) % ranks)',
    '(rank, (rank - transfer.hop) % ranks)',
    (_LAYOUTS,),
  ),
  Mutant(
    'pipeline: MTP embeddings without gradient',
    'dsv3_jax/parallel/pipeline/vocab_parallel.py',
    'pairs.append((last, home[-1], tokens_BT, dx_BTD))',
    'pairs.append((last, home[-1], tokens_BT, 0 * dx_BTD))',
    (_LAYOUTS,),
  ),
  Mutant(
    'deterministic: devices summed in their order',
    'dsv3_jax/parallel/deterministic.py',
    'return _tree_sum(jax.lax.all_gather(x, axes)) if axes else x',
    'return jax.lax.psum(x, axes) if axes else x',
    ('tests/parallel/test_deterministic.py',),
  ),
)

SYSTEM = (
  Mutant(
    'store: a flipped byte is not seen',
    'dsv3_jax/checkpoint/store.py',
    "      return name, 'does not match its sha256'",
    '      pass',
    (_STORE,),
  ),
  Mutant(
    'store: keeps one step fewer',
    'dsv3_jax/checkpoint/store.py',
    'for old in self.steps()[: -self._keep]:',
    'for old in self.steps()[: 1 - self._keep or None]:',
    (_STORE,),
  ),
  Mutant(
    'resume: the loader begins anew',
    'dsv3_jax/training/loop.py',
    "    loader.set_state(extras['loader'])\n",
    '',
    ('tests/training/test_resume.py',),
  ),
  Mutant(
    'data: the prompt is learned, not the answer',
    'dsv3_jax/data/packing.py',
    "return {'tokens': tokens, 'learned': learned.astype(np.int32)}",
    "return {'tokens': tokens, 'learned': 1 - learned.astype(np.int32)}",
    ('tests/data/test_packing.py', 'tests/data/test_loader.py'),
  ),
  Mutant(
    'prefix cache matches the last token',
    'dsv3_jax/inference/block_pool.py',
    'end = (len(tokens) - 1) // self.block_size * self.block_size',
    'end = len(tokens) // self.block_size * self.block_size',
    (_BLOCKS,),
  ),
  Mutant(
    'prefix cache ignores what came before',
    'dsv3_jax/inference/block_pool.py',
    'key = (table.last_node, tuple(',
    'key = (_ROOT, tuple(',
    (_BLOCKS,),
  ),
  Mutant(
    'shared blocks are written',
    'dsv3_jax/inference/block_pool.py',
    'return self._ref_counts[block] > 1 or block in self._keys',
    'return block in self._keys',
    (_BLOCKS, _SCHEDULER),
  ),
  Mutant(
    'the oldest request is preempted',
    'dsv3_jax/inference/scheduler.py',
    'self._preempt(running[-1])',
    'self._preempt(running[0])',
    (_SCHEDULER,),
  ),
  Mutant(
    'one token too many is committed',
    'dsv3_jax/inference/scheduler.py',
    'tokens = request.all_tokens[: table.length + count]',
    'tokens = request.all_tokens[: table.length + count + 1]',
    (_SCHEDULER,),
  ),
  Mutant(
    'nucleus without the token that crosses top_p',
    'dsv3_jax/inference/sampling.py',
    'before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV',
    'before_BV = jnp.cumsum(sorted_BV, axis=-1)',
    ('tests/inference/test_sampling_nucleus.py',),
  ),
)

ALL = TRAINING + MODEL + FP8 + PARALLEL + SYSTEM
