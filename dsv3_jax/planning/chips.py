"""Accelerators: peaks, memory, networks and prices, each with its source.

Peaks are dense, of one chip as its vendor counts it. Bandwidths are those of
one chip in one direction. A *node* is the fast tier: NVLink's domain, or a TPU
pod. `unverified` names the fields whose source was not read directly.
"""

import dataclasses
import difflib

from dsv3_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator and its networks, in base units.

  Attributes:
    bf16, fp8: dense peak [FLOP/s]; fp8 is that of BF16 where matmuls have none.
    hbm_bytes, hbm_bandwidth: capacity [byte] and peak [byte/s].
    node_size: chips of the fast tier.
    intra, inter: peak of the fast and the slow tier [byte/s].
    price: [dollars an hour]; None where no price was found.
    sources: where the figures come from.
    unverified: fields that were not read in a vendor's page or a paper.
  """

  name: str
  bf16: float
  fp8: float
  hbm_bytes: float
  hbm_bandwidth: float
  node_size: int
  intra: float
  inter: float
  price: float | None
  sources: str
  unverified: tuple[str, ...] = ()


_HOPPER = {'bf16': 989e12, 'fp8': 1979e12, 'node_size': 8, 'inter': 50e9}
_CHIPS = (
  Chip(
    name='h800',
    hbm_bytes=80e9,
    hbm_bandwidth=3.35e12,
    intra=200e9,  # NVLink, 400 GB/s both ways; TR 3.2.2 reaches 160
    price=2.0,
    sources='TR 3.2 and table 1 (network, price); ISCA (arXiv 2505.09343) '
    'tables 4, 5 (BF16 peak, NVLink); H100 data sheet (the rest)',
    unverified=('fp8', 'hbm_bandwidth'),
    **_HOPPER,
  ),
  Chip(
    name='h100',
    hbm_bytes=80e9,
    hbm_bandwidth=3.35e12,
    intra=450e9,
    price=None,
    sources='H100 SXM data sheet; huggingface.co devidasmishra/'
    'ai-inference-hardware-economics-2026 repeats peaks, HBM and NVLink',
    unverified=('inter',),
    **_HOPPER,
  ),
  Chip(
    name='h200',
    hbm_bytes=141e9,
    hbm_bandwidth=4.8e12,
    intra=450e9,
    price=None,
    sources='MLPerf inference v4.1, system H200-SXM-141GBx8 (memory, NVLink, '
    '10 x 400 GbE); the rest as H100',
    **_HOPPER,
  ),
  Chip(
    name='b200',
    bf16=2250e12,
    fp8=4500e12,
    hbm_bytes=180e9,
    hbm_bandwidth=7.7e12,
    node_size=8,
    intra=900e9,
    inter=50e9,
    price=None,
    sources='verda.com/blog/gb300-nvl72-architecture (peaks, HBM); MLPerf '
    'inference v6.0, system nebius_b200_n1 (180 GB, 8 x 400 Gb/s)',
  ),
  Chip(
    name='gb200',
    bf16=2500e12,
    fp8=5000e12,
    hbm_bytes=186e9,
    hbm_bandwidth=8e12,
    node_size=72,
    intra=900e9,
    inter=50e9,
    price=None,
    sources='glennklockwood.com/garden/processors/B200 (peaks, 1,200 W); '
    'MLPerf inference v6.1, system GB200-NVL72 (186 GB, ConnectX-7)',
    unverified=('hbm_bandwidth',),
  ),
  Chip(
    name='gb300',
    bf16=2500e12,
    fp8=5000e12,
    hbm_bytes=279e9,
    hbm_bandwidth=8e12,
    node_size=72,
    intra=900e9,
    inter=100e9,
    price=None,
    sources='verda.com/blog/gb300-nvl72-architecture (peaks, HBM, NVLink); '
    'ai-infrastructure.net (72 x ConnectX-8, 800 Gb/s)',
  ),
  Chip(
    name='v5p',
    bf16=459e12,
    fp8=459e12,
    hbm_bytes=95.0 * 2**30,
    hbm_bandwidth=2.765e12,
    node_size=8960,
    intra=600e9,  # 1,200 GB/s both ways, over six links of a torus
    inter=6.25e9,
    price=None,
    sources='docs.cloud.google.com/tpu/docs/v5p (all)',
  ),
  Chip(
    name='v6e',
    bf16=918e12,
    fp8=918e12,
    hbm_bytes=32e9,
    hbm_bandwidth=1.638e12,
    node_size=256,
    intra=400e9,  # 800 GB/s both ways, over four links
    inter=12.5e9,
    price=None,
    sources='docs.cloud.google.com/tpu/docs/v6e (all but inter)',
    unverified=('inter',),
  ),
  Chip(
    name='ironwood',
    bf16=2307e12,
    fp8=4614e12,
    hbm_bytes=192.0 * 2**30,
    hbm_bandwidth=7.38e12,
    node_size=9216,
    intra=600e9,
    inter=12.5e9,
    price=None,
    sources='docs.cloud.google.com/tpu/docs/tpu7x (peaks, HBM bytes)',
    unverified=('hbm_bandwidth', 'intra', 'inter'),
  ),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


def find(name: str) -> Chip:
  """The chip of that name.

  Raises:
    InputError: there is none; names the nearest.
  """
  if name in CHIPS:
    return CHIPS[name]
  near = difflib.get_close_matches(name, CHIPS, n=1)
  hint = f'did you mean {near[0]}? ' if near else ''
  raise errors.InputError(
    f'chip={name!r} is unknown; {hint}known: {", ".join(CHIPS)}'
  )
