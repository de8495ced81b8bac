"""DeepSeek-V3, 671B parameters of which 37B active: the report's pre-training.

Claim:    TR 4.2, 14.8T tokens, no rollback; 671,026,419,200 parameters.
Command:  dsv3 train --config=experiments/v3_671b.py --workdir=DIR
Hardware: 2,048 H800 in the report. Needs a corpus in `data.source` and the
          published `tokenizer.json` in `data.tokenizer`.
Expected: Pile-test 0.548 bits per byte (TR table 3); not re-run by us.
`runlocal` is the same recipe at a size for one CPU core. `pod` is the full one
on the report's mesh (TR 3.2); `dsv3 inspect --sharding` prints its sharding.
"""

from experiments import base


def get_config(arg: str = ''):
  if arg != 'pod':
    return base.get_config(arg)
  config = base.get_config()
  with config.unlocked():
    # 16 stages; experts over 8 nodes of 8 devices; 2 data-parallel replicas.
    config.parallel.update(pipe=16, data=2, node=8, expert=8)
    # NP: DualPipe needs 2 x 16 micro-batches; 3,072 sequences are only 24.
    config.train.batch_size_start = 4096
    config.eval.batch_size = 2048  # one window for each GPU
    config.sample.prompts = ()  # one device cannot hold the model
  return config.lock()
