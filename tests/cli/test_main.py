"""The command as a user meets it: its output and its exit code."""

import json
import math
import shutil
import signal
import subprocess
import sys

import pytest

from dsv3_jax.cli import main as cli
from dsv3_jax.training import loop, metrics, watchdog
from tests.cli import commands

# How ml_collections loads an experiment, when asked in this process.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')


dsv3 = commands.in_process


def refused(done, *expected):
  """Code 2 and one line on stderr that says all of it."""
  assert done.returncode == 2, done.stdout + done.stderr
  assert done.stderr.startswith('dsv3: ')
  assert done.stderr.count('\n') == 1, done.stderr
  for text in expected:
    assert text in done.stderr


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    (['fly'], "'fly' is no command"),
    (['train'], '--config=FILE.py is missing'),
    (['train', commands.CONFIG], '--workdir=DIR is missing'),
    (['train', '--config=nowhere.py', '--workdir=x'], 'nowhere.py'),
    (['train', commands.CONFIG, '--workdir=x', '--speed=9'], 'speed'),
    (['train', commands.CONFIG, '--workdir=x', 'extra'], "'extra' is no flag"),
    (
      ['train', commands.CONFIG, '--workdir=x', '--config.model.moe.topk=2'],
      'model.moe.topk is unknown; did you mean model.moe.top_k?',
    ),
    (['inspect', '--config', 'no.py', '--config.seed', '2'], 'no.py'),
    (['inspect', commands.CONFIG, '--config.seed.x=2'], 'seed is one value'),
    (
      [
        'train',
        commands.CONFIG,
        '--workdir=x',
        '--config.sample.max_new_tokens=64',
      ],
      'sample.max_new_tokens=64 must be < model.max_seq_len=64',
    ),
    (
      ['train', commands.CONFIG, '--workdir=x', '--config.model.moe.top_k=9'],
      'model.moe.top_k=9 must be <= model.moe.num_experts=8',
    ),
    (
      [
        'train',
        commands.CONFIG,
        '--workdir=x',
        '--config.data.source=none/*.txt',
      ],
      'none/*.txt',
    ),
    (['train', '--config=experiments/base.py:big', '--workdir=x'], 'runlocal'),
    (['inspect', '--config=experiments/base.py', '--config.seed=x'], 'seed'),
    (['generate'], '--checkpoint=DIR is missing'),
    (['generate', '--checkpoint=nowhere'], 'nowhere/config.json'),
    (['generate', '--checkpoint=x', '--top_p=0'], 'top_p=0.0 must be in'),
    (['generate', '--checkpoint=x', '--temperature=-1'], 'temperature=-1.0'),
    (['generate', '--checkpoint=x', '--temperature=nan'], 'temperature=nan'),
    (['generate', '--checkpoint=x', '--seed=-1'], 'seed=-1 must be in'),
    (['eval', '--checkpoint=nowhere'], 'nowhere/config.json'),
    (['eval', '--checkpoint=x', '--task=sing'], "task='sing' must be one of"),
    (
      ['bench'],
      "'' must be one of: compile_kernels_gpu, compile_kernels_tpu, ",
    ),
    (['bench', 'fly'], "'fly' must be one of: "),
    (['bench', 'common'], "'common' must be one of: "),
    (['bench', 'fp8_step', '--speed=9'], 'unrecognized arguments: --speed=9'),
    (['bench', 'fp8_step', '--rounds=x'], "--rounds: invalid int value: 'x'"),
    (['bench', 'speculation', '--checkpoint=x'], 'x/config.json'),
  ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, args, expected):
  monkeypatch.chdir(commands.ROOT)
  code = cli.main(args)
  done = subprocess.CompletedProcess(args, code, *capsys.readouterr())
  refused(done, expected)
  assert not (commands.ROOT / 'x').exists()


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    ('def get_config(:', 'invalid syntax (broken.py, line 1)'),
    ('import nothing_such', 'broken.py:1'),
    ('x = 1', "no attribute 'get_config'"),
    ('def get_config(arg=None):\n  return 1 / 0', 'broken.py:2'),
    ('def get_config(arg=None):\n  assert False', 'AssertionError'),
    (None, 'No such file'),
  ],
)
def test_a_broken_experiment_is_one_line(
  capsys, monkeypatch, tmp_path, body, expected
):
  # ml_collections runs every experiment in one module: forget the last one's.
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)
  path = tmp_path / 'broken.py'
  if body is not None:
    path.write_text(body)
  code = cli.main(['inspect', f'--config={path}'])
  done = subprocess.CompletedProcess([], code, *capsys.readouterr())
  refused(done, 'broken.py', expected)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
  def fault(*args):
    raise ValueError('a shape of ours')

  monkeypatch.setattr('dsv3_jax.planning.flops.inspect_dict', fault)
  monkeypatch.chdir(commands.ROOT)
  with pytest.raises(ValueError, match='a shape of ours'):
    cli.main(['inspect', commands.CONFIG])


