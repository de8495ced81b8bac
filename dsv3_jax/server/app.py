"""An HTTP server for OpenAI clients: Starlette, and the engine in a thread.

  POST /v1/completions, /v1/chat/completions   also as server-sent events
  POST /tokenize, /detokenize                  as vLLM has them
  GET  /v1/models, /health, /metrics (Prometheus), / (a page to try it)

A client that disconnects cancels its request. A full queue is answered with
429, a body that is too long with 413, a wrong one with 400 and one line, one
for another model with 404. While the model warms up, requests wait and /health
is 503.
"""

import asyncio
import contextlib
import hmac
import importlib.resources
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping

from starlette import applications, exceptions, requests, responses, routing

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.inference import grammar
from dsv3_jax.server import (
  engine_thread,
  fields,
  metrics,
  protocol,
  response_formats,
  tokenize_protocol,
)
from dsv3_jax.server import responses as openai_responses

_MAX_BODY = 2**20  # bytes, or more for a model of a long context
_TOKEN_BYTES = 64  # the most that JSON needs for a token of usual text
_ENDED = 'the model has ended'  # after an error, or while it shuts down


class Server:
  """The endpoints of one model."""

  def __init__(
    self,
    thread: engine_thread.EngineThread,
    tokenizer: tokenizers.Tokenizer,
    *,
    name: str,
    max_tokens: int,
    api_key: str = '',
    sampling: Mapping[str, float | int] | None = None,
  ):
    """Args:
    name: of the model, as clients see it.
    max_tokens: of an answer at most.
    api_key: that clients must send; '' lets all in.
    sampling: fields of a body that has none.
    """
    self.thread, self.tokenizer, self.name = thread, tokenizer, name
    self.max_tokens, self._key = max_tokens, api_key
    self._sampling = dict(sampling or {})
    self.started = int(time.time())
    self.grammars = grammar.Compiler(tokenizer, thread.vocab_size)
    self.telemetry = metrics.Telemetry(thread, name)

  def app(self) -> applications.Starlette:
    route = routing.Route
    return applications.Starlette(
      routes=[
        route('/v1/completions', self._completions, methods=['POST']),
        route('/v1/chat/completions', self._chat, methods=['POST']),
        route('/tokenize', self._tokenize, methods=['POST']),
        route('/detokenize', self._detokenize, methods=['POST']),
        route('/v1/models', self._models),
        route('/v1/models/{name:path}', self._model),
        route('/health', self._health),
        route('/metrics', self._metrics),
        route('/', self._page),
      ],
      exception_handlers={
        errors.InputError: _bad_input,
        openai_responses.ContextLengthError: _too_long,
        protocol.NoModelError: _no_model,
        exceptions.HTTPException: _http_error,
        requests.ClientDisconnect: _gone,
        Exception: _failed,
      },
    )

  # Endpoints.

  async def _completions(self, request: requests.Request):
    api_request = await self._parse(request, protocol.parse_completion)
    return await self._answer(
      request,
      api_request,
      response_formats.CompletionFormat(self.name, self.tokenizer),
    )

  async def _chat(self, request: requests.Request):
    api_request = await self._parse(request, protocol.parse_chat)
    return await self._answer(
      request,
      api_request,
      response_formats.ChatFormat(self.name, self.tokenizer, api_request),
    )

  async def _tokenize(self, request: requests.Request):
    data = await self._body(request)
    limits = self._limits()
    run = lambda: tokenize_protocol.parse_tokenize(
      _json(data), self.tokenizer, limits
    )
    ids = await asyncio.to_thread(run)
    body = {'count': len(ids), 'max_model_len': self._room, 'tokens': ids}
    return responses.JSONResponse(body)

  async def _detokenize(self, request: requests.Request):
    data = await self._body(request)
    limits = self._limits()

    def run() -> str:
      ids = tokenize_protocol.parse_detokenize(_json(data), limits)
      return self.tokenizer.decode(ids)

    return responses.JSONResponse({'prompt': await asyncio.to_thread(run)})

  async def _models(self, request: requests.Request):
    self._check_key(request)
    body = {'object': 'list', 'data': [self._about()]}
    return responses.JSONResponse(body)

  async def _model(self, request: requests.Request):
    self._check_key(request)
    name = request.path_params['name']
    if name != self.name:
      raise protocol.NoModelError(
        f'model={fields.short(name)} is not served here'
      )
    return responses.JSONResponse(self._about())

  async def _health(self, request: requests.Request):
    status, code = 'ok', 200
    if self.thread.error is not None:
      status, code = 'the model has failed', 503
    elif not self.thread.is_ready:
      status, code = 'the model warms up', 503
    return responses.JSONResponse({'status': status}, code)

  async def _metrics(self, request: requests.Request):
    kind = metrics.CONTENT_TYPE
    return responses.Response(self.telemetry.text(), media_type=kind)

  async def _page(self, request: requests.Request):
    files = importlib.resources.files('dsv3_jax.server')
    headers = {'x-frame-options': 'DENY'}
    page = (files / 'page.html').read_text('utf-8')
    return responses.HTMLResponse(page, headers=headers)

  # What the endpoints share.

  @property
  def _room(self) -> int:
    """Tokens that a prompt and its answer may have together."""
    return self.thread.max_new_tokens(0)

  def _check_key(self, request: requests.Request) -> None:
    header = request.headers.get('authorization', '').encode('latin-1')
    expected = f'Bearer {self._key}'.encode()
    if self._key and not hmac.compare_digest(header, expected):
      raise exceptions.HTTPException(401, 'the API key is missing or wrong')

  def _about(self) -> dict:
    return {
      'id': self.name,
      'object': 'model',
      'created': self.started,
      'owned_by': 'dsv3-jax',
      'max_model_len': self._room,
    }

  async def _parse(
    self, request: requests.Request, parse: Callable[..., protocol.ChatRequest]
  ) -> protocol.ChatRequest:
    """Parses the body in a thread, as tokenising a long text takes a while."""
    data = await self._body(request)
    limits = self._limits()
    run = lambda: parse(_json(data), self.tokenizer, limits)
    return await asyncio.to_thread(run)

  def _limits(self) -> protocol.Limits:
    return protocol.Limits(
      model=self.name,
      max_choices=self.thread.max_open,
      max_tokens=self.max_tokens,
      vocab_size=self.thread.vocab_size,
      seed=secrets.randbits(32),
      sampling=self._sampling,
      grammars=self.grammars,
    )

  async def _body(self, request: requests.Request) -> bytes:
    """The body; reading stops where it becomes too long."""
    self._check_key(request)
    if request.headers.get('sec-fetch-site') in ('cross-site', 'same-site'):
      raise exceptions.HTTPException(403, "another site's page may not ask")
    data, most = bytearray(), max(_MAX_BODY, _TOKEN_BYTES * self._room)
    async for piece in request.stream():
      data += piece
      if len(data) > most:
        raise exceptions.HTTPException(
          413, f'the body must have at most {most} bytes'
        )
    return bytes(data)

  async def _answer(
    self,
    request: requests.Request,
    api_request: protocol.ChatRequest,
    response_format: response_formats.ResponseFormat,
  ):
    stream = openai_responses.ResponseStream(
      self.thread, self.tokenizer, api_request, self.max_tokens
    )
    self._submit(stream)
    if api_request.stream:
      return _Events(self._events(response_format, stream), stream)
    watch = asyncio.create_task(_until_gone(request))
    try:
      whole = asyncio.create_task(response_format.collect(stream))
      tasks = {whole, watch}
      await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      if not whole.done():
        whole.cancel()
        with contextlib.suppress(asyncio.CancelledError):
          await whole
        return responses.Response(status_code=499)
      return responses.JSONResponse(await whole)
    except engine_thread.Closed as error:
      raise exceptions.HTTPException(503, _ENDED) from error
    finally:
      watch.cancel()
      stream.cancel()

  def _submit(self, stream: openai_responses.ResponseStream) -> None:
    """Submits the requests of a call, or raises the HTTP error."""
    try:
      stream.submit()
    except engine_thread.QueueFull as error:
      raise exceptions.HTTPException(
        429, 'too many requests wait: try again later', {'retry-after': '1'}
      ) from error
    except engine_thread.Closed as error:
      raise exceptions.HTTPException(503, _ENDED) from error

  async def _events(
    self,
    response_format: response_formats.ResponseFormat,
    stream: openai_responses.ResponseStream,
  ) -> AsyncIterator[str]:
    """Server-sent events."""
    event = lambda body: f'data: {json.dumps(body)}\n\n'
    try:
      for body in response_format.opening(len(stream.requests)):
        yield event(body)
      async for piece in stream.pieces():
        yield event(response_format.chunk(piece, stream))
      if stream.api_request.include_usage:
        yield event(response_format.usage(stream))
      yield 'data: [DONE]\n\n'
    except engine_thread.Closed:
      yield event(_error_body(503, _ENDED))


