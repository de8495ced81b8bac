"""The tables of kernels that are compiled for hardware that is not there."""

import jax
import pytest

from benchmarks import compile_kernels_gpu, compile_kernels_tpu
from benchmarks.common import machine_code, targets
from tests.pallas import gpu

REPORT = """ptxas warning : Registers are spilled to local memory in function 'f', 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Compiling entry function 'f' for 'sm_90a'
    8 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""  # noqa: E501
SASS = """
  -:-:1:-:00  /*0750*/       USETMAXREG.DEALLOC.CTAPOOL 0x28
  -:2:-:Y:01  /*0d70*/  @UP1 UTMALDG.4D [UR16], [UR22]
  -:-:1:Y:02  /*1050*/       USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8
  -:-:-:Y:01  /*1910*/       QGMMA.64x192x32.F32.E4M3.E4M3 R24, gdesc[UR20], RZ
  -:-:-:Y:01  /*1a00*/       LDL.64 R2, [R1]
  -:-:-:Y:01  /*1a10*/       LDGDEPBAR
"""
MACHINE = machine_code.read(REPORT, SASS, 1.5)


def test_what_ptxas_reports_is_read():
  assert (MACHINE.registers, MACHINE.spilled) == (168, 40)
  assert MACHINE.asked_registers == [40, 232]
  counts = {name: MACHINE.count(name) for name in ('QGMMA', 'LDL', 'BAR')}
  assert counts == {'QGMMA': 1, 'LDL': 1, 'BAR': 0}


@pytest.mark.parametrize(
  'name',
  [
    'matmul wgrad down',
    'grouped fprop down',
    'attention fprop bfloat16 packed',
    'attention dq bfloat16 packed',
    'attention dkv bfloat16 packed',
    'decode fp8 heads_128_few_rows',
  ],
)
def test_a_program_has_one_kernel(name):
  program = compile_kernels_gpu.programs()[name]
  text = gpu.lower(program.function, *program.args)
  assert text.count('@mosaic_gpu_v2') == 1


def test_kernels_have_the_same_cases_on_both():
  of_gpu, of_tpu = (
    {name: (program.args, program.shape) for name, program in programs.items()}
    for programs in (
      compile_kernels_gpu.programs(),
      compile_kernels_tpu.programs(),
    )
  )
  both = of_gpu.keys() & of_tpu.keys()
  assert len(both) > 35
  assert all(of_gpu[name] == of_tpu[name] for name in both)
  assert of_gpu['matmul dgrad down'][1] == '4096 x 2048 x 7168'


def test_a_row_for_each_hopper_kernel(monkeypatch, tmp_path, capsys):
  compiled = []

  def compile_kernel(function, *args):
    compiled.append(args)
    return MACHINE

  monkeypatch.setattr(machine_code, 'compile_kernel', compile_kernel)
  output = tmp_path / 'table.md'
  compile_kernels_gpu.main(['--only=grouped', f'--output={output}'])
  text = output.read_text()
  assert len(compiled) == 6 and text.count('| grouped ') == 6
  row = '| 1.5 | 168 | 40, 232 | 40 | 1 | 0 | 1 | 0 | 0 | 1 | 0 | 0 |'
  assert text.count(row) == 6
  assert capsys.readouterr().out in text


@pytest.mark.parametrize(
  ('refused', 'code'), [('control', 0), ('', 1), ('fprop down', 1)]
)
def test_the_control_alone_is_refused(refused, code, monkeypatch, tmp_path):
  programs = compile_kernels_tpu.programs()
  names = {id(program): name for name, program in programs.items()}
  monkeypatch.setattr(compile_kernels_tpu, 'programs', lambda: programs)

  def compile_for(program, chip):
    name = names.get(id(program), 'control')
    return 'TOO_LARGE: by far\nMore' if name.endswith(refused or '-') else '1 s'

  monkeypatch.setattr(compile_kernels_tpu, 'compile_for', compile_for)
  output = tmp_path / 'table.md'
  args = ['--only=matmul', '--chip=v5p', f'--output={output}']
  assert compile_kernels_tpu.main(args) == code
  text = output.read_text()
  assert ('\ncontrol, v5p: TOO_LARGE: by far\n' in text) == (code == 0)
  assert 'More' not in text


def test_nothing_of_absent_hardware_is_cached():
  name = 'jax_enable_compilation_cache'
  before = getattr(jax.config, name)
  with targets.without_cache():
    assert not getattr(jax.config, name)
  assert getattr(jax.config, name) == before


@gpu.compiled
def test_a_kernel_compiles_twice():
  """The second time too: a cache cannot give back the first."""
  program = compile_kernels_gpu.programs()['quantize 2112 bfloat16']
  first, again = (
    machine_code.compile_kernel(program.function, *program.args)
    for _ in range(2)
  )
  assert first[:3] == again[:3] and not first.spilled