@pytest.mark.parametrize(
  ('error', 'code', 'expected'),
  [
    (loop.NonFiniteError(7, {'loss': math.inf}), 76, 'loss at step 7'),
    (loop.CorruptionError('step 3 gave'), 77, 'step 3 gave'),
    (watchdog.Stopped(5), 75, 'step 5 is saved'),
  ],
)
def test_exit_codes(capsys, monkeypatch, error, code, expected):
  def run(cfg, workdir):
    raise error

  monkeypatch.setattr(loop, 'run', run)
  monkeypatch.chdir(commands.ROOT)
  assert cli.main(['train', commands.CONFIG, '--workdir=x']) == code
  assert expected in ''.join(capsys.readouterr())


def test_bad_input_ends_the_process_with_2(env):
  args = ('inspect', commands.CONFIG, '--config.model.moe.topk=2')
  refused(commands.process(env, *args), 'top_k')


@pytest.mark.parametrize('name', ['train', 'inspect', 'generate', 'eval'])
def test_help_explains(name):
  done = dsv3(name, '--help')
  assert done.returncode == 0
  assert f'dsv3 {name}' in done.stdout
  assert '--' in done.stdout
  assert name in dsv3('--help').stdout


def test_inspect_671b():
  """Exactly the published numbers."""
  args = ('--config=experiments/v3_671b.py', '--json')
  done = dsv3('inspect', *args)
  summary = json.loads(done.stdout)
  assert summary['parameters'] == {
    'main': 671_026_419_200,
    'router_bias': 14_848,
    'mtp_stored': 13_463_426_304,
    'mtp_unique': 11_610_068_224,
    'active': 37_552_282_624,
    'active_without_embedding': 36_625_603_584,
  }
  assert summary['kv_bytes_per_token'] == 70_272
  flop = summary['flops_per_token']
  assert round(flop['causal'] / 1e9, 1) == 250.5
  assert round(flop['non_causal'] / 1e9, 1) == 281.2
  assert round(flop['mtp'] / 1e9, 1) == 10.2
  table = dsv3('inspect', args[0]).stdout
  assert '671,026,419,200' in table


def test_train_writes_what_it_promises(trained):
  names = {path.name for path in trained.iterdir()}
  promised = {'config.json', 'tokenizer.json', 'metrics.jsonl', 'loss.png'}
  assert promised | {'samples.txt', 'checkpoints'} <= names
  assert [n for n in names if n.startswith('events.out.tfevents')]
  lines = metrics.read_metrics(trained)
  assert [x['step'] for x in lines if x['kind'] == 'train'] == list(
    range(1, 13)
  )


def test_eval(trained):
  done = dsv3('eval', f'--checkpoint={trained}', '--json')
  assert not done.returncode, done.stderr
  heldout, compared = map(json.loads, done.stdout.splitlines())
  assert heldout['task'] == 'heldout'
  last = metrics.read_metrics(trained)[-1]
  assert heldout['bits_per_byte'] == pytest.approx(last['bits_per_byte'])
  assert (
    0 < compared['bigram_bits_per_byte'] < compared['unigram_bits_per_byte']
  )
  assert compared['xz_bits_per_byte'] > 0


def test_generate(env, trained):
  args = [f'--checkpoint={trained}', '--prompt=def ', '--prompt=import os\n']
  args += ['--max_new_tokens=5', '--json', '--temperature=0']
  runs = [commands.process(env, 'generate', *args), dsv3('generate', *args)]
  assert not runs[0].returncode, runs[0].stderr
  rows = [json.loads(line) for line in runs[0].stdout.splitlines()]
  assert [row['prompt'] for row in rows] == ['def ', 'import os\n']
  assert all(row['text'] and row['tokens'] == 5 for row in rows)
  assert json.loads(runs[0].stderr.splitlines()[-1])['tokens_per_second'] > 0
  again = [json.loads(line) for line in runs[1].stdout.splitlines()]
  assert [r['text'] for r in again] == [r['text'] for r in rows]


def damaged(trained, folder, name):
  copy = folder / name
  shutil.copytree(trained, copy)
  return copy


