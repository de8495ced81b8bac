"""All defaults: the recipe of DeepSeek-V3 671B.

Section numbers are those of the technical report (TR, arXiv 2412.19437). NP
(not published) marks values that the report does not give and we chose. Other
experiments start from this one and change some values.
"""

from ml_collections import config_dict


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the locked base; `arg` is one of `''` and `'runlocal'`."""
  config = config_dict.ConfigDict()
  config.seed = 0  # of initialisation, shuffling, FIM and sampling
  config.precision = 'fp8'  # TR 3.3; 'bf16', 'f32', 'fp8_block_dgrad' (App. B)
  config.model = _model()
  config.balance = _balance()
  config.data = _data()
  config.optim = _optim()
  config.train = _train()
  config.parallel = {  # devices along each axis, TR 3.2
    'pipe': 1,
    'data': 1,
    'context': 1,
    'node': 1,  # experts are sharded over node x expert, groups over nodes
    'expert': 1,
    'model': 1,
    # 'gpipe', '1f1b', 'interleaved', 'zb1p', 'dualpipe' or 'dualpipev'
    'schedule': 'dualpipe',
    # Axes that matrices are sharded over and all-gathered from layer by layer:
    # of 'data', 'context', 'node', 'expert'.
    'fsdp': (),
    # Same bits for any sizes of data, node and expert; slower.
    'deterministic': False,
  }
  config.checkpoint = {
    'every_steps': 1000,
    'keep': 3,  # number of newest steps to keep
    'restore_step': -1,  # -1: the newest; else exactly this step
    'init_from': '',  # workdir; a new run starts from its newest weights
  }
  config.eval = {
    'every_steps': 1000,  # 0: only at the end
    'max_bytes': 2_000_000,  # of held-out text, whole documents
    'batch_size': 32,  # windows
    'stride': 2048,  # tokens newly scored by each window
    'baselines': False,  # unigram, bigram, zlib on the same bytes, at the end
  }
  config.sample = {
    'prompts': ('',),
    'max_new_tokens': 128,
    'temperature': 0.7,
    'top_p': 0.95,
  }
  if arg == 'runlocal':
    shrink(config)
  elif arg:
    raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
  return config.lock()


def _model():
  return {
    'vocab_size': 129280,  # rows of embedding and head, TR 4.1
    'd_model': 7168,  # TR 4.2
    'd_ff': 18432,  # of the dense layers' SwiGLU
    'num_layers': 61,
    'num_dense_layers': 3,  # the first ones
    'norm_eps': 1e-6,  # of every RMSNorm but those of the latents
    'latent_norm_eps': 1e-6,  # of the query and key-value latents' RMSNorms
    'init_std': 0.006,  # all matrices, TR 4.2
    'max_seq_len': 4096,  # YaRN is on if it is above rope.original_seq_len
    'scan_layers': True,  # False: layers unrolled (faster decode)
    'remat': 'report',  # 'none', 'report' (TR 3.2.3) or 'full'
    'mla': {  # TR 2.1.1
      'num_heads': 128,
      'q_lora_rank': 1536,  # 0: a plain query projection
      'kv_lora_rank': 512,
      'qk_nope_head_dim': 128,
      'qk_rope_head_dim': 64,
      'v_head_dim': 128,
    },
    'rope': {  # TR 4.3
      'theta': 10000.0,
      'original_seq_len': 4096,  # tokens
      'factor': 40.0,  # YaRN's s; 1.0: no extension possible
      'beta_fast': 32.0,  # rotations over the original length
      'beta_slow': 1.0,
      'mscale': 1.0,
      'mscale_all_dim': 1.0,
    },
    'moe': {  # TR 2.1.2
      'num_experts': 256,
      'num_shared_experts': 1,
      'top_k': 8,
      'num_groups': 8,
      'top_groups': 4,  # groups that a token is routed to at most
      'd_ff': 2048,  # of one expert
      'score_func': 'sigmoid',  # 'softmax' is V2's gate
      'norm_topk': True,  # gates divided by their sum
      'route_scale': 2.5,
      'product': 'auto',  # 'blocks', 'dense', 'ragged'
      'block_size': 128,  # rows of one expert block in 'blocks'; FP8: 128
      # Room for so many times the even load; more takes another round.
      'buffer_factor': 1.5,
    },
    'mtp': {  # TR 2.2
      'depth': 1,  # 0: no MTP module
      'hidden': 'post_norm',  # NP: h^0 after or before ('pre_norm') the norm
      'normalizer': 'T',  # eq. 24, as the main loss; 'valid': own targets
    },
  }


def _balance():
  return {  # TR 2.1.2, eqs. 17-20; 4.5.3
    'kind': 'sequence',  # 'batch', 'v2' or 'none' for ablations
    'alpha': 1e-4,  # of 'sequence' and 'batch'; NP: summed over layers
    'v2_expert_alpha': 0.003,  # V2, 3.1.2; used by 'v2' only
    'v2_device_alpha': 0.05,
    'v2_comm_alpha': 0.02,
  }


def _data():
  return {
    # 'stdlib', 'tfds:NAME', or a glob: .txt, .jsonl (also .gz, .zst), .parquet
    'source': 'stdlib',
    # In its place, such as ('web=0.7:/data/*.jsonl', 'code=0.3:stdlib'): names,
    # shares of the bytes of text that are read, sources.
    'mixture': (),
    'max_epochs': 0.0,  # of any source, in `dsv3 prepare`; 0: no limit
    'text_key': 'text',  # field of TFDS, JSONL and Parquet records
    'valid_fraction': 0.02,  # held out, by a hash of the document's name
    'cache_dir': '',  # '': dsv3_jax under the user's cache folder
    'bad_records': 'refuse',  # of files; 'skip': left out and listed
    'on_change': 'refuse',  # of a run's corpus; 'continue' with the new one
    'prepared': '',  # folder of `dsv3 prepare`; '': packed while training
    'tokenizer': '',  # a tokenizer.json; '': train one on the corpus
    'tokenizer_vocab': 129280,  # entries of a trained one
    'seq_len': 4096,  # T, tokens predicted a row, TR 4.2
    'fim_rate': 0.1,  # documents rearranged to PSM, TR 4.1
    'split_rate': 0.1,  # NP: share of punctuation+newline tokens split, TR 4.1
    'isolate_samples': False,  # True for SFT: no attention between samples
    'packing_bins': 64,  # open rows of best-fit packing
    'shuffle_window': 1024,  # NP: rows shuffled among themselves; 1: none
    # NP: which texts `dsv3 prepare` keeps; conversations keep these rules.
    'filters': {
      'min_chars': 0,
      'max_chars': 0,  # 0: no limit
      'languages': (),  # such as ('en', 'zh'), ISO 639; (): all
      'gopher_repetition': False,  # 13 rules, arXiv 2112.11446, table A1
    },
    # NP: of documents alike, the first is kept; none is like held-out text.
    'dedup': {
      'exact': False,  # but for case and white space
      'near': 0.0,  # share of shingles in common, Jaccard; 0.0: off
      'shingle_words': 5,
      'bands': 14,  # of MinHash; a pair is compared if one band is equal
      'rows_per_band': 8,  # hashes
    },
  }


def _optim():
  return {  # TR 4.2
    'lr': {
      'peak': 2.2e-4,
      'warmup_steps': 2000,
      'constant_tokens': 10_000_000_000_000,  # end of the constant piece
      'decay_tokens': 4_300_000_000_000,  # length of the cosine
      'decay_lr': 2.2e-5,  # reached by the cosine, then held
      'hold_tokens': 333_000_000_000,
      'final_lr': 7.3e-6,  # the last 167B tokens
    },
    'beta1': 0.9,
    'beta2': 0.95,
    'eps': 1e-8,  # NP
    'weight_decay': 0.1,  # NP which: matrices, not norm weights
    'clip_norm': 1.0,
    'moments_dtype': 'bfloat16',  # TR 3.3.3; or 'float32'
    'ema_decay': 0.999,  # NP; 0.0: no EMA, TR 3.2.3
    'mtp_weight': {  # lambda
      'first': 0.3,
      'first_tokens': 10_000_000_000_000,
      'then': 0.1,
    },
    'bias_rate': {  # gamma
      'first': 0.001,
      'first_tokens': 14_300_000_000_000,
      'then': 0.0,
    },
  }


def _train():
  return {
    'total_tokens': 14_800_000_000_000,
    'batch_size': 15360,  # sequences a step
    'batch_size_start': 3072,
    'batch_ramp_tokens': 469_000_000_000,  # NP shape: linear in tokens
    'batch_size_step': 256,  # NP: sequences by which the batch grows
    'microbatch_size': 128,  # sequences
    'log_every': 10,  # steps
    'spike_sigmas': 0.0,  # skip a step this far above the mean loss; 0: off
    'probe_every': 0,  # run every k-th step twice, compare bits; 0: off
    'watchdog_seconds': 1800.0,  # without a finished step; 0: off
    'peak_flops': 0.0,  # per device, for MFU; 0: known or measured
  }


def shrink(config: config_dict.ConfigDict) -> None:
  """Shrinks an experiment to its `runlocal` size: seconds on one CPU core.

  Reduces widths, lengths and counts; keeps which features are on.
  """
  with config.unlocked():
    model = config.model
    config.precision = 'f32'
    model.update(vocab_size=512, d_model=64, d_ff=128, num_layers=3)
    model.num_dense_layers = min(model.num_dense_layers, 1)
    model.max_seq_len = 64
    model.init_std = 0.02
    model.rope.original_seq_len = 64
    model.mla.update(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=16)
    model.mla.update(qk_rope_head_dim=8, v_head_dim=16)
    model.mla.q_lora_rank = min(model.mla.q_lora_rank, 24)
    model.moe.update(num_experts=8, d_ff=32, top_k=2, block_size=16)
    model.moe.num_groups = min(model.moe.num_groups, 4)
    model.moe.top_groups = min(model.moe.top_groups, 2)
    config.data.update(seq_len=64, tokenizer_vocab=512, packing_bins=16)
    config.data.shuffle_window = 64
    config.train.update(batch_size=8, batch_size_start=8, microbatch_size=4)
    config.train.update(batch_ramp_tokens=0, total_tokens=8 * 64 * 20)
    config.train.update(log_every=5, watchdog_seconds=300.0)
    config.optim.lr.update(peak=3e-3, warmup_steps=5, constant_tokens=5120)
    config.data.valid_fraction = 0.02
    config.optim.lr.update(decay_tokens=5120, decay_lr=3e-4, hold_tokens=0)
    config.optim.lr.final_lr = 3e-4
    config.checkpoint.every_steps = 10
    config.eval.update(every_steps=0, max_bytes=4000, batch_size=8, stride=32)
    config.sample.max_new_tokens = 8
    axes = ('pipe', 'data', 'context', 'node', 'expert', 'model')
    config.parallel.update(dict.fromkeys(axes, 1))
