"""Edits of training, meshes, data and inference: rows of `mutants.Mutant`."""

_SCHEDULES = 'tests/training/test_loop_schedules.py'
_LR = 'tests/training/test_lr_schedule.py'
_STEP = 'tests/training/test_loop.py'
_OPTIMIZER = 'tests/training/test_optimizer.py'
_ALL_TO_ALL = 'tests/ops/test_all_to_all.py'
_ROUNDS = 'tests/ops/test_rounds.py'
_LAYOUTS = 'tests/parallel/test_layouts.py'
_ZERO = 'tests/parallel/test_zero.py'
_STORE = 'tests/checkpoint/test_store.py'
_SCHEDULER = 'tests/inference/test_scheduler.py'
_ADJUSTMENTS = 'tests/inference/test_adjustments.py'
_BLOCKS = 'tests/inference/test_block_pool.py'
_PUBLISHED = 'tests/checkpoint/hf/test_published.py'
_CONFIGS = 'tests/checkpoint/hf/test_published_configs.py'

TRAINING = (
  (
    'EMA updated twice a step',
    'dsv3_jax/training/loop.py',
    "run.ema.update(run.state['params'])",
    "[run.ema.update(run.state['params']) for _ in range(2)]",
    (_SCHEDULES,),
  ),
  (
    'bias rate times 10',
    'dsv3_jax/training/loop.py',
    'lr_schedule.value_at(cfg.optim.bias_rate, run.tokens)',
    '10 * lr_schedule.value_at(cfg.optim.bias_rate, run.tokens)',
    (_SCHEDULES,),
  ),
  (
    'bias rate never 0',
    'dsv3_jax/training/loop.py',
    'lr_schedule.value_at(cfg.optim.bias_rate, run.tokens)',
    'cfg.optim.bias_rate.first',
    (_SCHEDULES,),
  ),
  (
    'lambda never switches',
    'dsv3_jax/training/loop.py',
    'lr_schedule.value_at(cfg.optim.mtp_weight, run.tokens)',
    'cfg.optim.mtp_weight.first',
    (_SCHEDULES,),
  ),
  (
    'learning rate one step early',
    'dsv3_jax/training/loop.py',
    'lr_schedule.lr_at(cfg.optim.lr, run.step, run.tokens)',
    'lr_schedule.lr_at(cfg.optim.lr, run.step + 1, run.tokens)',
    (_SCHEDULES,),
  ),
  (
    'schedule switches one token late',
    'dsv3_jax/training/lr_schedule.py',
    'early = tokens < schedule.first_tokens',
    'early = tokens <= schedule.first_tokens',
    (_LR,),
  ),
  (
    'batch ramp rounds up',
    'dsv3_jax/data/batch_ramp.py',
    'grown // cfg.batch_ramp_tokens',
    '-(-grown // cfg.batch_ramp_tokens)',
    (_LR,),
  ),
  (
    'gradient always scaled to the clip norm',
    'dsv3_jax/training/step.py',
    'scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))',
    'scale = limit / jnp.maximum(norm, 1e-12)',
    (_OPTIMIZER, _STEP),
  ),
  (
    'spikes are not skipped',
    'dsv3_jax/training/step.py',
    '      ~skip & ~halted,\n',
    '      ~halted,\n',
    (_STEP,),
  ),
  (
    'a step that is not finite advances',
    'dsv3_jax/training/step.py',
    '      ~skip & ~halted,\n',
    '      ~skip,\n',
    (_STEP,),
  ),
  (
    'last micro-batch left out',
    'dsv3_jax/parallel/accumulation.py',
    'jax.lax.fori_loop(0, num_microbatches, add, zeros)',
    'jax.lax.fori_loop(1, num_microbatches, add, zeros)',
    (_STEP,),
  ),
  (
    'bias correction one step behind',
    'dsv3_jax/training/optimizer.py',
    'unbias2 = 1.0 / (1.0 - cfg.beta2 ** count.astype(jnp.float32))',
    'unbias2 = 1.0 / (1.0 - cfg.beta2 ** (count + 1).astype(jnp.float32))',
    (_OPTIMIZER,),
  ),
  (
    'norm weights decay',
    'dsv3_jax/training/optimizer.py',
    "return not path[-1].key.endswith('norm')",
    'return bool(path)',
    (_OPTIMIZER,),
  ),
  (
    'EMA weights exchanged',
    'dsv3_jax/training/ema.py',
    'part *= self._decay',
    'part *= np.float32(1.0) - self._decay',
    ('tests/training/test_ema.py',),
  ),
)

