"""Numbers about a run, and where they are written.

MFU counts the main model's FLOP with causal attention, without MTP and
recomputation, against the peak of all devices (the convention of the report's
figures).
"""

import functools
import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import figure

from dsv3_jax.planning import hardware


def bits_per_byte(nats: float, num_bytes: int) -> float:
  """Nats summed over a text -> bits per UTF-8 byte of it."""
  return nats / math.log(2.0) / num_bytes


def duration(seconds: float) -> str:
  """Seconds as h:mm:ss."""
  minutes, seconds = divmod(int(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


class Throughput:
  """Tokens per second and MFU between reports; the first step, which compiles,
  and pauses (saving, evaluation) do not count."""

  def __init__(self, flops_per_token: float, peak_flops: float):
    self._flops, self._peak = flops_per_token, peak_flops
    self._start: float | None = None
    self._tokens = 0

  def add(self, tokens: int) -> None:
    """Counts the tokens of a finished step."""
    if self._start is None:
      self.restart()
    else:
      self._tokens += tokens

  def restart(self) -> None:
    """Counts from now on."""
    self._start, self._tokens = time.perf_counter(), 0

  def read(self) -> dict[str, float]:
    """Speed since the last restart; empty before a step has finished."""
    if not self._tokens:
      return {}
    speed = self._tokens / (time.perf_counter() - self._start)
    return {
      'tokens_per_second': speed,
      'mfu': speed * self._flops / self._peak,
    }


class MetricWriter:
  """`metrics.jsonl`, always, and TensorBoard events beside it.

  A line holds `kind` ('train', 'eval' or 'goodput'), `step`, `tokens` and the
  numbers.
  """

  def __init__(
    self, workdir: str | os.PathLike, resume_step: int, again: bool = False
  ):
    """Drops lines after `resume_step`: the resumed run writes them again.

    Args:
      again: the run had ended there; its last evaluation comes once more.
    """
    self._path = pathlib.Path(workdir) / 'metrics.jsonl'
    newest = lambda x: x['step'] + (again and x['kind'] == 'eval')
    kept = [x for x in read_metrics(workdir) if newest(x) <= resume_step]
    scratch = self._path.with_name('.metrics.jsonl')
    scratch.write_text(
      ''.join(json.dumps(record) + '\n' for record in kept), encoding='utf-8'
    )
    scratch.replace(self._path)
    self._file = self._path.open('a', encoding='utf-8')
    # Only who writes waits for it: it imports PyTorch where that is installed.
    import tensorboardX

    self._events = tensorboardX.SummaryWriter(
      str(workdir), purge_step=resume_step + 1
    )

  def write(self, kind: str, step: int, tokens: int, numbers: dict) -> None:
    """Appends one record; numbers only."""
    record = {'kind': kind, 'step': step, 'tokens': tokens}
    assert not record.keys() & numbers.keys()
    record |= numbers
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name, value in numbers.items():
      self._events.add_scalar(f'{kind}/{name}', value, step)

  def close(self) -> None:
    """Ends both files."""
    self._file.close()
    self._events.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """All whole lines of `metrics.jsonl`; a kill may have cut the last."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = path.read_text(encoding='utf-8').split('\n')[:-1]
  return [json.loads(line) for line in lines]


def plot_loss(workdir: str | os.PathLike) -> None:
  """Draws `loss.png` from `metrics.jsonl`: losses above, MaxVio below."""
  records = read_metrics(workdir)
  train = [record for record in records if record['kind'] == 'train']
  held = [record for record in records if record['kind'] == 'eval']
  column = lambda rows, name: [row[name] for row in rows]
  tokens = column(train, 'tokens')
  picture = figure.Figure(figsize=(8, 6), layout='constrained')
  top, bottom = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  top.plot(tokens, column(train, 'loss'), label='train', lw=1.2)
  if any(column(train, 'mtp_loss')):
    top.plot(
      tokens, column(train, 'mtp_loss'), label='MTP, one token on', lw=0.9
    )
  top.plot(
    column(held, 'tokens'),
    column(held, 'loss_nats_per_token'),
    'o',
    color='black',
    label='held out',
  )
  for record in held[-1:]:
    top.annotate(
      f'{record["bits_per_byte"]:.3f} bits per byte',
      (record['tokens'], record['loss_nats_per_token']),
      xytext=(-4, 12),
      textcoords='offset points',
      ha='right',
    )
  top.set_ylabel('loss [nats per token]')
  top.legend(frameon=False)
  bottom.plot(tokens, column(train, 'max_violation'), color='tab:red', lw=1.0)
  bottom.set_ylabel('MaxVio of experts')
  bottom.set_ylim(bottom=0)
  bottom.set_xlabel('training tokens')
  for axes in (top, bottom):
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  picture.savefig(pathlib.Path(workdir) / 'loss.png', dpi=120)


def peak_flops(per_device: float, mesh: jax.sharding.Mesh) -> float:
  """FLOP/s of all devices: given, published, or measured with matmuls."""
  device = jax.local_devices()[0]
  per_device = per_device or hardware.BF16_FLOPS.get(device.device_kind, 0.0)
  if per_device:
    return per_device * mesh.size
  # CPU devices share the cores, which one product uses already; so do
  # processes, each of which measures its part.
  on_cpu = device.platform == 'cpu'
  return _measured(device) * (jax.process_count() if on_cpu else mesh.size)


@functools.lru_cache
def _measured(device: jax.Device) -> float:
  """FLOP/s of the best of a few square matmuls."""
  on_cpu = device.platform == 'cpu'
  size, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
  x = jax.device_put(jnp.ones((size, size), dtype), device)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2.0 * size**3 / min(times)
