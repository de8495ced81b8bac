"""`dsv3 schedule` as a user meets it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax.cli import main as cli

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(capsys, *args):
  """What the command prints when it ends well."""
  assert cli.main(['schedule', *args]) == 0
  out, err = capsys.readouterr()
  assert not err
  return out


def test_json_of_the_reports_figure(capsys):
  args = ['--kind=dualpipe', '--stages=8', '--microbatches=20', '--json']
  result = json.loads(run(capsys, *args))
  assert result['bubble'] == result['closed_form_bubble'] == 6
  assert result['total'] == 66 and result['bubble_fraction'] == 6 / 66
  assert result['peak_live_activations'] == [9] * 8
  assert result['parameter_copies'] == [2] * 8
  assert result['ranks'] == 8
  forwards = [row for row in result['table'] if 'forward' in row]
  assert len(forwards) == 8 * 20
  assert max(row['end'] for row in result['table']) == 66
  assert result == json.loads(run(capsys, '--json'))  # the defaults


def test_a_reader_that_leaves_is_no_fault():
  args = [sys.executable, '-m', 'dsv3_jax.cli', 'schedule']
  sizes = ['--stages=16', '--microbatches=1024']  # more than a pipe holds
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  with subprocess.Popen(args + sizes, cwd=_ROOT, text=True, **pipes) as child:
    assert child.stdout.readline()
    child.stdout.close()
    stderr = child.stderr.read()
  assert (child.returncode, stderr) == (141, '')


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    # --b is the full backward: by hand, formulas of the report's table 2.
    (['--kind=gpipe'], (7 * 3, 8, [20] * 8, 1)),
    (['--kind=1f1b', '--f=2', '--b=3'], (7 * 5, 8, [*range(8, 0, -1)], 1)),
    (['--kind=zb1p', '--f=2', '--b=5', '--w=2'], (7 * 3, 8, [8] * 8, 1)),
    (['--fb=2.5'], (3 * 1.5, 8, [9] * 8, 2)),
    (['--f=1.13', '--b=2.47', '--w=0.48'], (12.76, 8, [9] * 8, 2)),
    (['--kind=dualpipev'], (3 * 2, 4, [9] * 4, 2)),
    (['--kind=interleaved'], (3 * 3, 4, [11, 9, 7, 5], 1)),
    (['--kind=interleaved', '--chunks=4'], (3, 2, [9, 7], 1)),
    (['--kind=1f1b', '--split'], (7 * 2, 8, [*range(8, 0, -1)], 1)),
    (['--kind=gpipe', '--comm=0.5'], (7 * 4, 8, [20] * 8, 1)),
  ],
)
def test_figures(capsys, args, expected):
  result = json.loads(run(capsys, *args, '--json'))
  bubble, ranks, live, copies = expected
  assert result['bubble'] == bubble
  assert result['ranks'] == ranks
  assert result['peak_live_activations'] == live
  assert result['parameter_copies'] == [copies] * ranks


def test_uneven_stages(capsys):
  """The last stage takes twice as long: the others wait for it."""
  args = ['--kind=1f1b', '--stages=2', '--microbatches=10', '--f=1,2']
  result = json.loads(run(capsys, *args, '--b=2,4', '--w=1,2', '--json'))
  assert result['total'] == 1 + 10 * 6 + 2
  assert result['idle'] == [63 - 30, 3] and result['bubble'] == 33
  assert result['closed_form_bubble'] is None


def test_text_and_picture(capsys, tmp_path):
  path = tmp_path / 'drawn.png'
  args = ['--kind=1f1b', '--stages=2', '--microbatches=4', f'--png={path}']
  lines = run(capsys, *args).splitlines()
  assert lines[0] == '1f1b: 2 stages on 2 ranks, 4 micro-batches'
  assert lines[1] == 'total 15, bubble 3 (20.0%), by formula 3'
  assert lines[-1] == 'rank  1 | .  F0 B0 F1 B1 F2 B2 F3 B3 .'
  assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    (['--kind=2f2b'], "kind='2f2b' must be one of: gpipe, 1f1b, "),
    (
      ['--microbatches=12'],
      '>= 2 * stages = 16 under dualpipe: 16 is the near',
    ),
    (['--stages=7'], 'stages=7 must be a multiple of 2'),
    (['--stages=-4', '--microbatches=-9'], 'stages=-4'),
    (['--chunks=2'], 'chunks=2 is for interleaved, not for dualpipe'),
    (['--split'], 'dualpipe splits its backwards by itself'),
    (['--f=fast'], "f='fast' must be a number"),
    (['--f='], 'f has 0 values'),
    (['--b=1/0'], "b='1/0' must be a number"),
    (['--comm=nan'], "comm='nan' must be a number"),
    (['--w=1e13'], 'w=1e13 must be <= 1e12'),
    (['--fb=1,2'], 'fb has 2 values: it must be one, or one for each of the 8'),
    (['--w=3'], 'w=3 must be <= b=2 (stage 0)'),
    (['--png=a.jpg'], "png='a.jpg' must end in .png"),
    (['--png=nowhere/a.png'], 'png=nowhere/a.png: No such file'),
    (['--stages=1000', '--microbatches=2000'], '2000000 must be <= 200000'),
    (['--stages=x'], 'stages'),
  ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, args, expected):
  monkeypatch.chdir(tmp_path)
  assert cli.main(['schedule', *args]) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith('dsv3: ') and err.count('\n') == 1
  assert expected in err
  assert not list(tmp_path.iterdir())


def test_it_is_a_command_and_needs_no_jax():
  code = (
    'import sys\n'
    'from dsv3_jax.cli import main as cli\n'
    'assert cli.main(["schedule", "--kind=zb1p", "--json"]) == 0\n'
    'assert "jax" not in sys.modules\n'
  )
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    capture_output=True, text=True, cwd=_ROOT, env=os.environ, check=True,
  )  # fmt: skip
  assert json.loads(done.stdout)['bubble'] == 7
  done = subprocess.run(
    [sys.executable, '-m', 'dsv3_jax.cli', 'schedule', '--help'],
    capture_output=True, text=True, cwd=_ROOT, env=os.environ, check=True,
  )  # fmt: skip
  text = ' '.join(done.stdout.split())
  assert 'half of it for dualpipev and stages / chunks for' in text
