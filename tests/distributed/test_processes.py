"""Training by several processes, as `launch/local.sh` runs them."""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import pytest

from dsv3_jax import errors
from dsv3_jax.cli import main as cli
from dsv3_jax.distributed import processes
from tests import limits, tiny_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEP_TOKENS = 8 * 32
EXPERIMENT = """
import json
from experiments import quickstart

def get_config(arg=''):
  source = quickstart.get_config('runlocal')
  with source.unlocked():
    source.update_from_flattened_dict(json.loads({text!r}))
  return source
"""


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    (('', '2', '0'), 'JAX_COORDINATOR_ADDRESS is missing'),
    (('host:1', '', '0'), 'JAX_NUM_PROCESSES is missing'),
    (('host:1', '2', ''), 'JAX_PROCESS_ID is missing'),
    (('host', '2', '0'), 'JAX_COORDINATOR_ADDRESS=host must be HOST:PORT'),
    ((':1', '2', '0'), 'JAX_COORDINATOR_ADDRESS=:1 must be HOST:PORT'),
    (('host:1', '0', '0'), 'JAX_NUM_PROCESSES=0 must be a number >= 1'),
    (('host:1', 'two', '0'), 'JAX_NUM_PROCESSES=two must be a number >= 1'),
    (('host:1', '2', '2'), 'JAX_PROCESS_ID=2 must be a number < JAX_NUM_PROC'),
    (('host:1', '2', '-1'), 'JAX_PROCESS_ID=-1 must be a number < JAX_NUM_P'),
  ],
)
def test_a_wrong_environment_is_one_line(given, expected):
  wrong = dict(zip(processes.ENVIRONMENT, given, strict=True))
  with pytest.raises(errors.InputError, match=re.escape(expected)) as caught:
    processes.from_environment(wrong)
  assert '\n' not in str(caught.value)


def test_what_the_environment_sets():
  given = dict(zip(processes.ENVIRONMENT, ('[::1]:80', '3', '2'), strict=True))
  assert processes.from_environment(given) == ('[::1]:80', 3, 2)
  assert processes.from_environment({}) is None


def test_a_cluster_that_jax_does_not_know_is_one_line(monkeypatch):
  def initialize(**options):
    raise ValueError('no coordinator')

  monkeypatch.setattr(jax.config, 'update', lambda name, value: None)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with (
    pytest.raises(
      errors.InputError, match=r'--cluster: .*\(no coordinator\): set JAX_COORD'
    ),
    processes.join_job(cluster=True),
  ):
    pass


def test_a_cluster_and_an_address_are_one_too_many(monkeypatch):
  given = ('host:1', '2', '0')
  for name, value in zip(processes.ENVIRONMENT, given, strict=True):
    monkeypatch.setenv(name, value)
  message = '--cluster and .*=host:1: only one may describe the job'
  with (
    pytest.raises(errors.InputError, match=message),
    processes.join_job(cluster=True),
  ):
    pass


def test_alone_a_process_agrees_with_itself():
  with processes.join_job():
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.gather('a', 1) == [1]
    assert processes.broadcast('a', 2) == processes.first_reported('a', 2) == 2
    processes.barrier('a')
    with pytest.raises(KeyError), processes.propagate_errors('a'):
      raise KeyError


def job(folder, code, **extra):
  """Two processes that run `code`; returns (exit code, output)."""
  script = folder / 'job.py'
  script.write_text(code, encoding='utf-8')
  return local(f'{sys.executable} {script}', ['--x'], PROCESSES='2', **extra)


