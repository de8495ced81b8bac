"""Edits of the maths and the model: rows of `mutants.Mutant`."""

_ROUTING = 'tests/ops/test_routing.py'
_LOSSES = 'tests/ops/test_losses.py'
_ATTENTION = 'tests/ops/test_mla.py'
_EXPERTS = 'tests/ops/test_experts.py'
_FP8 = 'tests/ops/test_fp8_linear.py'
_MODEL = 'tests/nn/test_model_oracle.py'
_CAUSALITY = 'tests/nn/test_model_causality.py'

MODEL = (
  (
    'query latents normed with the other eps',
    'dsv3_jax/nn/attention.py',
    'q_norm, self.cfg.latent_norm_eps',
    'q_norm, self.cfg.norm_eps',
    (_MODEL,),
  ),
  (
    'key-value latents normed with the other eps',
    'dsv3_jax/nn/attention.py',
    '*tables, cfg.latent_norm_eps',
    '*tables, cfg.norm_eps',
    (_MODEL,),
  ),
  (
    'bias moves the wrong way',
    'dsv3_jax/ops/routing.py',
    'return bias_E + rate * jnp.sign(',
    'return bias_E - rate * jnp.sign(',
    (_ROUTING,),
  ),
  (
    'gates from biased scores',
    'dsv3_jax/ops/routing.py',
    'gates_MK = jnp.take_along_axis(scores_ME, ids_MK, axis=-1)',
    'gates_MK = jnp.take_along_axis(scores_ME + bias_E, ids_MK, axis=-1)',
    (_ROUTING,),
  ),
  (
    'groups scored by their best expert',
    'dsv3_jax/ops/routing.py',
    "best = 2 if cfg.score_func == 'sigmoid' else 1",
    'best = 1',
    (_ROUTING,),
  ),
  (
    'balance loss times 1.05',
    'dsv3_jax/ops/balance_loss.py',
    'return cfg.alpha * mean /',
    'return 1.05 * cfg.alpha * mean /',
    (_LOSSES,),
  ),
  (
    'balance loss without gradient',
    'dsv3_jax/ops/balance_loss.py',
    'mean = jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))',
    'mean = jnp.mean(jnp.sum(f_BE * jax.lax.stop_gradient(p_BE), axis=-1))',
    (_LOSSES,),
  ),
  (
    'MTP targets shifted by one more',
    'dsv3_jax/ops/mtp_loss.py',
    'shifted = x_BT[:, depth:]\n',
    'shifted = x_BT[:, depth + 1 :]\n'
    '  shifted = jnp.pad(shifted, ((0, 0), (0, 1)))\n',
    (_LOSSES,),
  ),
  (
    'MTP looks across isolated samples',
    'dsv3_jax/ops/mtp_loss.py',
    'shifted_BT = jnp.where(same, shifted_BT, 0.0)',
    'shifted_BT = jnp.where(same, shifted_BT, shifted_BT)',
    (_LOSSES,),
  ),
  (
    'MTP divided by sequences times T',
    'dsv3_jax/ops/mtp_loss.py',
    'mtp = [main] * cfg.depth',
    'mtp = [inverse(sequences * length)] * cfg.depth',
    (_LOSSES, _MODEL),
  ),
  (
    'hidden state first in the MTP projection',
    'dsv3_jax/nn/mtp.py',
    'merged = jnp.concatenate(pair, axis=-1)',
    'merged = jnp.concatenate(pair[::-1], axis=-1)',
    (_MODEL,),
  ),
  (
    'positions without MTP target are routed as valid',
    'dsv3_jax/nn/mtp.py',
    'valid_BS = mtp_loss.mtp_shift(context.valid_BS, k)',
    'valid_BS = context.valid_BS',
    (_MODEL,),
  ),
  (
    "head's gradient times 1.05",
    'dsv3_jax/ops/cross_entropy.py',
    'dlogits = (p - hot) * weights_Bt[..., None]',
    'dlogits = 1.05 * (p - hot) * weights_Bt[..., None]',
    (_LOSSES,),
  ),
  (
    'causal mask shifted by one',
    'pallas_kernels/mla_attention/xla.py',
    'mask_BTS = (index_S <= index_T1)[None]',
    'mask_BTS = (index_S - 1 <= index_T1)[None]',
    (_ATTENTION, _CAUSALITY),
  ),
  (
    'samples see each other',
    'pallas_kernels/mla_attention/xla.py',
    '(query_BT[:, :, None] == key_BS[:, None])',
    '(query_BT[:, :, None] == query_BT[:, :, None])',
    (_ATTENTION, _CAUSALITY),
  ),
  (
    'softmax gradient without its mean',
    'pallas_kernels/mla_attention/xla.py',
    'ds_BNTS = p_BNTS * (dp_BNTS - delta_BNT[..., None]) * scale',
    'ds_BNTS = p_BNTS * dp_BNTS * scale',
    (_ATTENTION,),
  ),
  (
    'rotary key without gradient from all heads but one',
    'pallas_kernels/mla_attention/xla.py',
    'dk_rope_BSR = jnp.sum(dk_BSNX[..., width:], axis=2)',
    'dk_rope_BSR = dk_BSNX[:, :, 0, width:]',
    (_ATTENTION,),
  ),
  (
    'RoPE turns backwards',
    'dsv3_jax/ops/rope.py',
    '[even * cos_BTr - odd * sin_BTr, even * sin_BTr + odd * cos_BTr]',
    '[even * cos_BTr + odd * sin_BTr, odd * cos_BTr - even * sin_BTr]',
    ('tests/ops/test_rope.py',),
  ),
  (
    'RoPE angles of 32 bits',
    'dsv3_jax/ops/rope.py',
    'positions_BT1 * high_r + ((positions_BT1 * low_r) >> 12)',
    'positions_BT1 * high_r',
    ('tests/ops/test_rope.py',),
  ),
  (
    "YaRN's softmax scale not squared",
    'dsv3_jax/ops/rope.py',
    'scale *= _mscale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2',
    'scale *= _mscale(cfg.rope.factor, cfg.rope.mscale_all_dim)',
    ('tests/ops/test_rope.py',),
  ),
  (
    'the rotary key is not rotated',
    'dsv3_jax/ops/mla.py',
    'return Latents(c_BTC, rope.rotate(y_BTY[..., width:], cos_BTr, sin_BTr))',
    'return Latents(c_BTC, y_BTY[..., width:])',
    (_ATTENTION,),
  ),
  (
    'routing gates without gradient',
    'dsv3_jax/ops/expert_products.py',
    'return dx_MD, dgates_MK.astype(gates_MK.dtype), grads, None',
    'return dx_MD, 0 * dgates_MK.astype(gates_MK.dtype), grads, None',
    (_EXPERTS,),
  ),
  (
    "gradient of an expert's w_up at the wrong input",
    'dsv3_jax/ops/expert_products.py',
    'dup = dhidden * silu',
    'dup = dhidden * sigmoid',
    (_EXPERTS,),
  ),
)

