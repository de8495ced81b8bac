"""What the engine has done and what it holds, for Prometheus."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client import core, registry

from dsv3_jax.server import engine_thread

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
# Metric, the thread's count, and help.
_THREAD_COUNTERS = (
  ('requests', 'requests', 'Requests that were accepted.'),
  ('finished', 'finished', 'Requests that were answered to their end.'),
  ('cancelled', 'cancelled', 'Requests ended by a stop string or the client.'),
  ('refused', 'refused', 'Requests refused because the queue was full.'),
  ('prompt_tokens', 'prompt_tokens', 'Tokens of prompts.'),
  ('found_tokens', 'cached_tokens', 'Prompt tokens in the prefix cache.'),
  ('tokens', 'tokens', 'Tokens generated.'),
)
# Metric, the field of `EngineStats`, and help.
_ENGINE_COUNTERS = (
  ('preempted', 'preempted', 'Times that a request was preempted.'),
  ('decoded_rows', 'decoded_rows', 'Rows of decode steps.'),
  ('drafted_tokens', 'speculative_tokens', 'Speculative tokens verified.'),
  ('accepted_tokens', 'accepted_tokens', 'Speculative tokens accepted.'),
  ('rebalanced', 'rebalances', 'Times that experts were rebalanced.'),
)


class Telemetry(registry.Collector):
  """Reads an engine thread at every scrape."""

  def __init__(self, thread: engine_thread.EngineThread):
    self._thread = thread
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(self)

  def text(self) -> bytes:
    """In Prometheus' text format."""
    return prometheus_client.generate_latest(self._registry)

  def collect(self) -> Iterator[core.Metric]:
    thread, stats = self._thread, self._thread.stats()
    for name, key, about in _THREAD_COUNTERS:
      value = thread.counts[key]
      yield core.CounterMetricFamily(f'dsv3_{name}', about, value=value)
    for name, field, about in _ENGINE_COUNTERS:
      value = getattr(stats, field)
      if value is not None:
        yield core.CounterMetricFamily(f'dsv3_{name}', about, value=value)
    gauges = {
      'expert_balancedness': (
        'Mean load of a device / highest, before the last rebalance.',
        stats.balancedness,
      ),
      'running_requests': ('Requests that run.', stats.running),
      'waiting_requests': ('Requests that wait.', thread.waiting),
      'pages_in_use': ('Cache blocks that requests have.', stats.blocks_in_use),
      'pages': ('Cache blocks.', stats.num_blocks),
    }
    for name, (about, value) in gauges.items():
      if value is not None:
        yield core.GaugeMetricFamily(f'dsv3_{name}', about, value=value)
