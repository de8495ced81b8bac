"""The border: experiments in, frozen dataclasses or one clear line out."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import pytest

from dsv3_jax import config, errors
from experiments import base
from tests import settings

_ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(
  '.'.join(path.relative_to(_ROOT).with_suffix('').parts)
  for path in (_ROOT / 'experiments').rglob('*.py')
  if path.stem != '__init__'
)


@pytest.mark.parametrize('name', EXPERIMENTS)
@pytest.mark.parametrize('arg', ['', 'runlocal'])
def test_every_experiment_is_legal_and_locked(name, arg):
  source = importlib.import_module(name).get_config(arg)
  assert source.is_locked
  built = config.from_config_dict(source)
  again = config.from_config_dict(json.loads(config.to_json(built)))
  assert again == built


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_unknown_argument_is_refused(name):
  module = importlib.import_module(name)
  with pytest.raises(ValueError, match=r"'nonsense'.*runlocal"):
    module.get_config('nonsense')


def test_report_numbers():
  """What TR 4.2 fixes, so that no edit moves the base silently."""
  cfg = config.from_config_dict(base.get_config())
  assert (cfg.model.num_layers, cfg.model.d_model) == (61, 7168)
  assert cfg.model.moe.num_experts == 256
  assert cfg.model.moe.route_scale == 2.5
  assert cfg.optim.lr.peak == 2.2e-4
  assert cfg.train.batch_size_start == 3072
  assert cfg.train.batch_size == 15360
  pieces = cfg.optim.lr
  tokens = pieces.constant_tokens + pieces.decay_tokens + pieces.hold_tokens
  assert cfg.train.total_tokens - tokens == 167_000_000_000


def changed(path, value):
  tree = config.to_dict(settings.small())
  node, keys = tree, path.split('.')
  for key in keys[:-1]:
    node = node[key]
  node[keys[-1]] = value
  return tree


@pytest.mark.parametrize(
  ('path', 'value', 'expected'),
  [
    ('model.moe.top_k', 9, 'model.moe.top_k=9 must be <= model.moe.num_expe'),
    ('model.moe.top_k', 5, 'model.moe.top_k=5 must be <= 4: '),
    ('model.moe.num_groups', 3, 'model.moe.num_groups=3 must divide'),
    ('model.moe.buffer_factor', 0.5, 'buffer_factor=0.5 must be >= 1'),
    ('model.moe.buffer_factor', float('inf'), 'buffer_factor=inf must be fin'),
    ('model.moe.top_groups', 5, 'model.moe.top_groups=5 must be <= '),
    ('model.max_seq_len', 16 * 40 + 1, 'model.max_seq_len=641 must be <= 640'),
    ('model.num_dense_layers', 4, 'model.num_dense_layers=4 must be <= '),
    ('model.mla.qk_rope_head_dim', 5, 'must be even'),
    ('model.rope.beta_slow', 64.0, 'model.rope.beta_fast=32.0 must be >'),
    ('model.moe.score_func', 'tanh', "must be one of: sigmoid, softmax"),
    ('precision', 'fp4', 'must be one of: bf16, fp8, fp8_block_dgrad, f32'),
    ('model.remat', 'some', "model.remat='some' must be one of"),
    ('model.d_model', 0, 'model.d_model=0 must be > 0'),
    ('model.mtp.depth', -1, 'model.mtp.depth=-1 must be >= 0'),
    ('model.mtp.depth', 12, 'must be < data.seq_len=12'),
    ('optim.beta2', 1.0, 'optim.beta2=1.0 must be < 1'),
    ('optim.lr.peak', float('nan'), 'must be finite'),
    ('data.bad_records', 'drop', 'must be one of: refuse, skip'),
    ('data.on_change', '', "data.on_change='' must be one of: refuse, contin"),
    ('data.fim_rate', 1.5, 'data.fim_rate=1.5 must be <= 1'),
    ('data.seq_len', 17, 'data.seq_len=17 must be <= model.max_seq_len=16'),
    ('train.batch_size', 6, 'multiple of train.microbatch_size=4'),
    ('parallel.data', 3, 'train.microbatch_size=4 must be a multiple of 3 = '
     'parallel.data * parallel.node * parallel.expert: 3 or 6'),
    ('parallel.pipe', 2, 'parallel.pipe=2 must divide model.vocab_size=23, '
     'which it shards: 1 or 23'),
    ('parallel.model', 2, 'parallel.model=2 must be 1'),
    ('parallel.context', 4, 'data.seq_len=12 must be a multiple of 8 = '
     '2 * parallel.context, for each device has two pieces of a sequence: '
     '8 or 16'),
    ('parallel.fsdp', ('pipe',), "parallel.fsdp=('pipe',) must be of: data"),
    ('parallel.fsdp', ('data', 'data'), 'must name each axis once'),
    ('parallel.schedule', 'zbv', 'must be one of: gpipe, 1f1b, inter'),
    ('eval.stride', 13, 'eval.stride=13 must be <= data.seq_len=12'),
    ('checkpoint.restore_step', -2, 'must be a step or -1'),
    ('model.moe.topk', 2, 'model.moe.topk is unknown; did you mean '
     'model.moe.top_k?'),
    ('optimizer', {}, 'optimizer is unknown; did you mean optim?'),
    ('model.vocab_size', '23', "model.vocab_size='23' must be of type int"),
    ('model.scan_layers', 1, 'must be of type bool'),
    ('train.batch_size', True, 'must be of type int'),
    ('model.moe', 3, 'model.moe=3 must be a group of settings'),
    ('sample.prompts', 'text', 'must be a tuple of strings'),
  ],
)  # fmt: skip
def test_one_clear_line(path, value, expected):
  with pytest.raises(errors.InputError, match=r'must|unknown') as caught:
    config.from_config_dict(changed(path, value))
  message = str(caught.value)
  assert expected in message
  assert '\n' not in message


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({}, ''),
    ({'train.batch_size_start': 24},
     'train.batch_size_start=24 must be <= train.batch_size=16'),
    ({'train.batch_size_start': 4}, 'train.batch_size_start=4 must be a '
     'multiple of train.batch_size_step=8: 8'),
    ({'train.batch_size_step': 2}, 'train.batch_size_step=2 must be a multiple '
     "of 4, for parallel.schedule='dualpipe' and "
     'train.microbatch_size=4: 4'),
    ({'train.batch_size_step': 4, 'parallel.pipe': 2,
      'model.vocab_size': 24}, 'multiple of 8, for parallel'),
    ({'train.batch_size_step': 4, 'parallel.pipe': 3, 'model.vocab_size': 24,
      'parallel.schedule': 'interleaved', 'eval.batch_size': 6},
     "multiple of 12, for parallel.schedule='interleaved'"),
  ],
)  # fmt: skip
def test_a_batch_grows_by_what_the_schedule_takes(changes, expected):
  tree = changed('train.batch_ramp_tokens', 1000)
  tree['train'].update(batch_size=16, batch_size_start=8, batch_size_step=8)
  for path, value in changes.items():
    group, name = path.split('.')
    tree[group][name] = value
  if not expected:
    config.from_config_dict(tree)
    return
  with pytest.raises(errors.InputError, match=re.escape(expected)):
    config.from_config_dict(tree)


@pytest.mark.parametrize(
  ('path', 'value', 'expected'),
  [
    ('parallel.pipe', 2, 'parallel.pipe=2 must be 1 if deterministic'),
    ('parallel.fsdp', ('data',), "parallel.fsdp=('data',) must be ()"),
    ('balance.kind', 'batch', "balance.kind='batch' must be another"),
    ('train.microbatch_size', 3, 'microbatch_size=3 must be a power of 2'),
  ],
)
def test_what_would_tie_bits_to_the_mesh_is_refused(path, value, expected):
  tree = changed('parallel.deterministic', True)
  tree['train']['batch_size'] = 24
  config.from_config_dict(tree)
  group, name = path.split('.')
  tree[group][name] = value
  with pytest.raises(errors.InputError, match=re.escape(expected)):
    config.from_config_dict(tree)


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [
    ({'expert': 3}, 'parallel.node * parallel.expert = 3 must divide '
     'model.moe.num_experts=8: 2 or 4'),
    ({'expert': 16}, 'must divide model.moe.num_experts=8: 8'),
    ({'node': 8}, 'parallel.node=8 must divide model.moe.num_groups=4, so '
     'that no group spans two nodes: 4'),
  ],
)  # fmt: skip
def test_experts_and_groups_align_with_the_mesh(sizes, expected):
  tree = changed('train.microbatch_size', 48)
  tree['train'].update(batch_size=48)
  tree['eval']['batch_size'] = 48
  config.from_config_dict(tree)
  tree['parallel'].update(sizes)
  with pytest.raises(errors.InputError, match=re.escape(expected)):
    config.from_config_dict(tree)


def test_groups_of_one_expert_have_no_best_two():
  """Sigmoid gates score a group by its best two (TR 2.1.2)."""
  tree = changed('model.moe.num_groups', 8)
  tree['model']['moe']['top_groups'] = 4
  with pytest.raises(errors.InputError, match='scored by its best two'):
    config.from_config_dict(tree)


def test_fp8_has_its_own_product_of_experts():
  tree = changed('precision', 'fp8')
  config.from_config_dict(tree)
  tree['model']['moe']['product'] = 'blocks'
  expected = r"product='blocks' must be auto with precision='fp8'"
  with pytest.raises(errors.InputError, match=expected):
    config.from_config_dict(tree)


def test_missing_key_is_named():
  tree = config.to_dict(settings.small())
  del tree['optim']['lr']['peak']
  with pytest.raises(errors.InputError, match=r'optim\.lr\.peak is missing'):
    config.from_config_dict(tree)


def test_int_passes_as_float():
  built = config.from_config_dict(changed('optim.clip_norm', 2))
  assert built.optim.clip_norm == 2.0
  assert type(built.optim.clip_norm) is float


def test_experiments_are_read_without_jax_in_two_seconds():
  """Refusal comes before anything compiles, and soon."""
  code = (
    'import sys\n'
    'from dsv3_jax import config\n'
    'from experiments import v3_671b\n'
    'c = v3_671b.get_config()\n'
    'c.model.moe.top_k = 300\n'
    'try:\n'
    '  config.from_config_dict(c)\n'
    'except ValueError as error:\n'
    '  print(error)\n'
    "assert 'jax' not in sys.modules\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=_ROOT
  )
  out = done.stdout + done.stderr
  assert not done.returncode, out
  assert out.startswith('model.moe.top_k=300 must be <=')
