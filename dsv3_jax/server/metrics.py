"""What the engine has done and what it holds, for Prometheus.

What vLLM has too has vLLM's name, so that its dashboards work.
"""

from collections.abc import Iterator

import prometheus_client
from prometheus_client import core, registry

from dsv3_jax.inference import engine, engine_stats
from dsv3_jax.server import engine_thread

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
# Metric, the thread's count, and help.
_THREAD_COUNTERS = (
  ('dsv3_requests', 'requests', 'Requests that were accepted.'),
  ('dsv3_refused', 'refused', 'Requests refused as the queue was full.'),
  ('vllm:prompt_tokens', 'prompt_tokens', 'Tokens of prompts.'),
  ('vllm:generation_tokens', 'tokens', 'Tokens generated.'),
  (
    'vllm:prefix_cache_queries',
    'searched_tokens',
    'Prompt tokens that the prefix cache was searched for.',
  ),
  (
    'vllm:prefix_cache_hits',
    'cached_tokens',
    'Prompt tokens that the prefix cache had.',
  ),
)
# Metric, the field of `EngineStats`, and help.
_ENGINE_COUNTERS = (
  ('vllm:num_preemptions', 'preempted', 'Times that requests were preempted.'),
  (
    'vllm:spec_decode_num_draft_tokens',
    'speculative_tokens',
    'Speculative tokens verified.',
  ),
  (
    'vllm:spec_decode_num_accepted_tokens',
    'accepted_tokens',
    'Speculative tokens accepted.',
  ),
  ('dsv3_decoded_rows', 'decoded_rows', 'Rows of decode steps.'),
  ('dsv3_rebalanced', 'rebalances', 'Times that experts were rebalanced.'),
)
_HISTOGRAMS = (
  (
    'vllm:time_to_first_token_seconds',
    'first_token',
    'From the arrival of a request to its first token.',
  ),
  (
    'vllm:inter_token_latency_seconds',
    'between_tokens',
    'From a token of a request to the next.',
  ),
  (
    'vllm:e2e_request_latency_seconds',
    'whole',
    'From the arrival of a request to its end.',
  ),
  ('vllm:request_prompt_tokens', 'prompt_tokens', 'Of ended requests.'),
  ('vllm:request_generation_tokens', 'tokens', 'Of ended requests.'),
)


class Telemetry(registry.Collector):
  """Reads an engine thread at every scrape."""

  def __init__(self, thread: engine_thread.EngineThread, model: str):
    """Args: model: its name, the label `model_name` of all metrics."""
    self._thread, self._labels = thread, {'model_name': model}
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(self)

  def text(self) -> bytes:
    """In Prometheus' text format."""
    return prometheus_client.generate_latest(self._registry)

  def collect(self) -> Iterator[core.Metric]:
    thread, stats = self._thread, self._thread.stats()
    for name, key, about in _THREAD_COUNTERS:
      yield self._counter(name, about, thread.counts[key])
    for name, field, about in _ENGINE_COUNTERS:
      value = getattr(stats, field)
      if value is not None:
        yield self._counter(name, about, value)
    ended = core.CounterMetricFamily(
      'vllm:request_success',
      'Requests that have ended.',
      labels=[*self._labels, 'finished_reason'],
    )
    for reason in ('stop', 'length', 'abort'):
      ended.add_metric([*self._labels.values(), reason], thread.counts[reason])
    yield ended
    yield from self._gauges(stats)
    for name, field, about in _HISTOGRAMS:
      values = getattr(thread.latencies, field)
      metric = core.HistogramMetricFamily(name, about, labels=self._labels)
      metric.add_metric(self._labels.values(), values.buckets(), values.sum)
      yield metric

  def _gauges(self, stats: engine_stats.EngineStats):
    usage = stats.blocks_in_use / stats.num_blocks
    gauges = {
      'vllm:num_requests_running': ('Requests that run.', stats.running),
      'vllm:num_requests_waiting': (
        'Requests that wait.',
        self._thread.waiting,
      ),
      'vllm:kv_cache_usage_perc': ('Share of cache blocks in use.', usage),
      'dsv3_expert_balancedness': (
        'Mean load of a device / highest, before the last rebalance.',
        stats.balancedness,
      ),
    }
    for name, (about, value) in gauges.items():
      if value is not None:
        yield self._gauge(name, about, value, {})
    sizes = {
      'block_size': str(engine.BLOCK_SIZE),
      'num_gpu_blocks': str(stats.num_blocks),
    }
    about = 'Sizes of the cache, as labels.'
    yield self._gauge('vllm:cache_config_info', about, 1, sizes)

  def _counter(self, name: str, about: str, value: int) -> core.Metric:
    metric = core.CounterMetricFamily(name, about, labels=self._labels)
    metric.add_metric(self._labels.values(), value)
    return metric

  def _gauge(
    self, name: str, about: str, value: float | int, labels: dict[str, str]
  ) -> core.Metric:
    labels = self._labels | labels
    metric = core.GaugeMetricFamily(name, about, labels=labels)
    metric.add_metric(labels.values(), value)
    return metric
