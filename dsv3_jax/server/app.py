"""An HTTP server that OpenAI clients talk to: Starlette on one worker thread.

  POST /v1/completions, /v1/chat/completions   also as server-sent events
  GET  /v1/models, /health, /metrics (Prometheus), / (a page to try it)

A client that goes away cancels its request. A full queue answers 429, a body
that is too long 413, one that is wrong 400 with one line, one for another model
404. While the model warms up, requests wait and /health is 503.
"""

import asyncio
import contextlib
import hmac
import importlib.resources
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable

from starlette import applications, exceptions, requests, responses, routing

from dsv3_jax import errors
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.server import engine_thread, metrics, protocol
from dsv3_jax.server import responses as openai_responses

_MOST_BODY = 2**20  # bytes
_ENDED = 'the model has ended'


class Server:
  """The endpoints of one model."""

  def __init__(
    self,
    model: engine_thread.Worker,
    tokenizer: tokenizers.Tokenizer,
    *,
    name: str,
    max_tokens: int,
    api_key: str = '',
  ):
    """Args:
    name: of the model, as clients see it. max_tokens: of an answer at most.
      api_key: that clients must bear; none must if it is ''.
    """
    self.worker, self.tokenizer, self.name = model, tokenizer, name
    self.max_tokens, self._key = max_tokens, api_key
    self.started = int(time.time())
    self.telemetry = metrics.Telemetry(model)

  def app(self) -> applications.Starlette:
    route = routing.Route
    return applications.Starlette(
      routes=[
        route('/v1/completions', self._completions, methods=['POST']),
        route('/v1/chat/completions', self._chat, methods=['POST']),
        route('/v1/models', self._models),
        route('/v1/models/{name:path}', self._model),
        route('/health', self._health),
        route('/metrics', self._metrics),
        route('/', self._page),
      ],
      exception_handlers={
        errors.InputError: _bad_input,
        protocol.NoModelError: _no_model,
        exceptions.HTTPException: _http_error,
        requests.ClientDisconnect: _gone,
      },
    )

  # Endpoints.

  async def _completions(self, request: requests.Request):
    ask = await self._ask(request, protocol.completion)
    return await self._answer(
      request, ask, openai_responses.Completion(self.name)
    )

  async def _chat(self, request: requests.Request):
    ask = await self._ask(request, protocol.chat)
    return await self._answer(request, ask, openai_responses.Chat(self.name))

  async def _models(self, request: requests.Request):
    self._check_key(request)
    body = {'object': 'list', 'data': [self._about()]}
    return responses.JSONResponse(body)

  async def _model(self, request: requests.Request):
    self._check_key(request)
    name = request.path_params['name']
    if name != self.name:
      raise protocol.NoModelError(f'model={name!r} is not served here')
    return responses.JSONResponse(self._about())

  async def _health(self, request: requests.Request):
    said, code = 'ok', 200
    if self.worker.error is not None:
      said, code = 'the model has failed', 503
    elif not self.worker.is_ready:
      said, code = 'the model warms up', 503
    return responses.JSONResponse({'status': said}, code)

  async def _metrics(self, request: requests.Request):
    kind = metrics.CONTENT_TYPE
    return responses.Response(self.telemetry.text(), media_type=kind)

  async def _page(self, request: requests.Request):
    files = importlib.resources.files('dsv3_jax.server')
    headers = {'x-frame-options': 'DENY'}
    page = (files / 'page.html').read_text('utf-8')
    return responses.HTMLResponse(page, headers=headers)

  # What they share.

  def _check_key(self, request: requests.Request) -> None:
    given = request.headers.get('authorization', '').encode('latin-1')
    wanted = f'Bearer {self._key}'.encode()
    if self._key and not hmac.compare_digest(given, wanted):
      raise exceptions.HTTPException(401, 'the API key is missing or wrong')

  def _about(self) -> dict:
    return {
      'id': self.name,
      'object': 'model',
      'created': self.started,
      'owned_by': 'dsv3-jax',
    }

  async def _ask(
    self, request: requests.Request, read: Callable[..., protocol.Ask]
  ) -> protocol.Ask:
    """What the body asks for; other requests go on while it is tokenised."""
    data = await self._body(request)
    limits = protocol.Limits(
      model=self.name,
      answers=self.worker.most,
      tokens=self.max_tokens,
      seed=secrets.randbits(32),
    )
    parse = lambda: read(_json(data), self.tokenizer, limits)
    return await asyncio.to_thread(parse)

  async def _body(self, request: requests.Request) -> bytes:
    """Read no further than it may be long."""
    self._check_key(request)
    if request.headers.get('sec-fetch-site') in ('cross-site', 'same-site'):
      raise exceptions.HTTPException(403, "another site's page may not ask")
    data = bytearray()
    async for piece in request.stream():
      data += piece
      if len(data) > _MOST_BODY:
        raise exceptions.HTTPException(
          413, f'the body must have at most {_MOST_BODY} bytes'
        )
    return bytes(data)

  async def _answer(
    self, request, ask: protocol.Ask, form: openai_responses.Form
  ):
    made = openai_responses.Answers(
      self.worker, self.tokenizer, ask, self.max_tokens
    )
    self._begin(made)
    if ask.stream:
      return _Events(self._events(form, made), made)
    watch = asyncio.create_task(_until_gone(request))
    try:
      whole = asyncio.create_task(form.collect(made))
      done = {whole, watch}
      await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
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
      made.cancel()

  def _begin(self, made: openai_responses.Answers) -> None:
    """Submits the requests, or says why not."""
    try:
      made.begin()
    except engine_thread.Full as error:
      raise exceptions.HTTPException(
        429, 'too many requests wait: try again later', {'retry-after': '1'}
      ) from error
    except engine_thread.Closed as error:
      raise exceptions.HTTPException(503, _ENDED) from error

  async def _events(
    self, form: openai_responses.Form, made: openai_responses.Answers
  ) -> AsyncIterator[str]:
    """Server-sent events."""
    event = lambda body: f'data: {json.dumps(body)}\n\n'
    try:
      for body in form.opening(len(made.tickets)):
        yield event(body)
      async for piece in made.pieces():
        yield event(form.piece(piece))
      if made.ask.with_usage:
        yield event(form.usage(made))
      yield 'data: [DONE]\n\n'
    except engine_thread.Closed:
      yield event(_error_body(503, _ENDED))


class _Events(responses.StreamingResponse):
  """Ends its requests when it ends, also if it never began."""

  def __init__(
    self, events: AsyncIterator[str], made: openai_responses.Answers
  ):
    super().__init__(events, media_type='text/event-stream')
    self._made = made

  async def __call__(self, *args):
    try:
      await super().__call__(*args)
    finally:
      self._made.cancel()


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


async def _no_model(request, error: protocol.NoModelError):
  return _error(404, str(error), code='model_not_found')


async def _http_error(request, error: exceptions.HTTPException):
  return _error(error.status_code, error.detail, error.headers)


async def _gone(request, error: requests.ClientDisconnect):
  return responses.Response(status_code=499)  # which nobody reads
