"""What Prometheus reads: values, under vLLM's names where vLLM has them."""

import pytest
from prometheus_client import parser

from dsv3_jax.inference import engine
from dsv3_jax.inference import request as requests
from dsv3_jax.server import engine_thread, histogram, metrics
from tests.inference import counting
from tests.server import web


def scrape(address):
  """Values by name and labels, `model_name` left out."""
  _, body, _ = web.fetch(f'{address}/metrics')
  values = {}
  for family in parser.text_string_to_metric_families(body):
    for sample in family.samples:
      labels = dict(sample.labels)
      assert labels.pop('model_name') == 'tiny'
      values[sample.name, *sorted(labels.items())] = sample.value
  return values


def test_counts_of_tokens_and_of_the_cache(tokenizer):
  with web.serving(tokenizer) as (address, _):
    with web.client(address) as ask:
      for _ in range(2):
        ask.completions.create(model='tiny', prompt=[3] * 200, max_tokens=5)
    values = scrape(address)
  assert values[('dsv3_requests_total',)] == 2
  assert values[('vllm:prompt_tokens_total',)] == 400
  assert values[('vllm:generation_tokens_total',)] == 10
  assert values[('vllm:prefix_cache_queries_total',)] == 400
  assert values[('vllm:prefix_cache_hits_total',)] == 192
  assert values[('vllm:kv_cache_usage_perc',)] == 0
  assert values[('vllm:num_requests_running',)] == 0
  assert values[('vllm:num_requests_waiting',)] == 0
  assert values[('vllm:num_preemptions_total',)] == 0
  sizes = (('block_size', '64'), ('num_gpu_blocks', '100'))
  assert values['vllm:cache_config_info', *sizes] == 1
  for name, count in (
    ('time_to_first_token_seconds', 2),
    ('inter_token_latency_seconds', 8),
    ('e2e_request_latency_seconds', 2),
    ('request_prompt_tokens', 2),
    ('request_generation_tokens', 2),
  ):
    assert values[(f'vllm:{name}_count',)] == count
    assert values[f'vllm:{name}_bucket', ('le', '+Inf')] == count
    assert values[(f'vllm:{name}_sum',)] > 0
  assert values[('vllm:request_prompt_tokens_sum',)] == 400
  assert values['vllm:request_prompt_tokens_bucket', ('le', '100')] == 0
  assert values['vllm:request_prompt_tokens_bucket', ('le', '200')] == 2
  first = values[('vllm:time_to_first_token_seconds_sum',)]
  between = values[('vllm:inter_token_latency_seconds_sum',)]
  whole = values[('vllm:e2e_request_latency_seconds_sum',)]
  assert whole > first + between - 1e-9 and first > 0


def test_why_requests_end(tokenizer):
  class Runner(counting.Runner):
    def following(self, row):
      return tokenizer.eos_id if len(row) == 8 else 40

  letter = tokenizer.decode([40])
  runner = Runner(280, 0.02, room=600)
  with web.serving(tokenizer, runner=runner) as (address, model):
    with web.client(address) as ask:
      fields = {'model': 'tiny', 'prompt': [5], 'max_tokens': 3}
      ask.completions.create(**fields)
      ask.completions.create(**(fields | {'max_tokens': 20}))
      ask.completions.create(**(fields | {'max_tokens': 0}))
      more = {'max_tokens': 400, 'extra_body': {'ignore_eos': True}}
      ask.completions.create(**(fields | more), stop=[letter * 2])
      parts = ask.completions.create(**(fields | more), stream=True)
      next(iter(parts))
      parts.close()
    web.idle(model)
    values = scrape(address)
  ended = lambda reason: values[
    'vllm:request_success_total', ('finished_reason', reason)
  ]
  assert (ended('length'), ended('stop'), ended('abort')) == (2, 2, 1)
  assert values[('vllm:e2e_request_latency_seconds_count',)] == 5
  assert not model._progress


def test_what_speculation_gives():
  runner = counting.Runner(num_speculative_tokens=2)
  model_engine = engine.Engine(runner, num_blocks=4, max_rows=2)
  request = model_engine.submit([1, 2, 3], 30)
  while not request.done:
    model_engine.step()
  thread = engine_thread.EngineThread(model_engine, 1)
  text = metrics.Telemetry(thread, 'tiny').text().decode()
  thread.close()
  stats = model_engine.stats()
  assert 0 < stats.accepted_tokens < stats.speculative_tokens
  for kind, count in (
    ('draft', stats.speculative_tokens),
    ('accepted', stats.accepted_tokens),
  ):
    name = f'vllm:spec_decode_num_{kind}_tokens_total'
    assert f'{name}{{model_name="tiny"}} {count:.1f}\n' in text


def test_a_request_that_is_cancelled_before_it_runs_leaves_nothing():
  runner = counting.Runner()
  runner.may_run.clear()
  model_engine = engine.Engine(runner, num_blocks=4, max_rows=1)
  thread = engine_thread.EngineThread(model_engine, 4)
  first, second = requests.Request([1], 3), requests.Request([2], 3)
  thread.submit(first, lambda output: None)
  thread.submit(second, lambda output: None)
  thread.cancel(second)
  runner.may_run.set()
  web.idle(thread)
  thread.close()
  assert thread.counts['length'] == 1 and not thread._progress


def test_a_bound_is_inside_its_bucket():
  values = histogram.Histogram([1, 2.5])
  for value in (0.5, 1, 1.1, 2.5, 3):
    values.observe(value)
  assert values.buckets() == [('1', 2), ('2.5', 4), ('+Inf', 5)]
  assert values.sum == pytest.approx(8.1)
