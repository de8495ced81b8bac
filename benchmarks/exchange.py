"""Speed and memory of import and export, with a checkpoint of real widths.

Question: how fast, and in how much memory, are import, load and export of a
checkpoint with the widths of DeepSeek-V3?

  python -m benchmarks.exchange --folder=DIR [--experts=32]

Makes a folder of BF16 shards (2 layers, one of them MoE; 8.2 GB with 32
experts) and runs each command in its own process. The reference is a plain copy
of the same files, just before. Memory is the peak resident set of the process,
as `/usr/bin/time -v` reports it. CPU seconds are summed over all cores; on a
shared machine, they are more reliable than seconds.
"""

import argparse
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.checkpoint import lazy_array
from dsv3_jax.checkpoint.hf import exporter
from dsv3_jax.checkpoint.hf import names as hf_names
from experiments import v3_671b

_SHARD_BYTES = 2_000_000_000
_LOAD = """
import sys, jax, dsv3_jax
loaded = dsv3_jax.load(sys.argv[1], 'bfloat16')
print(sum(x.nbytes for x in jax.tree.leaves(loaded.params)))
"""


def make(folder: pathlib.Path, experts: int) -> None:
  """V3's widths, 2 layers, a few experts; values repeat every 2**20."""
  source = v3_671b.get_config()
  with source.unlocked():
    source.model.update(num_layers=2, num_dense_layers=1)
    source.model.moe.num_experts = experts
    source.model.mtp.depth = 0
  cfg = config.from_config_dict(source)
  noise = np.random.default_rng(0).normal(0.0, 0.006, 1 << 20)
  noise = noise.astype(np.float32)

  def read(at: lazy_array.Slices) -> np.ndarray:
    return np.resize(noise, [s.stop - s.start for s in at])

  leaves = {
    path: lazy_array.LazyArray(shape, np.dtype(np.float32), read, shape)
    for path, shape in hf_names.leaf_shapes(cfg).items()
  }
  options = {'dtype': 'bfloat16', 'shard_bytes': _SHARD_BYTES}
  exporter.export(cfg, leaves, folder, **options)


def size(folder: pathlib.Path) -> int:
  """Bytes of all files below a folder."""
  files = (path for path in folder.rglob('*') if path.is_file())
  return sum(path.stat().st_size for path in files)


def copy_rate(folder: pathlib.Path, target: pathlib.Path) -> float:
  """Bytes per second of a plain copy, flushed to disk."""
  start = time.perf_counter()
  shutil.copytree(folder, target)
  os.sync()
  rate = size(folder) / (time.perf_counter() - start)
  shutil.rmtree(target)
  return rate


def run(*args: str) -> tuple[float, float, int, str]:
  """Runs a command; seconds with flush, CPU seconds, peak bytes, stdout."""
  start = time.perf_counter()
  child = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
  with child.stdout:
    output = child.stdout.read()
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  assert child.returncode == 0, args
  os.sync()
  seconds = time.perf_counter() - start
  cpu = usage.ru_utime + usage.ru_stime
  return seconds, cpu, usage.ru_maxrss * 1024, output


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--experts', type=int, default=32)
  args = parser.parse_args(argv)
  folder = args.folder
  folder.mkdir(parents=True)
  source, run_dir = folder / 'source', folder / 'run'
  make(source, args.experts)
  total = size(source)
  print(f'{total / 1e9:.2f} GB in {len(list(source.glob("*.safe*")))} shards\n')
  print(
    '| step | seconds | CPU seconds | GB/s of BF16 | of a copy | memory, GB |'
  )
  print('|---|---|---|---|---|---|')
  dsv3 = (sys.executable, '-m', 'dsv3_jax.cli')
  out = folder / 'out'
  steps = {
    'import, BF16': (*dsv3, 'import', f'--hf={source}', f'--output={run_dir}',
                     '--dtype=bfloat16'),
    'export, BF16': (*dsv3, 'export', f'--checkpoint={run_dir}',
                     f'--output={out}', '--shard_gb=2'),
    'export, FP8': (*dsv3, 'export', f'--checkpoint={run_dir}',
                    f'--output={out}', '--shard_gb=2', '--dtype=fp8'),
    'load, BF16': (sys.executable, '-c', _LOAD, str(source)),
  }  # fmt: skip
  for name, command in steps.items():
    plain_rate = copy_rate(source, folder / 'copy')
    seconds, cpu, peak, output = run(*command)
    beyond = ''
    if name.startswith('load'):
      arrays = int(output)
      beyond = f', {(peak - arrays) / 1e9:.2f} beyond the arrays'
    rate = total / seconds
    print(
      f'| {name} | {seconds:.1f} | {cpu:.1f} | {rate / 1e9:.2f} | '
      f'{rate / plain_rate:.0%} of {plain_rate / 1e9:.2f} | '
      f'{peak / 1e9:.2f}{beyond} |',
      flush=True,
    )
    if name == 'export, BF16':
      sums = [(path / 'SHA256SUMS').read_text() for path in (source, out)]
      assert sums[0] == sums[1], 'the exported files differ from the imported'
    shutil.rmtree(out, ignore_errors=True)
  print(
    f'\n{os.cpu_count()} cores, Python {platform.python_version()}, jax '
    f'{jax.__version__}.'
  )
  return 0


if __name__ == '__main__':
  sys.exit(main())