def launch(command, args, **extra):
  env = os.environ | {'PYTHONPATH': str(ROOT), 'DSV3': command}
  env |= {'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'} | extra
  return subprocess.Popen(
    [ROOT / 'launch' / 'local.sh', *args],
    env=env,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def local(command, args, **extra):
  child = launch(command, args, **extra)
  output, _ = child.communicate(timeout=limits.HANG)
  return child.returncode, output


JOIN = """
import sys
from dsv3_jax import errors
from dsv3_jax.cli import main as cli
from dsv3_jax.distributed import processes
def main():
  with processes.join_job():
    me = processes.index()
    print('only the first says', me)
    assert processes.gather('a', 10 + me) == [[10, 11], []][me]
    assert processes.gather('a', 20 + me) == [[20, 21], []][me]
    assert processes.broadcast('a', 10 + me) == 10
    assert processes.first_reported('b', [None, 'second'][me]) == 'second'
    assert processes.first_reported('b', None) is None
    with processes.propagate_errors('fine'):
      pass
    {then}
try:
  main()
except errors.InputError as error:
  print(error, file=sys.stderr)
  sys.exit(2 + processes.index())
"""


def lines(output):
  return [
    x for x in output.splitlines() if x and not x.startswith('local.sh: p')
  ]


@pytest.mark.slow
def test_processes_agree_and_an_error_of_one_ends_all(tmp_path):
  then = (
    "with processes.propagate_errors('x'):\n"
    "      if me == 1: raise errors.InputError('no such file')\n"
    "    print('never')"
  )
  code, output = job(tmp_path, JOIN.format(then=then))
  assert code in (2, 3)
  first, *rest = lines(output)
  assert (first, rest) == (
    'only the first says 0',
    ['process 1: no such file'] * 2,
  )


@pytest.mark.nightly
def test_one_process_that_crashes_ends_the_job(tmp_path):
  """The other waits for it, and would for a minute; no restart helps."""
  then = "if me == 1: raise RuntimeError('a bug')\n    processes.barrier('x')"
  code, output = job(tmp_path, JOIN.format(then=then), RESTARTS='1')
  assert code == 1
  assert output.count('RuntimeError: a bug') == 2
  assert output.count('local.sh: a process ended with 1; restart 1 of 1') == 1


@pytest.fixture(
  scope='module',
  params=[
    {'data': 2},
    {'pipe': 2, 'expert': 2, 'data': 2},
  ],
  ids=str,
)
def axes(request):
  """The first of them is over the two processes."""
  return request.param


@pytest.fixture(scope='module')
def experiment(axes, tmp_path_factory):
  """A file of an experiment on such a mesh."""
  folder = tmp_path_factory.mktemp('job')
  settings = tiny_run.overrides(folder, 8) | {
    **{f'parallel.{axis}': size for axis, size in axes.items()},
    'parallel.schedule': 'gpipe',
    'train.microbatch_size': 4,
    'train.batch_size': 8,
    'train.batch_size_start': 8,
    'train.batch_ramp_tokens': 0,
    'train.total_tokens': 8 * STEP_TOKENS,
    'train.peak_flops': 1e12,
    'checkpoint.every_steps': 2,
    'model.mtp.depth': 0,
    'optim.ema_decay': 0.9,
    'sample.prompts': ('def ',),
  }
  path = folder / 'experiment.py'
  text = EXPERIMENT.format(text=json.dumps(settings))
  path.write_text(text, encoding='utf-8')
  return path


def train(experiment, workdir, *args, **extra):
  """Starts a job that trains."""
  environment = {
    # What the first process compiled, it has next time.
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }
  where = [f'--config={experiment}', f'--workdir={workdir}']
  command = f'{sys.executable} -m dsv3_jax.cli'
  return launch(command, [*where, *args], **(environment | extra))


def wait_for(child, condition):
  """Reads the output of a job until `condition` holds; returns it."""
  output = ''
  while not condition(output):
    line = child.stdout.readline()
    assert line, f'the job has ended: {output}'
    output += line
  return output


def pid(output, process):
  return int(re.findall(f'process {process} has pid ([0-9]+)', output)[-1])


@pytest.mark.nightly
# How ml_collections loads an experiment, when asked in this process.
@pytest.mark.filterwarnings('ignore:the load_module')
def test_a_killed_process_loses_nothing(experiment, axes, tmp_path, capsys):
  """Uninterrupted == killed, restarted and stopped, to the bit; then alone.

  The uninterrupted run is one process; on the larger mesh, which is compiled as
  users do, two.
  """
  two = {'PROCESSES': '2', 'DEVICES': str(math.prod(axes.values()) // 2)}
  if 'pipe' in axes:
    two |= {'JAX_DISABLE_MOST_OPTIMIZATIONS': '0', 'XLA_FLAGS': ''}
  calm, rough = tmp_path / 'calm', tmp_path / 'rough'
  if 'pipe' in axes:
    child = train(experiment, calm, **two)
    output, _ = child.communicate(timeout=limits.HANG)
    assert child.returncode == 0, output
  else:
    alone = [f'--config={experiment}', f'--workdir={calm}']
    assert cli.main(['train', *alone]) == 0
  want = tiny_run.read_metrics(calm)
  assert [line['step'] for line in want] == list(range(1, 9))
  for name in ('loss.png', 'samples.txt', 'config.json', 'tokenizer.json'):
    assert (calm / name).stat().st_size > 0

  longer = f'--config.train.total_tokens={1000 * STEP_TOKENS}'
  child = train(experiment, rough, longer, RESTARTS='1', **two)
  output = wait_for(child, lambda output: '\nstep 5 ' in output)
  os.kill(pid(output, 1), signal.SIGKILL)
  output += wait_for(child, lambda output: '\nstep 8 ' in output)
  assert 'restart 1 of 1' in output
  assert re.search('goes on after step [24]\n', output), output
  os.kill(pid(output, 1), signal.SIGTERM)
  rest, _ = child.communicate(timeout=limits.HANG)
  assert child.returncode == 75, rest
  assert 'dsv3: stopped by a signal' in rest
  got = tiny_run.read_metrics(rough)
  assert got[:8] == want

  steps = len(got)
  assert f'step {steps} is saved' in rest
  args = [f'--config={experiment}', f'--workdir={rough}']
  args += [f'--config.train.total_tokens={(steps + 1) * STEP_TOKENS}']
  assert cli.main(['train', *args, '--config.eval.max_bytes=100']) == 0
  assert f'goes on after step {steps}' in capsys.readouterr().out
  *before, last = tiny_run.read_metrics(rough)
  assert before == got
  assert last['step'] == steps + 1
  assert last['loss'] < want[0]['loss']
