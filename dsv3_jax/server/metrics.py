"""What a worker has done and what it holds, for Prometheus."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client import core, registry

from dsv3_jax.inference import redundant_experts
from dsv3_jax.server import engine_thread

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_COUNTERS = {
  'requests': 'Requests that were taken.',
  'finished': 'Requests that came to their end.',
  'cancelled': 'Requests whose client went away, or that a stop ended.',
  'refused': 'Requests for which there was no room in the queue.',
  'prompt_tokens': 'Tokens of prompts.',
  'found_tokens': 'Tokens of prompts that the cache had.',
  'tokens': 'Tokens generated.',
}


class Telemetry(registry.Collector):
  """Reads a worker whenever it is asked."""

  def __init__(self, model: engine_thread.Worker):
    self._worker = model
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(self)

  def text(self) -> bytes:
    """In Prometheus' own format."""
    return prometheus_client.generate_latest(self._registry)

  def collect(self) -> Iterator[core.Metric]:
    model = self._worker
    for name, about in _COUNTERS.items():
      count = model.counts[name]
      yield core.CounterMetricFamily(f'dsv3_{name}', about, value=count)
    scheduler = model.session.scheduler
    yield core.CounterMetricFamily(
      'dsv3_preempted',
      'Times that a request had to give its pages back.',
      value=scheduler.preempted,
    )
    decoded = model.session.decoded
    drafts = {
      'decoded_rows': ('Rows of decode steps.', decoded.rows),
      'drafted_tokens': ('Tokens drafted and verified.', decoded.drafted),
      'accepted_tokens': ('Of these, those accepted.', decoded.accepted),
    }
    for name, (about, value) in drafts.items():
      yield core.CounterMetricFamily(f'dsv3_{name}', about, value=value)
    yield from _of_experts(model.session.steps.balancer)
    gauges = {
      'running_requests': ('Requests that have a row.', model.running),
      'waiting_requests': ('Requests that have none yet.', model.waiting),
      'pages_in_use': (
        'Pages of the cache that rows have.',
        scheduler.pages_in_use,
      ),
      'pages': ('Pages of the cache.', scheduler.num_pages),
    }
    for name, (about, value) in gauges.items():
      yield core.GaugeMetricFamily(f'dsv3_{name}', about, value=value)


def _of_experts(
  found: redundant_experts.ExpertRebalancer | None,
) -> Iterator[core.Metric]:
  """How well their load is spread, once that is known."""
  if found is None:
    return
  yield core.CounterMetricFamily(
    'dsv3_rebalanced', 'Times that experts were placed.', value=found.rebalanced
  )
  if found.balancedness is not None:
    yield core.GaugeMetricFamily(
      'dsv3_expert_balancedness',
      'Mean load of a device / highest, before experts were placed last.',
      value=found.balancedness[0],
    )