PARALLEL = (
  (
    'combine drops a part of a token',
    'dsv3_jax/ops/all_to_all.py',
    'for row_M in hop.back_Mn.T:',
    'for row_M in hop.back_Mn.T[:-1]:',
    (_ALL_TO_ALL,),
  ),
  (
    'dispatch without gradient',
    'dsv3_jax/ops/all_to_all.py',
    'return dispatch(dy_M, plan), None',
    'return 0 * dispatch(dy_M, plan), None',
    (_ALL_TO_ALL,),
  ),
  (
    'experts numbered by another device',
    'dsv3_jax/ops/all_to_all.py',
    'ids -= jax.lax.axis_index(over) * span',
    'ids -= (jax.lax.axis_size(over) - 1 - jax.lax.axis_index(over)) * span',
    (_ALL_TO_ALL,),
  ),
  (
    'rounds: a round takes a slice too many',
    'dsv3_jax/ops/rounds.py',
    'full = jnp.any(load_X + add_X > limit_X)',
    'full = jnp.any(load_X > limit_X)',
    (_ROUNDS,),
  ),
  (
    'rounds: the second is left out',
    'dsv3_jax/ops/experts.py',
    'jax.lax.while_loop(more, add, (jnp.int32(1), first))',
    'jax.lax.while_loop(more, add, (jnp.int32(2), first))',
    (_ROUNDS,),
  ),
  (
    'rounds: experts learn from the first alone',
    'dsv3_jax/ops/experts.py',
    'weights, _ = _add_rounds(end, lambda r: again(r)[2], weights)',
    'weights, _ = _add_rounds(None, lambda r: again(r)[2], weights)',
    (_ROUNDS,),
  ),
  (
    'all-to-all: rows of two sources overlap',
    'dsv3_jax/ops/all_to_all.py',
    'received_WW = jnp.cumsum(count_WW, axis=0) - count_WW',
    'received_WW = jnp.cumsum(count_WW, axis=0) - count_WW[:1]',
    (_ALL_TO_ALL,),
  ),
  (
    'ZeRO sums over fewer devices',
    'dsv3_jax/parallel/zero.py',
    'g = collectives.psum(g, reduced)',
    'g = collectives.psum(g, reduced[:-1])',
    (_ZERO, _LAYOUTS),
  ),
  (
    'gradient norm of one device',
    'dsv3_jax/parallel/zero.py',
    'sum(collectives.psum(value, axes) for axes, value in sums.items())',
    'sum(sums.values())',
    (_ZERO, _LAYOUTS),
  ),
  (
    'losses not summed over devices',
    'dsv3_jax/training/step.py',
    'parts = collectives.psum(parts, sharding.TOKEN_AXES)',
    'parts = collectives.psum(parts, ())',
    (_LAYOUTS,),
  ),
  (
    'context: pieces in the wrong order',
    'dsv3_jax/distributed/collectives.py',
    'jnp.concatenate([pieces[here], pieces[-1 - here]], axis=1)',
    'jnp.concatenate([pieces[here], pieces[here - 1]], axis=1)',
    ('tests/ops/test_context_attention.py',),
  ),
  (
    'context: mask shifted by one',
    'dsv3_jax/ops/context_attention.py',
    'index_s, segments = tile.key + jnp.arange(self.piece), None',
    'index_s, segments = tile.key - 1 + jnp.arange(self.piece), None',
    ('tests/ops/test_context_attention.py',),
  ),
  (
    'pipeline: chunks exchange their gradients',
    'dsv3_jax/parallel/pipeline/gradient_sums.py',
    'sums[stage_pass.chunk] = chunk',
    'sums[stage_pass.chunk - 1] = chunk',
    (f'{_LAYOUTS}',),
  ),
  (
    'pipeline: balance loss not summed over ranks',
    'dsv3_jax/parallel/pipeline/gradient_sums.py',
    "losses['balance'] = jax.lax.psum(state['balance'], stage_params.AXIS)",
    "losses['balance'] = state['balance']",
    (_LAYOUTS,),
  ),
  (
    'pipeline: a transfer goes to the wrong rank',
    'dsv3_jax/parallel/pipeline/exchange.py',
    '(rank, (rank + transfer.hop) % ranks)',
    '(rank, (rank - transfer.hop) % ranks)',
    (_LAYOUTS,),
  ),
  (
    'pipeline: MTP embeddings without gradient',
    'dsv3_jax/parallel/pipeline/vocab_parallel.py',
    'pairs.append((last, home[-1], tokens_BT, dx_BTD))',
    'pairs.append((last, home[-1], tokens_BT, 0 * dx_BTD))',
    (_LAYOUTS,),
  ),
  (
    'deterministic: devices summed in their order',
    'dsv3_jax/parallel/deterministic.py',
    'return _tree_sum(jax.lax.all_gather(x, axes)) if axes else x',
    'return jax.lax.psum(x, axes) if axes else x',
    ('tests/parallel/test_deterministic.py',),
  ),
)

