"""Every experiment is read, counted, sharded and listed; none is trained."""

import importlib
import json
import math
import pathlib

import pytest

from dsv3_jax import config
from dsv3_jax.cli import main as cli

# How ml_collections reads a file.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Every file of experiments/ with every argument that it takes.
ARGUMENTS = {
  'ablations/fp8': ('', 'runlocal'),
  'base': ('', 'runlocal'),
  'laptop': ('', 'runlocal'),
  'long_context': ('32k', '128k', '128k,runlocal'),
  'quickstart': ('', 'runlocal'),
  'v3_16b': ('', 'runlocal'),
  'v3_671b': ('', 'pod', 'runlocal'),
}
# The model of 671B again: 'pod' has it on a mesh.
NIGHTLY = {('base', ''), ('v3_671b', '')}
NIGHTLY |= {('long_context', '32k'), ('long_context', '128k')}
EXPERIMENTS = [
  pytest.param(
    name, arg, marks=pytest.mark.nightly if (name, arg) in NIGHTLY else ()
  )
  for name, args in ARGUMENTS.items()
  for arg in args
]


def flag(name, arg):
  return f'--config=experiments/{name}.py' + (f':{arg}' if arg else '')


def read(name, arg):
  module = importlib.import_module(f'experiments.{name.replace("/", ".")}')
  return config.from_config_dict(module.get_config(arg))


def run(capsys, *args):
  assert cli.main(list(args)) == 0, capsys.readouterr().err
  return capsys.readouterr().out


def test_all_experiments_are_here():
  files = (ROOT / 'experiments').rglob('*.py')
  names = {
    path.relative_to(ROOT / 'experiments').with_suffix('').as_posix()
    for path in files
    if path.stem != '__init__'
  }
  assert names == set(ARGUMENTS)


@pytest.mark.parametrize(('name', 'arg'), EXPERIMENTS)
def test_inspect_sharding_and_manifest_agree(monkeypatch, capsys, name, arg):
  """The same parameters, counted in three ways, on a mesh of any size."""
  monkeypatch.chdir(ROOT)
  cfg = read(name, arg)
  counted = json.loads(run(capsys, 'inspect', flag(name, arg), '--json'))
  main, mtp = (counted['parameters'][k] for k in ('main', 'mtp_unique'))
  assert f'{main:,}' in run(capsys, 'inspect', flag(name, arg))

  options = ('--sharding', '--json')
  sharded = json.loads(run(capsys, 'inspect', flag(name, arg), *options))
  held = sum(row['elements'] for row in sharded['arrays'])
  assert held == sharded['total']['elements']
  # Stages of a pipeline have room for the most layers that one has.
  most = 1.0 if cfg.parallel.pipe == 1 else 1.15
  assert main + mtp <= held <= most * (main + mtp)
  axes = ('pipe', 'data', 'node', 'expert', 'context')
  devices = math.prod(getattr(cfg.parallel, axis) for axis in axes)
  per_device = sharded['total']['master_per_device']  # without the biases
  assert 0.99 * held / devices <= per_device <= 1.1 * held / devices

  lines = run(capsys, 'manifest', flag(name, arg), '--dtype=bfloat16')
  shapes = [line.split('\t')[2].split('x') for line in lines.splitlines()]
  stored = counted['parameters']['mtp_stored']
  assert sum(math.prod(map(int, shape)) for shape in shapes) == main + stored
