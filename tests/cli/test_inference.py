"""generate, chat and serve as a user meets them, on a run of a few steps."""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

import dsv3_jax
from benchmarks import speculation
from dsv3_jax import config
from dsv3_jax.cli import inference as cli_inference
from dsv3_jax.cli import main as cli
from dsv3_jax.server import main as server_main
from experiments import v3_671b
from pallas_kernels import quantized
from tests import limits
from tests.cli import commands

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['generate', '--checkpoint=x', '--top_k=-1'], 'top_k=-1 must be in'),
    (['generate', '--checkpoint=x', '--prompts=no.jsonl'], 'prompts=no.jsonl:'),
    (['chat'], '--checkpoint=DIR is missing'),
    (['chat', '--checkpoint=x', '--top_p=2'], 'top_p=2.0 must be in (0, 1]'),
    (['serve'], '--checkpoint=DIR is missing'),
    (['serve', '--checkpoint=x', '--max_rows=0'], 'max_rows=0 must be >= 1'),
    (['serve', '--checkpoint=x', '--port=99999'], 'port=99999 must be in'),
    (['serve', '--checkpoint=x', '--cache_tokens=-1'], 'cache_tokens=-1 must'),
    (['serve', '--checkpoint=x', '--host='], '--host=ADDRESS is empty'),
    (['generate', '--checkpoint=x', '--max_new_tokens=0'], 'max_new_tokens=0'),
    (['chat', '--checkpoint=x', '--max_new_tokens=0'], 'max_new_tokens=0 must'),
    (['serve', '--checkpoint=x', '--step=-2'], 'step=-2 must be >= -1'),
    (['generate', '--checkpoint=x'], 'x/config.json'),
    (['serve', '--checkpoint=x', '--parallel.data=9'], 'need 9 devices, 8 are'),
    (['chat', '--checkpoint=x', '--redundant_experts=4'], 'needs rebalance_ev'),
    (['chat', '--checkpoint=x', '--parallel.model=0'], 'parallel.model=0 must'),
    (
      ['generate', '--checkpoint=x', '--rebalance_every=-1'],
      'every=-1 must be',
    ),
  ],
)
def test_bad_input_is_one_line(capsys, args, message):
  assert cli.main(args) == 2
  out, err = capsys.readouterr()
  assert message in err and err.count('\n') == 1 and not out


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"prompt": "a"}\n{"prompt": 3}\n', 'in.jsonl:2 must be an object with'),
    ('{"prompt": "a"\n', 'in.jsonl:1 is no JSON'),
    ('[' * 100_000, 'in.jsonl:1 is no JSON'),
    ('\n\n', 'in.jsonl has no prompt'),
    ('{"prompt": "a", "seed": 3}', '1 has "seed": --seed sets it for all'),
    ('{"prompt": "a", "text": "b"}', '1 has "text": the output has this'),
  ],
)
def test_wrong_files_of_prompts_are_refused(tmp_path, capsys, text, message):
  path = tmp_path / 'in.jsonl'
  path.write_text(text)
  assert cli.main(['generate', '--checkpoint=x', f'--prompts={path}']) == 2
  assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_refused(trained, tmp_path, capsys):
  shutil.copy(trained / 'config.json', tmp_path)
  assert cli.main(['generate', f'--checkpoint={tmp_path}']) == 2
  expected = f'there is no tokenizer.json in {tmp_path}'
  assert expected in capsys.readouterr().err


def test_prompts_of_a_file(trained, tmp_path, capsys):
  path = tmp_path / 'in.jsonl'
  prompts = ['import ', 'def f(', 'x\u2028']  # which ends no line of JSON
  lines = [
    json.dumps({'prompt': p, 'id': i}, ensure_ascii=False)
    for i, p in enumerate(prompts)
  ]
  path.write_text('\n'.join(lines), encoding='utf-8')
  args = [f'--checkpoint={trained}', '--max_new_tokens=6', '--temperature=0']
  assert cli.main(['generate', f'--prompts={path}', *args]) == 0
  out, err = capsys.readouterr()
  rows = list(map(json.loads, out.splitlines()))
  assert [(row['id'], row['prompt']) for row in rows] == [*enumerate(prompts)]
  assert [row['tokens'] for row in rows] == [6, 6, 6]
  speed = json.loads(err.splitlines()[-1])
  assert speed['tokens_per_second'] > 0 and 'acceptance' not in speed
  one = ['generate', '--prompt=def f(', '--json', *args]
  assert cli.main(one) == 0
  assert json.loads(capsys.readouterr().out)['text'] == rows[1]['text']


