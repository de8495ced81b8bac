"""The arrays that say how a step samples, from the requests of its rows."""

import functools

import numpy as np

from dsv3_jax.inference import request as requests
from dsv3_jax.inference import sampling


def empty(num_rows: int, vocab_size: int) -> sampling.SamplingArrays:
  """Greedy rows without adjustments."""
  zeros = functools.partial(np.zeros, num_rows)
  num_biases = min(requests.MAX_LOGIT_BIASES, vocab_size)
  adjustments = sampling.LogitAdjustments(
    presence_B=zeros(np.float32),
    frequency_B=zeros(np.float32),
    repetition_B=np.ones(num_rows, np.float32),
    prompt_length_B=zeros(np.int32),
    bias_ids_BK=np.full((num_rows, num_biases), vocab_size, np.int32),
    bias_BK=np.zeros((num_rows, num_biases), np.float32),
    is_constrained_B=zeros(bool),
    allowed_Bv=np.zeros((num_rows, -(-vocab_size // 32)), np.uint32),
  )
  return sampling.SamplingArrays(
    keys_B2=np.zeros((num_rows, 2), np.uint32),
    temperature_B=zeros(np.float32),
    top_k_B=zeros(np.int32),
    top_p_B=zeros(np.float32),
    min_p_B=zeros(np.float32),
    logprobs_B=zeros(bool),
    adjustments=adjustments,
  )


def fill(
  arrays: sampling.SamplingArrays, b: int, request: requests.Request
) -> None:
  """Sets row `b` to what the request's next token is sampled with."""
  params, adjustments = request.sampling, arrays.adjustments
  arrays.keys_B2[b] = request.key_2
  arrays.temperature_B[b], arrays.top_k_B[b] = params.temperature, params.top_k
  arrays.top_p_B[b], arrays.min_p_B[b] = params.top_p, params.min_p
  arrays.logprobs_B[b] = params.logprobs is not None
  adjustments.presence_B[b] = params.presence_penalty
  adjustments.frequency_B[b] = params.frequency_penalty
  adjustments.repetition_B[b] = params.repetition_penalty
  adjustments.prompt_length_B[b] = len(request.prompt)
  if params.logit_bias:
    ids_K, bias_K = params.bias_arrays
    adjustments.bias_ids_BK[b, : len(ids_K)] = ids_K
    adjustments.bias_BK[b, : len(ids_K)] = bias_K
  if request.matcher is not None:
    adjustments.is_constrained_B[b] = True
    generated = request.all_tokens[len(request.prompt) :]
    adjustments.allowed_Bv[b] = request.matcher.allowed(generated)