class _Events(responses.StreamingResponse):
  """Cancels its requests when it ends, even if it never started."""

  def __init__(
    self, events: AsyncIterator[str], stream: openai_responses.ResponseStream
  ):
    super().__init__(events, media_type='text/event-stream')
    self._stream = stream

  async def __call__(self, *args):
    try:
      await super().__call__(*args)
    finally:
      self._stream.cancel()


def _json(data: bytes):
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    raise errors.InputError('the body must be JSON') from error


async def _until_gone(request: requests.Request) -> None:
  while not await request.is_disconnected():
    await asyncio.sleep(0.2)


def _error_body(status: int, message: str, code: str | None = None) -> dict:
  kinds = {401: 'authentication_error', 403: 'permission_error'}
  kinds |= {429: 'rate_limit_error'}
  other = 'server_error' if status >= 500 else 'invalid_request_error'
  kind = kinds.get(status, other)
  error = {'message': message, 'type': kind, 'param': None, 'code': code}
  return {'error': error}


def _error(
  status: int, message: str, headers=None, code: str | None = None
) -> responses.JSONResponse:
  body = _error_body(status, message, code)
  return responses.JSONResponse(body, status, headers)


async def _bad_input(request, error: errors.InputError):
  return _error(400, str(error))


async def _too_long(request, error: openai_responses.ContextLengthError):
  return _error(400, str(error), code='context_length_exceeded')


async def _no_model(request, error: protocol.NoModelError):
  return _error(404, str(error), code='model_not_found')


async def _http_error(request, error: exceptions.HTTPException):
  return _error(error.status_code, error.detail, error.headers)


async def _failed(request, error: Exception):
  return _error(500, 'the server has failed at this request')  # and logs it


async def _gone(request, error: requests.ClientDisconnect):
  return responses.Response(status_code=499)  # the client has gone