@pytest.mark.nightly
def test_speculation_gives_the_same_text_and_says_how_it_went(trained, capsys):
  args = ['generate', f'--checkpoint={trained}', '--prompt=def f(', '--json']
  args += ['--max_new_tokens=6', '--temperature=0']
  assert cli.main(args) == 0
  want = json.loads(capsys.readouterr().out)['text']
  assert cli.main([*args, '--num_speculative_tokens=2']) == 0
  out, err = capsys.readouterr()
  assert json.loads(out)['text'] == want
  drafted = json.loads(err.splitlines()[-1])
  assert 0 <= drafted['acceptance'] <= 1 <= drafted['tokens_per_step'] <= 3


@pytest.mark.nightly
def test_old_flags_work_and_warn_in_one_line(trained, capsys):
  args = ['generate', f'--checkpoint={trained}', '--max_new_tokens=4', '--json']
  for old, new, name in (
    ('--num_drafts=1', '--num_speculative_tokens=1', 'num_drafts'),
    ('--invariant', '--batch_invariant', 'invariant'),
  ):
    assert cli.main([*args, new]) == 0
    wanted = capsys.readouterr()
    assert 'deprecated' not in wanted.err
    assert cli.main([*args, old]) == 0
    out, err = capsys.readouterr()
    use = new.removesuffix('=1')
    warning, *rest = err.splitlines()
    assert warning == f'dsv3: --{name} is deprecated: use {use}'
    assert len(rest) == wanted.err.count('\n')
    assert out == wanted.out
    speeds = [json.loads(text.splitlines()[-1]) for text in (wanted.err, err)]
    assert speeds[0].keys() == speeds[1].keys()
    assert cli.main([*args, old, new]) == 2
    assert f'--{name} is the old name of {use}' in capsys.readouterr().err


def test_the_engine_is_as_the_flags_say(trained, monkeypatch, capsys):
  models, load = [], dsv3_jax.load
  spy = lambda *args, **options: (
    models.append(load(*args, **options)) or models[-1]
  )
  monkeypatch.setattr(dsv3_jax, 'load', spy)
  args = ['generate', f'--checkpoint={trained}', '--max_new_tokens=2']
  for more in ([], ['--fp8_cache']):
    assert cli.main([*args, *more]) == 0
  kept = [loaded.runner.empty_caches(1, 64).moe for loaded in models]
  is_fp8 = [isinstance(c.c_LpsC, quantized.Quantized) for c in kept]
  assert is_fp8 == [False, True]


def test_all_is_checked_before_weights_are_read(trained, monkeypatch, capsys):
  monkeypatch.setattr(dsv3_jax, 'load', lambda *args, **options: 1 / 0)
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    for name, args, message in (
      ('generate', ['--max_new_tokens=999'], '=999 must be below model.max_s'),
      ('chat', ['--system=' + 'a b ' * 999], 'before a word is said, has'),
      ('chat', ['--max_new_tokens=999'], '=999 must be below model.max_s'),
      ('serve', [f'--port={port}'], f'port={port}: Address already in use'),
      ('serve', ['--host=::1%nowhere'], 'host=::1%nowhere, port=8000:'),
    ):
      assert cli.main([name, f'--checkpoint={trained}', *args]) == 2
      out, err = capsys.readouterr()
      assert message in err and err.count('\n') == 1 and not out


def test_without_a_number_as_many_tokens_as_fit(trained, capsys):
  args = [f'--checkpoint={trained}', '--temperature=0', '--json']
  assert cli.main(['generate', '--prompt=import ', *args]) == 0
  assert json.loads(capsys.readouterr().out)['text']


MESH = ['--parallel.data=2', '--parallel.expert=2', '--parallel.model=2']
MESH += ['--redundant_experts=4', '--rebalance_every=3']
NODES = ['--parallel.node=2', '--parallel.expert=2']  # two hops