FP8 = (
  (
    'FP8 gates times 0.94',
    'dsv3_jax/ops/fp8_linear.py',
    'dscale_M = jnp.sum(dhidden_MF * silu_MF * up_MF, axis=-1)',
    'dscale_M = 0.94 * jnp.sum(dhidden_MF * silu_MF * up_MF, axis=-1)',
    (_FP8,),
  ),
  (
    "FP8 SwiGLU's derivative with a wrong sign",
    'dsv3_jax/ops/fp8_linear.py',
    'dgate_MF *= sigmoid_MF * (1.0 + gate_MF * (1.0 - sigmoid_MF))',
    'dgate_MF *= sigmoid_MF * (1.0 - gate_MF * (1.0 - sigmoid_MF))',
    (_FP8,),
  ),
  (
    'FP8 block-wise Dgrad is the plain one',
    'dsv3_jax/ops/fp8_linear.py',
    '  if policy.block_dgrad:\n',
    '  if policy.block_dgrad and not policy.fp8:\n',
    (_FP8,),
  ),
  (
    'FP8 weight gradient with scales of the other kind',
    'dsv3_jax/ops/fp8_linear.py',
    'products.weight(transposed(saved, policy, pow2=pow2), columns)',
    'products.weight(transposed(saved, policy, pow2=not pow2), columns)',
    (_FP8,),
  ),
)