def test_damaged_checkpoint_is_refused_by_name(trained, folder):
  workdir = damaged(trained, folder, 'flipped')
  step = workdir / 'checkpoints' / '000000012'
  files = [p for p in (step / 'arrays').rglob('*') if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  body = bytearray(path.read_bytes())
  body[-9] ^= 4
  path.write_bytes(body)
  expected = (path.name, 'step 8 is intact', 'checkpoint.restore_step=8')
  refused(dsv3('generate', f'--checkpoint={workdir}'), *expected)
  changes = {'checkpoint__every_steps': 4}
  refused(dsv3(*commands.train_args(folder, workdir, 14, **changes)), *expected)


def test_truncated_config_is_refused(trained, folder):
  workdir = damaged(trained, folder, 'truncated')
  path = workdir / 'config.json'
  path.write_text(path.read_text()[:-100])
  refused(dsv3('eval', f'--checkpoint={workdir}'), 'config.json')
  path.with_name('tokenizer.json').write_text('{')
  shutil.copy(trained / 'config.json', path)
  refused(dsv3('eval', f'--checkpoint={workdir}'), 'tokenizer.json')


def test_changed_setting_is_refused(trained, folder):
  args = commands.train_args(folder, trained, 14, optim__lr__peak=0.5)
  refused(dsv3(*args), 'optim.lr.peak=0.5 differs from', '--workdir')


@pytest.mark.nightly
def test_a_stuck_loader_ends_in_stacks_and_70(env, folder):
  code = (
    'import sys, time\n'
    'from dsv3_jax.cli import main as cli\n'
    'from dsv3_jax.data import loader\n'
    'def no_batch(self):\n'
    '  time.sleep(600)\n'
    'loader.Loader.__next__ = no_batch\n'
    'sys.exit(cli.main(sys.argv[1:]))\n'
  )
  args = commands.train_args(
    folder, folder / 'stuck', 4, train__watchdog_seconds=5.0
  )
  done = subprocess.run(
    [sys.executable, '-c', code, *args],
    capture_output=True, text=True, cwd=commands.ROOT, env=env,
  )  # fmt: skip
  assert done.returncode == 70
  assert 'no step finished for 5 s' in done.stderr
  assert 'in no_batch' in done.stderr


def test_an_earlier_step_and_the_average_are_evaluated(trained):
  bits = []
  for more in ((), ('--step=4',), ('--step=4', '--ema')):
    args = (f'--checkpoint={trained}', '--task=heldout', '--json', *more)
    done = dsv3('eval', *args)
    assert not done.returncode, done.stderr
    bits.append(json.loads(done.stdout)['bits_per_byte'])
  assert len(set(bits)) == 3
  done = dsv3('eval', f'--checkpoint={trained}', '--step=5')
  refused(done, 'step 4 is intact')


@pytest.mark.nightly
def test_sigterm_saves_once_and_the_rerun_goes_on(env, trained, folder):
  """Code 75, one step saved; then the same end as the undisturbed run's."""
  workdir = folder / 'stopped'
  changes = {'checkpoint__every_steps': 1 << 20, 'sample__prompts': ()}
  args = commands.train_args(folder, workdir, 400, **changes)
  child = subprocess.Popen(
    commands.command(*args),
    cwd=commands.ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
  )
  for line in child.stdout:
    if line.startswith('step 3 '):
      break
  child.send_signal(signal.SIGTERM)
  with child.stdout:
    rest = child.stdout.read()
  assert child.wait() == 75
  assert 'is saved' in rest
  (saved,) = (workdir / 'checkpoints').iterdir()
  stopped_at = int(saved.name)
  assert 3 <= stopped_at < 400
  more = commands.train_args(folder, workdir, stopped_at + 5, **changes)
  done = commands.process(env, *more)
  assert not done.returncode, done.stderr
  assert f'goes on after step {stopped_at}' in done.stdout
  losses = lambda where: [
    (x['step'], x['loss'])
    for x in metrics.read_metrics(where)
    if x['kind'] == 'train'
  ]
  logged = losses(workdir)
  assert [step for step, _ in logged] == list(range(1, stopped_at + 6))
  assert logged[:12] == losses(trained)[: len(logged[:12])]


def test_bench_runs_a_benchmark(folder):
  flags = ['--dry_run', '--only=quantise rows', f'--output={folder}/table.md']
  done = dsv3('bench', 'fp8_matmul', *flags, '--json')
  assert not done.returncode, done.stderr
  copy, row = map(json.loads, done.stdout.splitlines())
  assert copy['gigabyte_per_second'] > 0
  assert row['op'] == 'quantise rows' and row['milliseconds_median'] > 0
  done = dsv3('bench', 'fp8_matmul', *flags)
  assert '| quantise rows | 130x200 |' in done.stdout
  assert (folder / 'table.md').read_text().count('| quantise rows |') == 2


def test_bench_ends_with_the_code_of_the_benchmark(monkeypatch, tmp_path):
  import benchmarks

  text = 'import sys\nassert sys.argv[1:] == ["--x=1"]\nsys.exit(7)\n'
  (tmp_path / 'seven.py').write_text(text)
  monkeypatch.setattr(benchmarks, '__path__', [str(tmp_path)])
  before = sys.argv
  assert cli.main(['bench', 'seven', '--x=1']) == 7
  assert sys.argv is before