@pytest.mark.nightly
@pytest.mark.parametrize(
  'mesh', [MESH, pytest.param(NODES, marks=pytest.mark.nightly)]
)
def test_a_mesh_gives_the_same_text(trained, capsys, mesh):
  args = [f'--checkpoint={trained}', '--max_new_tokens=6', '--temperature=0']
  args += ['--json', '--prompt=import ', '--prompt=def f(', '--prompt=x']
  outputs = []
  for more in ([], mesh):
    assert cli.main(['generate', *args, *more]) == 0
    outputs.append(capsys.readouterr())
  assert outputs[0].out == outputs[1].out
  speed = [json.loads(output.err.splitlines()[-1]) for output in outputs]
  assert 'balancedness' not in speed[0]
  if mesh == MESH:
    assert 0.5 <= speed[1]['balancedness'] <= 1


def test_a_mesh_that_the_model_does_not_fit_is_one_line(trained, capsys):
  args = ['generate', f'--checkpoint={trained}']
  assert cli.main([*args, '--parallel.expert=3']) == 2
  assert '= 3 must divide model.moe.num_experts=' in capsys.readouterr().err
  args += ['--parallel.expert=2', '--redundant_experts=3']
  assert cli.main([*args, '--rebalance_every=9']) == 2
  assert '= 2 slots: 2 or 4' in capsys.readouterr().err


@pytest.mark.nightly
def test_the_benchmark_of_speculation(trained, tmp_path, capsys):
  path = tmp_path / 'speculation.md'
  args = ['--prompts=2', '--new_tokens=4', '--rounds=1', '--most=1', '--json']
  args += ['--prompt_tokens=20', f'--checkpoint={trained}', f'--output={path}']
  assert speculation.main(args) == 0
  rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
  wanted = [(t, b, k) for t in (0.0, 1.0) for b in (1, 2) for k in (0, 1)]
  keys = ('temperature', 'batch', 'speculative_tokens')
  assert [tuple(row[key] for key in keys) for row in rows] == wanted
  assert rows[0]['speed_ratio'] == 1.0 and rows[0]['accepted'] is None
  assert 0 <= rows[1]['accepted'] <= 1 and rows[1]['tokens_per_step'] <= 2
  assert rows[0]['read'] == 1.0 and rows[1]['read'] > 1.0
  assert 'held-out tokens' in path.read_text()
  assert all(row['equal'] == 1.0 for row in rows)
  with pytest.raises(SystemExit) as stopped:
    speculation.main([f'--checkpoint={trained}', '--new_tokens=4'])
  assert stopped.value.code == 2


def test_weights_that_a_step_with_speculative_tokens_reads():
  model = config.from_config_dict(v3_671b.get_config()).model
  table = 129_280 * 7_168  # the embedding, and the head
  main, mtp = 671_026_419_200 - table, 11_610_068_224 + table
  for count in (0, 1, 2):  # so many tokens reach every expert
    read = speculation.weights_read(model, 4096, count)
    assert read == pytest.approx(main + count * mtp)
  alone = speculation.weights_read(model, 1, 0)
  active = 37_552_282_624 - table
  assert alone == pytest.approx(active, rel=1e-4)  # active has no router bias


def test_chat_answers_line_by_line_until_it_is_full(
  trained, monkeypatch, capsys
):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('Hello\n' * 99))
  args = ['chat', f'--checkpoint={trained}', '--temperature=0']
  assert cli.main(args) == 2
  out, err = capsys.readouterr()
  assert out.endswith('\n') and out.strip()
  assert 'the prompt has' in err and err.count('\n') == 1


