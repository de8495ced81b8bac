"""The model that speeds on a CPU are measured with."""

from dsv3_jax import config
from experiments import base


def make_config(length: int, batch: int) -> config.Config:
  """103M parameters, no MTP, no balance loss; f32.

  Args:
    length, batch: tokens of a row and rows of a training step.
  """
  source = base.get_config()
  with source.unlocked():
    source.precision = 'f32'
    net = source.model
    net.update(vocab_size=4096, d_model=512, d_ff=1536, num_layers=8)
    net.update(num_dense_layers=1, max_seq_len=1024, init_std=0.02)
    net.update(scan_layers=False, remat='none')
    net.rope.original_seq_len = 1024
    net.mla.update(num_heads=8, q_lora_rank=192, kv_lora_rank=128)
    net.mla.update(qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    net.moe.update(num_experts=32, num_groups=4, top_groups=2, top_k=4)
    net.moe.update(d_ff=256)
    net.mtp.depth = 0
    source.balance.kind = 'none'
    source.data.update(seq_len=length, tokenizer='none.json')
    source.train.update(batch_size=batch, batch_size_start=batch)
    source.train.update(microbatch_size=batch, batch_ramp_tokens=0)
    source.optim.update(moments_dtype='float32', ema_decay=0.0)
    source.eval.stride = length
  return config.from_config_dict(source)
