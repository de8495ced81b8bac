"""What the launchers would run, as `DRY_RUN=1` prints it."""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'launch'
ARGS = ['--config=some where/a.py:x', '--workdir=/runs/a']


def dry(name, **extra):
  """(exit code, stdout, stderr) of a dry run."""
  done = subprocess.run(
    [FOLDER / name, *ARGS],
    env={'PATH': os.environ['PATH'], 'DRY_RUN': '1'} | extra,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


def test_local_starts_one_process_a_line():
  options = {'PROCESSES': '2', 'DEVICES': '3', 'PORT': '123'}
  code, stdout, _ = dry('local.sh', **options)
  assert code == 0
  for index, line in enumerate(stdout.splitlines()):
    *environment, command, train, config, workdir = shlex.split(line)
    assert dict(pair.split('=') for pair in environment) == {
      'JAX_COORDINATOR_ADDRESS': '127.0.0.1:123',
      'JAX_COORDINATOR_BIND_ADDRESS': '127.0.0.1:123',
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(index),
      'JAX_NUM_CPU_DEVICES': '3',
      'JAX_LOCAL_DEVICE_IDS': ('0,1,2', '3,4,5')[index],
    }
    assert [command, train, config, workdir] == ['dsv3', 'train', *ARGS]
  assert index == 1


def test_slurm_runs_one_step_that_ends_with_its_first_failure():
  code, stdout, _ = dry('slurm.sh')
  train = ['dsv3', 'train', '--cluster', *ARGS]
  assert code == 0
  assert shlex.split(stdout) == ['srun', *train]


@pytest.mark.parametrize(
  ('code', 'restarts', 'requeued'),
  [
    *[(code, '', False) for code in (0, 2, 76, 77)],
    *[(code, '', True) for code in (1, 70, 75, 137)],
    (75, '2', False),
  ],
)
def test_slurm_queues_again_what_can_go_on(tmp_path, code, restarts, requeued):
  """The script itself, with an srun and a scontrol that only report."""
  for name, end in (('srun', code), ('scontrol', 0)):
    path = tmp_path / name
    report = f'echo {name} "$@" >> "{tmp_path}/calls"'
    path.write_text(f'#!/bin/sh\n{report}\nexit {end}\n', encoding='utf-8')
    path.chmod(0o755)
  environment = {'SLURM_JOB_ID': '7', 'RESTARTS': '2'}
  if restarts:
    environment['SLURM_RESTART_COUNT'] = restarts
  environment['PATH'] = f'{tmp_path}:{os.environ["PATH"]}'
  done = subprocess.run([FOLDER / 'slurm.sh', *ARGS], env=environment)
  assert done.returncode == code
  calls = (tmp_path / 'calls').read_text(encoding='utf-8').splitlines()
  again = ['scontrol requeue 7'] if requeued else []
  assert calls == [f'srun dsv3 train --cluster {" ".join(ARGS)}', *again]


def test_tpu_pod_runs_the_line_on_all_hosts():
  code, stdout, _ = dry('tpu_pod.sh', TPU='slice', ZONE='zone', FOLDER='here')
  *command, line = shlex.split(stdout)
  assert code == 0
  assert command[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh']
  assert command[5:] == ['slice', '--zone=zone', '--worker=all']
  _, line = line.split('=', 1)
  train = ['.venv/bin/dsv3', 'train', '--cluster', *ARGS]
  assert shlex.split(line) == ['cd', 'here', '&&', *train]


def test_gke_jobset_has_a_pod_for_each_process():
  options = {'NAME': 'run', 'IMAGE': 'image', 'CLAIM': 'disk', 'PROCESSES': '4'}
  code, stdout, _ = dry('gke_jobset.sh', **options)
  assert code == 0
  jobset = yaml.safe_load(stdout)
  (job,) = jobset['spec']['replicatedJobs']
  spec = job['template']['spec']
  assert (spec['completions'], spec['parallelism']) == (4, 4)
  pod = spec['template']['spec']
  (container,) = pod['containers']
  assert container['command'] + container['args'] == ['dsv3', 'train', *ARGS]
  variables = {
    variable['name']: variable.get('value') for variable in container['env']
  }
  assert variables == {
    'JAX_COORDINATOR_ADDRESS': 'run-workers-0-0.run:8476',
    'JAX_NUM_PROCESSES': '4',
    'JAX_PROCESS_ID': None,  # the pod's index
  }


@pytest.mark.parametrize('name', ['tpu_pod.sh', 'gke_jobset.sh'])
def test_what_a_launcher_needs_it_asks_for(name):
  code, stdout, stderr = dry(name)
  assert (code, stdout) == (1, '')
  assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize('path', sorted(FOLDER.iterdir()), ids=lambda p: p.name)
def test_launchers_name_no_host_and_no_account(path):
  text = path.read_text(encoding='utf-8')
  assert os.access(path, os.X_OK)
  assert '@' not in text.replace('"$@"', '').replace('[@]', '').replace(
    'TERM@300', ''
  )
  assert subprocess.run(['bash', '-n', path]).returncode == 0
