"""DeepSeek-V3, 671B parameters of which 37B active: the report's pre-training.

Claim:    TR 4.2, 14.8T tokens, no rollback; 671,026,419,200 parameters.
Command:  dsv3 train --config=experiments/v3_671b.py --workdir=DIR
Hardware: 2,048 H800 in the report. Needs a corpus in `data.source` and the
          published `tokenizer.json` in `data.tokenizer`.
Expected: Pile-test 0.548 bits per byte (TR table 3); not re-run by us.
`runlocal` is the same recipe at a size for one CPU core.
"""

from experiments import base


def get_config(arg: str = ''):
  return base.get_config(arg)
