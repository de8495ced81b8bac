"""An export needs memory for some pieces of a matrix, not for a leaf."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.checkpoint.gguf import llama

_BIG = """
import os, resource, sys
os.cpu_count = lambda: 2  # as many pieces as cores are read ahead
import numpy as np
from dsv3_jax.checkpoint import lazy_array
from dsv3_jax.checkpoint.hf import names
from tests.checkpoint.gguf import llama
sizes = {'d_model': 2048, 'moe__d_ff': 1024, 'moe__num_experts': 32}
sizes |= {'num_layers': 2, 'num_dense_layers': 1}
cfg = llama.make('plain', **{f'model__{k}': v for k, v in sizes.items()})
ones = lambda at: np.ones([s.stop - s.start for s in at], np.float32)
leaves = {
  path: lazy_array.LazyArray(shape, np.dtype(np.float32), ones, shape)
  for path, shape in names.leaf_shapes(cfg).items()
}
tokenizer = llama.train_tokenizer()
largest = max(leaf.nbytes for leaf in leaves.values())
with open('/proc/self/status') as status:
  data = [int(x.split()[1]) for x in status if x.startswith('VmData')][0]
limit = data * 1024 + largest // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
llama.exporter.export(
  cfg, leaves, sys.argv[1], tokenizer=tokenizer, dtype=sys.argv[2]
)
print(largest)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='RLIMIT_DATA of Linux')
@pytest.mark.parametrize(
  'dtype', ['float32', pytest.param('q8_0', marks=pytest.mark.nightly)]
)
def test_a_leaf_larger_than_the_memory_is_exported(dtype, tmp_path):
  """268 MB of w_up in a process that may have half of it."""
  output = tmp_path / 'x.gguf'
  done = subprocess.run(
    [sys.executable, '-c', _BIG, str(output), dtype],
    capture_output=True, text=True,
    env=os.environ | {'MALLOC_ARENA_MAX': '1'},  # each thread's counts as data
    cwd=pathlib.Path(__file__).resolve().parents[3],
  )  # fmt: skip
  assert not done.returncode, done.stderr[-2000:]
  assert int(done.stdout.split()[-1]) == 32 * 2048 * 1024 * 4
  up_EFD = llama.read(output)['blk.1.ffn_up_exps.weight']
  assert up_EFD.shape == (32, 1024, 2048)
  np.testing.assert_allclose(up_EFD[::31, ::93], 1.0, rtol=1e-3)
