"""`dsv3 plan` as a user meets it."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from dsv3_jax.cli import main as cli
from dsv3_jax.planning import search

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# How ml_collections loads an experiment.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')
POD = '--config=experiments/v3_671b.py:pod'
PLAIN = '--config=experiments/v3_671b.py'
H800 = ('--chip=h800', '--chips=2048')
LITTLE_ROOM = '--config.model.moe.buffer_factor=1.0'


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
  # ml_collections runs every experiment in one module: forget the last one's.
  sys.modules.pop('config_config', None)
  monkeypatch.chdir(_ROOT)


def run(capsys, *args):
  """What the command prints when it ends well."""
  sys.modules.pop('config_config', None)
  assert cli.main(['plan', *args]) == 0
  out, err = capsys.readouterr()
  assert not err
  return out


@pytest.mark.parametrize('config', [POD, PLAIN])
def test_json(capsys, monkeypatch, config):
  monkeypatch.setattr(search, 'nearest', lambda cfg, chip, layout: None)
  result = json.loads(run(capsys, config, *H800, '--json'))
  assert set(result) >= {
    'step_seconds', 'tokens_per_second', 'mfu', 'gpu_hours', 'dollars',
    'gpu_hours_per_trillion_tokens', 'memory_bytes_per_chip', 'fits',
    'assumptions',
  }  # fmt: skip
  assert result['gpu_hours_per_trillion_tokens'] == pytest.approx(
    180e3, rel=0.08
  )
  assert result['gpu_hours'] == pytest.approx(2664e3, rel=0.08)
  assert result['dollars'] == pytest.approx(2 * result['gpu_hours'])
  assert result['mfu'] == pytest.approx(0.3894, rel=0.08)
  assert result['tokens_per_second'] * result['step_seconds'] == pytest.approx(
    15360 * 4096
  )
  parts = dict(result['memory_bytes_per_chip'])
  assert parts.pop('total') == pytest.approx(sum(parts.values()))
  assert result['fits'] is False and result['nearest'] is None
  assert all(isinstance(text, str) for text in result['assumptions'])
  assert any('not modelled' in text for text in result['assumptions'])


def test_buffer_factor_and_vocabulary_change_the_plan(capsys):
  small = (LITTLE_ROOM, '--vocabulary=sharded')
  result = json.loads(run(capsys, POD, *H800, *small, '--json'))
  assert result['fits'] is True and 'nearest' not in result
  assert result['layout']['vocabulary'] == 'sharded'


def test_text_search_and_fewest(capsys):
  args = ('--config=experiments/v3_16b.py', '--chips=4', '--chip=h100')
  args += ('--config.model.num_layers=4',)
  out = run(capsys, *args, '--search', '--fewest')
  assert re.search(r'step +[\d.]+ s \+- \d+%', out)
  assert 'no price known: give --price' in out
  assert 'fewest chips (a power of two): ' in out
  assert out.count('sequences remat=') > 5
  priced = json.loads(run(capsys, *args, '--price=3', '--json'))
  assert priced['dollars'] == pytest.approx(3 * priced['gpu_hours'])


def test_cost_table(capsys):
  text = run(capsys, '--cost_table')
  assert re.search(r'\| step, s \| [\d.]+ \|.*\| 19.93 \| [+-]', text)
  rows = json.loads(run(capsys, '--cost_table', '--json'))
  assert rows['pre-training, K hours']['published'] == 2664
  assert rows['pre-training, K hours']['within_target'] is True
  assert rows['weight, s']['within_target'] is False
  assert all(row['why'] for row in rows.values() if not row['within_target'])


def test_pictures_need_nothing_else(capsys, tmp_path):
  small = LITTLE_ROOM
  png, page = tmp_path / 'a.png', tmp_path / 'a.html'
  run(capsys, POD, *H800, small, f'--png={png}', f'--html={page}')
  assert png.read_bytes().startswith(b'\x89PNG')
  assert len(png.read_bytes()) > 5000
  text = page.read_text(encoding='utf-8')
  assert text.startswith('<!doctype html>')
  assert 'data:image/png;base64,' in text
  assert 'gpu_hours_per_trillion_tokens' in text and 'Assumptions' in text
  links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)', text)
  assert links and all(link.startswith('data:') for link in links)
  assert '<script' not in text and 'url(' not in text


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ((PLAIN, '--chip=h8000'), "chip='h8000' is unknown; did you mean h800?"),
    ((POD, '--chips=1000'), 'chips=1000 must be a multiple of 2048'),
    ((POD, '--chips=16384'), 'must be even and >='),
    ((PLAIN, '--chips=0'), 'chips=0 must be >= 1'),
    ((PLAIN, '--chips=7777'), 'chips=7777 has no legal layout'),
    ((), '--config=FILE.py is missing'),
    (
      (POD, LITTLE_ROOM.replace('1.0', '0.5')),
      'buffer_factor=0.5 must be >= 1',
    ),
    ((POD, '--price=-1'), 'price=-1.0 must be > 0'),
    ((POD, '--save_seconds=nan'), 'save_seconds=nan must be > 0'),
    ((POD, '--restore_seconds=-1'), 'restore_seconds=-1.0 must be >= 0'),
    ((POD, '--png=a.jpg'), "png='a.jpg' must end in .png"),
    ((POD, '--html=a'), "html='a' must end in .html"),
    (
      (POD, LITTLE_ROOM, '--html=/no/such/a.html'),
      '/no/such/a.html: No such file',
    ),
    ((POD, '--vocabulary=x'), 'vocabulary'),
    ((POD, '--config.parallel.pipe=64'), 'eval.batch_size=2048 must'),
  ],
)
def test_refusals_are_one_line(capsys, args, message):
  assert cli.main(['plan', *args]) == 2
  out, err = capsys.readouterr()
  assert not out
  assert message in err and err.count('\n') == 1


def test_planning_imports_no_jax():
  code = (
    'import sys\n'
    'from dsv3_jax.cli import plan\n'
    'from dsv3_jax.planning import report, search\n'
    'assert not [x for x in sys.modules if x.startswith(("jax", "flax"))]\n'
    'assert "matplotlib" not in sys.modules\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=_ROOT)
