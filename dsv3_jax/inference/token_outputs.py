"""From arrays of a step to tokens and log-probabilities of a request."""

from dsv3_jax.inference import forward, sampling
from dsv3_jax.inference import request as requests


def append(
  request: requests.Request, output: forward.StepOutput, b: int
) -> int:
  """Appends the new tokens, up to the first stop token; returns how many.

  Args:
    b: row of the request.
  """
  new = output.tokens_Bt[b][: output.count_B[b]]
  stops = [i for i, t in enumerate(new, 1) if t in request.stop_ids]
  new = new[: min(stops, default=len(new))]
  request.all_tokens += new
  if (count := request.sampling.logprobs) is not None:
    request.logprobs += [
      _token_logprobs(output.logprobs, (b, t), count) for t in range(len(new))
    ]
  request.speculative_tokens = output.speculative_Bk[b]
  return len(new)


def report(
  request: requests.Request, num_new: int
) -> list[requests.TokenOutput]:
  """An output for each of the last `num_new` tokens not reported yet."""
  length, start = len(request.all_tokens), len(request.prompt)
  first = max(length - num_new, request.num_reported)
  reasons, logprobs = {length - 1: request.finish_reason}, request.logprobs
  return [
    requests.TokenOutput(
      request,
      request.all_tokens[i],
      reasons.get(i),
      logprobs[i - start] if logprobs else None,
    )
    for i in range(first, length)
  ]


def append_prompt_logprobs(
  request: requests.Request, output: forward.StepOutput, b: int, count: int
) -> None:
  """Records those of the tokens behind the `count` ones that were computed."""
  start, num_top = request.block_table.length + 1, request.sampling.logprobs
  for t in range(min(count, len(request.prompt) - start)):
    request.prompt_logprobs[start + t] = _token_logprobs(
      output.prompt_logprobs, (b, t), num_top
    )


def _token_logprobs(
  logprobs: sampling.Logprobs, at: tuple[int, int], count: int
) -> requests.TokenLogprobs:
  chosen, rank, top_K, ids_K = (x[at] for x in logprobs)
  top = zip(ids_K[:count].tolist(), top_K[:count].tolist(), strict=True)
  return requests.TokenLogprobs(float(chosen), int(rank), tuple(top))
