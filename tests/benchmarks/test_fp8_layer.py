"""Which quantisers a layer calls, and their share of its time."""

import pytest

from benchmarks import fp8_layer
from benchmarks.common import clock


@pytest.fixture(scope='module')
def layer():
  return fp8_layer.Layer(fp8_layer.make_config(32, tiny=True))


def test_layer_is_one_of_the_published_model():
  cfg = fp8_layer.make_config(4096)
  net = cfg.model
  assert (net.d_model, net.moe.d_ff, net.mla.num_heads) == (7168, 2048, 128)
  assert cfg.precision == 'fp8' and net.moe.top_k == net.moe.num_experts


def test_every_quantiser_of_the_layer_is_counted(layer):
  """Counted by hand from the report's linears (TR 3.3.1, 3.3.3)."""
  calls_of = {}
  for call, count in fp8_layer.trace(layer):
    calls_of[call.name] = calls_of.get(call.name, 0) + count
  # Forward: x, q latent, kv latent, attention's output, MoE's input for shared
  # and for routed experts; of each SwiGLU its product and both inputs.
  assert (
    calls_of['quantizers.rows'] == 6 + 2 * 3 + 1
  )  # + dy sent to the experts
  assert calls_of['e5m6.quantize'] == 1
  assert (
    calls_of['e5m6.unpack'] == 2
  )  # attention's backward pass, o_proj's Wgrad
  # Backward, dy of: q down and up, kv down, k and v up, output, shared gate, up
  # and down, routed gate and up.
  assert calls_of['quantizers.both'] == 6 + 3 + 2
  # Inputs of Wgrad: of these linears, and dy of the routed down projection.
  assert calls_of['quantizers.columns'] == 2 + 1  # SwiGLU products; E5M6
  assert calls_of['quantizers.transposed'] == 5 + 2 + 1 + 1


@pytest.mark.nightly
def test_shares_sum_to_the_total(layer):
  rows = fp8_layer.measure(layer, clock.DRY)
  calls = [row for row in rows if row['what'].startswith(('quant', 'e5m6'))]
  (total,) = (row for row in rows if row['what'] == 'all')
  assert total['calls'] == sum(row['calls'] for row in calls)
  assert total['share_percent'] == pytest.approx(
    sum(row['share_percent'] for row in calls)
  )


def test_no_tokens_are_bad_input(capsys):
  with pytest.raises(SystemExit) as ended:
    fp8_layer.main(['--tokens=0'])
  assert ended.value.code == 2
  assert '--tokens=0 must be at least 1' in capsys.readouterr().err