SYSTEM = (
  (
    'import: a scale of 0 for any block',
    'dsv3_jax/checkpoint/hf/reader.py',
    '(scales[i] == 0) & ~filled] = 1.0',
    '(scales[i] == 0)] = 1.0',
    (_PUBLISHED + '::test_a_scale_of_0_is_that_of_a_block_of_zeros',),
  ),
  (
    "import: another default of YaRN's mscale_all_dim",
    'dsv3_jax/checkpoint/hf/rope_config.py',
    "'mscale_all_dim': 0.0",
    "'mscale_all_dim': 1.0",
    (_CONFIGS + '::test_yarn_of_two_numbers_has_the_defaults_of_others',),
  ),
  (
    'store: a flipped byte is not seen',
    'dsv3_jax/checkpoint/store.py',
    "      return name, 'does not match its sha256'",
    '      pass',
    (_STORE,),
  ),
  (
    'store: keeps one step fewer',
    'dsv3_jax/checkpoint/store.py',
    'for old in self.steps()[: -self._keep]:',
    'for old in self.steps()[: 1 - self._keep or None]:',
    (_STORE,),
  ),
  (
    'resume: the loader begins anew',
    'dsv3_jax/training/run_data.py',
    "      feed.set_state(extras['loader'])\n",
    '      pass\n',
    ('tests/training/test_resume.py',),
  ),
  (
    'data: the prompt is learned, not the answer',
    'dsv3_jax/data/packing.py',
    "return {'tokens': tokens, 'learned': learned.astype(np.int32)}",
    "return {'tokens': tokens, 'learned': 1 - learned.astype(np.int32)}",
    ('tests/data/test_packing.py', 'tests/data/test_loader.py'),
  ),
  (
    'prefix cache matches the last token',
    'dsv3_jax/inference/block_pool.py',
    'end = (len(tokens) - 1) // self.block_size * self.block_size',
    'end = len(tokens) // self.block_size * self.block_size',
    (_BLOCKS,),
  ),
  (
    'prefix cache ignores what came before',
    'dsv3_jax/inference/block_pool.py',
    'key = (table.last_node, tuple(',
    'key = (_ROOT, tuple(',
    (_BLOCKS,),
  ),
  (
    'shared blocks are written',
    'dsv3_jax/inference/block_pool.py',
    'return self._ref_counts[block] > 1 or block in self._keys',
    'return block in self._keys',
    (_BLOCKS, _SCHEDULER),
  ),
  (
    'the oldest request is preempted',
    'dsv3_jax/inference/scheduler.py',
    'self._preempt(running[-1])',
    'self._preempt(running[0])',
    (_SCHEDULER,),
  ),
  (
    'one token too many is committed',
    'dsv3_jax/inference/scheduler.py',
    'tokens = request.all_tokens[: table.length + count]',
    'tokens = request.all_tokens[: table.length + count + 1]',
    (_SCHEDULER,),
  ),
  (
    'nucleus without the token that crosses top_p',
    'dsv3_jax/inference/sampling.py',
    'before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV',
    'before_BV = jnp.cumsum(sorted_BV, axis=-1)',
    ('tests/inference/test_sampling_nucleus.py',),
  ),
  (
    'penalties count the prompt as generated',
    'dsv3_jax/inference/sampling.py',
    'is_new_BS = index_S >= column(adjustments.prompt_length_B)',
    'is_new_BS = index_S >= 0 * column(adjustments.prompt_length_B)',
    (_ADJUSTMENTS,),
  ),
  (
    'penalties count tokens that are not verified yet',
    'dsv3_jax/inference/forward.py',
    'sampling.RowTokens(repeat(tokens_BS), place_M + 1)',
    'sampling.RowTokens(repeat(tokens_BS), place_M + width)',
    (_ADJUSTMENTS,),
  ),
  (
    'constrained requests are speculated',
    'dsv3_jax/inference/scheduler.py',
    'if request.matcher is not None:',
    'if False:',
    (_ADJUSTMENTS,),
  ),
  (
    'a matcher does not go back after a preemption',
    'dsv3_jax/inference/matcher.py',
    'self._state.reset()',
    'pass',
    ('tests/inference/test_grammar.py',),
  ),
)
