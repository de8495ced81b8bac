"""Times of a layer's kernels on one device, for one micro-batch.

Rates are fractions of a chip's peaks. Those of matmuls, attention and
all-to-alls come from one source: the public trace of an overlapped pair of
chunks on H800 (deepseek-ai/profile-data, train.json: 4 MoE layers a chunk,
4,096 tokens a device, experts over 64 devices of 8 nodes, balanced routing).
No rate is fitted to a published step time. Other chips reach the same fractions
by assumption.

Letters: M tokens of a device and micro-batch, F forward, I input half of the
backward, W its weight half.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

from dsv3_jax import config, precision
from dsv3_jax.planning import all_to_all, chips, device_memory, flops
from dsv3_jax.planning.device_layout import DeviceLayout

# Seconds in the trace; of the all-to-alls, the middle of what it shows.
TRACE = {
  'o_proj': 0.895e-3,  # FP8, 4096 x 16384 x 7168
  'w13': 1.74e-3,  # FP8 grouped, 32768 rows x 7168 x 4096
  'attention forward': 1.25e-3,  # causal, 128 heads, 4096 tokens
  'attention backward': 3.6e-3,
  'dispatch forward': (4.2e-3 + 4.6e-3) / 2,
  'dispatch backward': (3.3e-3 + 3.6e-3) / 2,  # layout known
  'combine': (6.0e-3 + 6.6e-3) / 2,
  'pair of chunks': 129.0e-3,
}
_H800 = chips.CHIPS['h800']
_M = 4096
_ATTENTION = _M * 128 * (192 + 128) * _M  # 2 FLOP, half of the pairs
_REMOTE = 3.5 * _M  # rows to other nodes: 4 of 8 nodes, one of them its own


def _of_peak(flop: int | float, peak: float, kernel: str) -> float:
  return flop / TRACE[kernel] / peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """Fractions of peak that kernels reach.

  Attributes:
    dense, grouped: of matmuls, of the peak of their dtype.
    attention_forward, attention_backward: of the BF16 peak; the backward pass
      counts 2.5 times the forward one.
    dispatch_forward, dispatch_backward, combine: of the slow tier.
    wgrad: Wgrad's rate over Fprop's; the trace's excerpt has none.
    alone: rate of an all-to-all with no computation beside it over that in the
      trace. DeepEP's own tables would give 1.2 to 1.6; 1 is kept.
    intra: of the fast tier; TR 3.2.2 reaches 160 of 200 GB/s.
    hbm: of memory-bound kernels; assumed, not in the trace's excerpt.
    overlap: an overlapped pair's time over the longer of its two lanes, so that
      the pair of the trace takes its 129.0 ms.
  """

  dense: float = _of_peak(2 * _M * 16384 * 7168, _H800.fp8, 'o_proj')
  grouped: float = _of_peak(2 * 8 * _M * 7168 * 4096, _H800.fp8, 'w13')
  attention_forward: float = _of_peak(
    _ATTENTION, _H800.bf16, 'attention forward'
  )
  attention_backward: float = _of_peak(
    2.5 * _ATTENTION, _H800.bf16, 'attention backward'
  )
  dispatch_forward: float = _of_peak(
    _REMOTE * 7392, _H800.inter, 'dispatch forward'
  )
  dispatch_backward: float = _of_peak(
    _REMOTE * 7392, _H800.inter, 'dispatch backward'
  )
  combine: float = _of_peak(_REMOTE * 14336, _H800.inter, 'combine')
  wgrad: float = 1.0
  alone: float = 1.0
  intra: float = 0.8
  hbm: float = 0.8
  overlap: float = 1.3168


# What each rate may be instead: ranges of the trace, or of the assumption.
RANGES = {
  'dense': (0.95, 1.05),
  'grouped': (0.95, 1.05),
  'attention_forward': (0.95, 1.05),
  'attention_backward': (0.95, 1.05),
  'dispatch_forward': (4.4 / 4.6, 4.4 / 4.2),
  'dispatch_backward': (3.45 / 3.6, 3.45 / 3.3),
  'combine': (6.3 / 6.6, 6.3 / 6.0),
  'wgrad': (0.7, 1.05),
  'alone': (1.0, 1.35),
  'intra': (0.75, 1.1),
  'hbm': (0.75, 1.15),
  'overlap': (0.95, 1.05),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTimes:
  """Seconds of one micro-batch at a stage.

  Computation of attention, FFN and the rest (head, MTP projection, FSDP's
  all-gathers) as (F, I, W). All-to-alls as (F, I): dispatch and combine beside
  computation, and both together without any.
  """

  attention: tuple[float, float, float] = (0.0, 0.0, 0.0)
  ffn: tuple[float, float, float] = (0.0, 0.0, 0.0)
  rest: tuple[float, float, float] = (0.0, 0.0, 0.0)
  dispatch: tuple[float, float] = (0.0, 0.0)
  combine: tuple[float, float] = (0.0, 0.0)
  exposed: tuple[float, float] = (0.0, 0.0)

  def __add__(self, other: 'StageTimes') -> 'StageTimes':
    return self._map(lambda xs, ys: tuple(map(operator.add, xs, ys)), other)

  def __mul__(self, times: int | float) -> 'StageTimes':
    return self._map(lambda xs, _: tuple(times * x for x in xs), self)

  def _map(self, function: Callable, other: 'StageTimes') -> 'StageTimes':
    return StageTimes(
      attention=function(self.attention, other.attention),
      ffn=function(self.ffn, other.ffn),
      rest=function(self.rest, other.rest),
      dispatch=function(self.dispatch, other.dispatch),
      combine=function(self.combine, other.combine),
      exposed=function(self.exposed, other.exposed),
    )

  def _alone(self, part: int) -> float:
    lanes = [self.attention, self.ffn, self.rest]
    if part < 2:
      lanes.append(self.exposed)
    return sum(lane[part] for lane in lanes)

  @property
  def forward(self) -> float:
    return self._alone(0)

  @property
  def weight(self) -> float:
    return self._alone(2)

  @property
  def backward(self) -> float:
    """Full backward."""
    return self._alone(1) + self._alone(2)

  def beside(self, backward: 'StageTimes', overlap: float) -> float:
    """This forward overlapped with a full backward (TR figure 4).

    FFN over dispatch, then attention over combine; the longer lane counts.
    """
    seconds = 0.0
    for compute, exchange in (('ffn', 'dispatch'), ('attention', 'combine')):
      mine, other = getattr(self, compute), getattr(backward, compute)
      sent = getattr(self, exchange)[0] + getattr(backward, exchange)[1]
      seconds += max(mine[0] + other[1] + other[2], sent)
    rest = self.rest[0] + backward.rest[1] + backward.rest[2]
    return min(overlap * seconds + rest, self.forward + backward.backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTimes:
  """Kernel times of a model on a chip under a layout."""

  model: config.ModelConfig
  policy: precision.Policy
  chip: chips.Chip
  layout: DeviceLayout
  seq_len: int
  rates: Rates

  @property
  def tokens(self) -> float:
    return self.layout.tokens(self.seq_len)

  def matmul(
    self, flop: int | float, kind: str = 'dense', fp8: bool = True
  ) -> float:
    peak = self.chip.fp8 if fp8 and self.policy.fp8 else self.chip.bf16
    if self.policy.compute == 'float32':
      peak = self.chip.bf16 / 6  # six BF16 passes; no figure for it
    return flop / (peak * getattr(self.rates, kind))

  def moved(self, size: int | float) -> float:
    """Of memory-bound kernels that read and write `size` bytes."""
    return size / (self.chip.hbm_bandwidth * self.rates.hbm)

  def layer(self, is_moe: bool) -> StageTimes:
    """One layer of the main model."""
    plain = dataclasses.replace(
      self.layout, schedule='', batch=0, vocabulary='last'
    )
    return _layer(dataclasses.replace(self, layout=plain), is_moe)

  def uncached_layer(self, is_moe: bool) -> StageTimes:
    ffn = self._moe() if is_moe else self._swiglu(self.model.d_ff)
    attention = self._attention()
    if self.layout.remat == 'full':  # the forward pass once more
      attention, ffn = ((f, f + i, w) for f, i, w in (attention, ffn))
    times = StageTimes(attention=attention, ffn=ffn)
    if is_moe:
      times += self._exchange()
    return times + self._gather_weights(is_moe)

  def head(self) -> StageTimes:
    """The output head and its loss; BF16."""
    m = self.model
    once = self.matmul(2 * self.tokens * m.d_model * m.vocab_size, fp8=False)
    once += self.moved(2 * 4 * self.tokens * m.vocab_size)
    return StageTimes(rest=(once, once, once))

  def mtp(self) -> StageTimes:
    """One MTP module without its pass through the head."""
    once = self.matmul(4 * self.tokens * self.model.d_model**2, fp8=False)
    return self.layer(bool(self.model.num_moe_layers)) + StageTimes(
      rest=(once, once, once)
    )

  def _attention(self) -> tuple[float, float, float]:
    m, dim, tokens = self.model.mla, self.model.d_model, self.tokens
    heads, queries = m.num_heads, m.num_heads * m.qk_head_dim
    latents = m.q_lora_rank + m.cache_width
    up = m.q_lora_rank * queries + m.kv_lora_rank * heads * (
      m.qk_nope_head_dim + m.v_head_dim
    )
    if not m.q_lora_rank:
      up += dim * queries
    flop = 2 * tokens * (dim * latents + up + heads * m.v_head_dim * dim)
    core = tokens * heads * (m.qk_head_dim + m.v_head_dim) * self.seq_len
    peak = self.chip.bf16
    once = core / (peak * self.rates.attention_forward)
    twice = 2.5 * core / (peak * self.rates.attention_backward)
    f, i, w = self._attention_bytes()
    weights = latents * dim + up + heads * m.v_head_dim * dim
    recomputed = self.matmul(2 * tokens * up)
    return (
      self.matmul(flop) + once + self.moved(tokens * f),
      self.matmul(flop) + twice + recomputed + self.moved(tokens * i),
      self.matmul(flop) / self.rates.wgrad
      + self.moved(tokens * w + 8 * weights),
    )

  def _attention_bytes(self) -> tuple[int | float, ...]:
    """Bytes per token that kernels beside the matmuls read and write."""
    m, dim = self.model.mla, self.model.d_model
    a, q = self.sizes()
    latents = m.q_lora_rank + m.cache_width
    queries = m.num_heads * m.qk_head_dim
    keys = m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
    outputs = m.num_heads * m.v_head_dim
    norms = (dim + latents) * (a + q)
    rope = (3 * queries + keys) * a  # rotated and concatenated
    forward = norms + rope + outputs * (a + q) + 3 * dim * a
    inputs = norms + rope + dim * (a + q) + 2 * outputs * a
    inputs += rope + (queries + keys) * (a + q) + (3 * latents + 4 * dim) * a
    casts = 2 * (dim + latents) + queries + keys + outputs + dim
    return forward, inputs, 2 * casts * q if self.policy.fp8 else 0

  def sizes(self) -> tuple[int, int]:
    """Bytes of an activation, and of one that a matmul reads."""
    a = 4 if self.policy.compute == 'float32' else 2
    return a, 1 if self.policy.fp8 else a

  def _swiglu(self, width: int) -> tuple[float, float, float]:
    """A dense SwiGLU, or the shared expert."""
    dim, tokens = self.model.d_model, self.tokens
    a, q = self.sizes()
    once = self.matmul(6 * tokens * dim * width)
    f = dim * (4 * a + q) + width * (2 * a + 3 * q)
    i = dim * (5 * a + q) + width * (3 * a + 4 * q)
    w = 2 * q * (2 * dim + 3 * width) if self.policy.fp8 else 0
    return (
      once + self.moved(tokens * f),
      once + self.moved(tokens * i),
      once / self.rates.wgrad + self.moved(tokens * w + 24 * dim * width),
    )

  def _moe(self) -> tuple[float, float, float]:
    """Router, shared expert, and the routed experts of even load."""
    moe, dim, tokens = self.model.moe, self.model.d_model, self.tokens
    a, q = self.sizes()
    shared = (0.0, 0.0, 0.0)
    if moe.num_shared_experts:
      shared = self._swiglu(moe.num_shared_experts * moe.d_ff)
    gate = self.matmul(2 * tokens * dim * moe.num_experts, fp8=False)
    rows = tokens * moe.top_k
    local = 3 * dim * moe.d_ff * moe.num_experts / self.layout.expert_devices
    once = max(
      self.matmul(6 * rows * dim * moe.d_ff, 'grouped'), self.moved(q * local)
    )
    f = dim * (2 * a + 2 * q) + moe.d_ff * (2 * a + 3 * q)
    i = dim * (2 * a + 2 * q) + moe.d_ff * (3 * a + 4 * q)
    w = 2 * q * (2 * dim + 3 * moe.d_ff) if self.policy.fp8 else 0
    routed = (
      once + self.moved(rows * f),
      once + self.moved(rows * i),
      once / self.rates.wgrad + self.moved(rows * w + 8 * local),
    )
    return tuple(s + r + gate for s, r in zip(shared, routed, strict=True))

  def _exchange(self) -> StageTimes:
    """All-to-alls: FP8 dispatch in both passes, BF16 combine (TR 3.2.2)."""
    if self.layout.expert_devices == 1:
      return StageTimes()
    row = device_memory.row_bytes(self.model, self.policy)
    outputs = self.model.d_model * self.sizes()[0]
    where = (self.model, self.chip, self.layout)
    seconds = lambda size, rate: all_to_all.seconds(
      *where, self.tokens * size, rate, self.rates.intra
    )
    combine = seconds(outputs, self.rates.combine)
    dispatch = (
      seconds(row, self.rates.dispatch_forward),
      seconds(row, self.rates.dispatch_backward),
    )
    combines = (combine, combine)
    if self.layout.remat == 'full':  # sent again for the recomputed forward
      dispatch = (dispatch[0], sum(dispatch))
      combines = (combine, 2 * combine)
    both = (
      (d + c) / self.rates.alone
      for d, c in zip(dispatch, combines, strict=True)
    )
    return StageTimes(dispatch=dispatch, combine=combines, exposed=tuple(both))

  def _gather_weights(self, is_moe: bool) -> StageTimes:
    """FSDP's f32 all-gathers in F and I, reduce-scatter in W; not hidden."""
    shards = self.layout.fsdp_devices
    context = self._gather_context()
    if shards == 1:
      return StageTimes(rest=(context, 2 * context, 0.0))
    size = 0.0
    for part in flops.layer_parts(self.model, is_moe):
      gathered, count = 4.0 * part.size, shards
      if part.name.endswith('experts'):
        gathered /= self.layout.expert_devices
        count = self.layout.fsdp_beside_experts
      size += gathered * (count - 1) / count
    tier = self.chip.inter * self.rates.combine
    if self.layout.devices <= self.chip.node_size:
      tier = self.chip.intra * self.rates.intra
    once = size / tier
    return StageTimes(rest=(once + context, once + 2 * context, once))

  def _gather_context(self) -> float:
    """Latents of a sequence, all-gathered over `context`."""
    shards = self.layout.context
    if shards == 1:
      return 0.0
    size = self.tokens * (shards - 1) * self.model.mla.cache_width * 2
    inside = self.layout.devices <= self.chip.node_size
    fast, slow = self.chip.intra * self.rates.intra, self.chip.inter
    return size / (fast if inside else slow * self.rates.combine)


# Layouts of a search differ mostly in what a layer does not see.
@functools.lru_cache(maxsize=4096)
def _layer(times: KernelTimes, is_moe: bool) -> StageTimes:
  return times.uncached_layer(is_moe)