def test_serve_until_a_signal(trained, env):
  import openai  # slow, so not by those who only collect tests

  flags = ('--port=0', '--name=mine', '--max_rows=1', '--cache_tokens=64')
  args = commands.command('serve', f'--checkpoint={trained}', *flags)
  with subprocess.Popen(
    args, stdout=subprocess.PIPE, env=env | {'DSV3_API_KEY': 'k'}, text=True
  ) as child:
    try:
      line = child.stdout.readline()
      match = re.fullmatch(r'serving mine on (http://127\.0\.0\.1:\d+)\n', line)
      options = {'base_url': f'{match[1]}/v1', 'max_retries': 0}
      with openai.OpenAI(api_key='k', **options) as ask:
        response = ask.completions.create(
          model='mine', prompt='import ', max_tokens=6, temperature=0
        )
        assert response.usage.completion_tokens in range(1, 7)
        parts = ask.chat.completions.create(
          model='mine',
          messages=[{'role': 'user', 'content': 'x = 1'}],
          max_completion_tokens=4,
          stream=True,
        )
        assert list(parts)[-1].choices[0].finish_reason in ('stop', 'length')
      wrong = openai.OpenAI(api_key='wrong', **options)
      with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    finally:
      child.send_signal(signal.SIGTERM)
    child.wait(timeout=limits.HANG)
  assert child.returncode == 0


def test_serve_passes_its_flags_on(trained, monkeypatch):
  """To the server's `run`; what each does is tested there."""
  seen = {}
  monkeypatch.delenv('DSV3_API_KEY', raising=False)
  monkeypatch.setattr(
    server_main, 'run', lambda model, bound, **options: seen.update(options)
  )
  args = ['serve', f'--checkpoint={trained}', '--port=0']
  assert cli.main(args) == 0
  assert seen['name'] == trained.name and seen['warm_up'] is True
  assert (seen['max_waiting'], seen['max_tokens']) == (256, 4096)
  assert (seen['max_rows'], seen['cache_tokens']) == (16, 0)
  assert seen['batch_invariant'] is False
  args += ['--max_waiting=3', '--max_tokens=9', '--max_rows=5', '--name=mine']
  args += ['--cache_tokens=640', '--warm_up=false', '--batch_invariant']
  assert cli.main(args) == 0
  want = {'max_waiting': 3, 'max_tokens': 9, 'max_rows': 5, 'name': 'mine'}
  want |= {'cache_tokens': 640, 'warm_up': False, 'batch_invariant': True}
  assert seen == want | {'api_key': ''}


def test_an_empty_key_is_no_key(monkeypatch, capsys):
  monkeypatch.setenv('DSV3_API_KEY', '')
  assert cli.main(['serve', '--checkpoint=x']) == 2
  assert 'DSV3_API_KEY is empty' in capsys.readouterr().err
  monkeypatch.setenv('DSV3_API_KEY', os.fsdecode(b'k\xff'))
  assert cli.main(['serve', '--checkpoint=x']) == 2
  assert 'DSV3_API_KEY must have printable' in capsys.readouterr().err
  monkeypatch.delenv('DSV3_API_KEY')
  assert cli.main(['serve', '--checkpoint=x', '--name=a\n']) == 2
  assert 'name must have printable' in capsys.readouterr().err


def test_thoughts_are_told_apart():
  pieces = [(True, 'a'), (True, 'b'), (False, 'c'), (False, 'd'), (True, 'e')]
  shown = lambda *args: ''.join(cli_inference.shown_pieces(*args))
  assert shown(pieces, False) == '<think>ab</think>cd<think>e</think>'
  assert shown(pieces[2:4], False) == 'cd'
  dim = '\x1b[2m{}\x1b[0m'.format
  assert shown(pieces[1:3], True) == dim('b') + 'c'


def test_chat_is_left_by_an_interrupt(trained, monkeypatch, capsys):
  class Input:
    isatty = staticmethod(lambda: True)

    def readline(self):
      raise KeyboardInterrupt

  monkeypatch.setattr(sys, 'stdin', Input())
  assert cli.main(['chat', f'--checkpoint={trained}']) == 0
  assert capsys.readouterr().out == '> '


def test_what_is_said_must_be_text(trained, env):
  args = commands.command(
    'chat', f'--checkpoint={trained}', '--max_new_tokens=1'
  )
  env = env | {'PYTHONIOENCODING': 'utf-8:strict'}
  done = subprocess.run(args, input=b'\xff\n', capture_output=True, env=env)
  assert done.returncode == 2
  assert done.stderr.count(b'\n') == 1 and b'is no text' in done.stderr
