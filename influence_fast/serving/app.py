"""Lookups in a browser and by JSON: a page, four calls, and who may ask what.

Everything is served from here, nothing from elsewhere. Whoever asks over the loopback address needs no token, but must ask
for that address by name: a page from elsewhere cannot, neither by a name of its own that leads here nor by its ``Origin``.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from influence_fast.errors import BackendError, InfluenceError, InputError
from influence_fast.serving.lookup import LONGEST, MOST_ROWS, BusyError, Lookup, Question

try:
    import anyio.to_thread
    import uvicorn
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    raise BackendError(f"serve needs FastAPI and uvicorn (pip install 'influence_fast[serve]'): {error}") from None

_HERE = Path(__file__).parent
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
_MOST_BYTES, _SECONDS_TO_SEND, _MOST_QUERIES = 256 << 10, 10, 500
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_COOKIE = "influence_fast_token"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Text = Annotated[str, Field(max_length=LONGEST)]
Name = Annotated[str, Field(max_length=1000)]


class Asked(BaseModel):
    """A text with its label (of a classifier) or answer (of a language model), or a held-out query or a training row."""

    model_config = ConfigDict(extra="forbid")
    text: Text | None = None
    label: Name | None = None
    answer: Text | None = None
    query: Name | None = None
    row: Name | None = None

    def question(self) -> Question:
        return Question(self.text, self.label, self.answer, self.query, self.row)


class Search(Asked):
    """What to find: how many rows of each kind, and by which method (the index's metric by default)."""

    k: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 10
    method: Name | None = None


class Tokens(Asked):
    """Which training rows the tokens of the question are held against."""

    ids: Annotated[list[Name], Field(min_length=1, max_length=MOST_ROWS)]


def make_app(lookup: Lookup, *, token: str | None = None, seconds: float = 30.0, waiting: int = 256) -> Any:
    """The application: ``/``, ``/docs``, ``/openapi.json`` and ``/api/...``.

    Args:
        lookup: what answers.
        token: what whoever asks must have, as ``Authorization: Bearer TOKEN`` or in ``/?token=TOKEN``; None: the loopback.
        seconds: after which a question is answered with 503.
        waiting: questions at once, beyond which another is answered with 503.
    """
    app = FastAPI(
        title="influence_fast", description="Which training rows help or harm.", docs_url=None, redoc_url=None
    )
    open_questions = 0

    async def answered(work: Callable[[], dict[str, Any]]) -> JSONResponse:
        nonlocal open_questions
        if open_questions >= waiting:
            return _problem(503, f"{waiting} questions are being answered; ask again", retry=1)
        open_questions += 1
        try:
            # A thread cannot be stopped: what it still finds is dropped, and it waits for the model no longer than this.
            found = await asyncio.wait_for(anyio.to_thread.run_sync(work, abandon_on_cancel=True), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            return _problem(503, f"no answer within {seconds:g} s; ask again", retry=5)
        except BusyError as error:
            return _problem(503, str(error), retry=1)
        except InputError as error:
            return _problem(422, str(error))
        except InfluenceError as error:
            return _problem(500, str(error))
        finally:
            open_questions -= 1
        return JSONResponse(found)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((_HERE / "page.html").read_text(encoding="utf-8"))

    @app.get("/files/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _FILES:
            return _problem(404, "no such file")
        return Response((_HERE / name).read_text(encoding="utf-8"), media_type=_FILES[name])

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return HTMLResponse(_described(app.openapi()))

    @app.get("/api/about", summary="What is searched, and what can be asked")
    async def about() -> dict[str, Any]:
        index = lookup.index
        return {
            "rows": len(index),
            "layers": index.layers,
            "methods": lookup.methods,
            "metric": index.metric,
            "task": lookup.task,
            "classes": lookup.classes,
            "queries": 0 if lookup.queries is None else len(lookup.queries),
            "note": lookup.note,
            "most_rows": MOST_ROWS,
            "longest": LONGEST,
        }

    @app.get("/api/queries", summary="Held-out queries by number, with texts and labels")
    async def queries(
        first: Annotated[int, Field(ge=0)] = 0, count: Annotated[int, Field(ge=1, le=_MOST_QUERIES)] = 100
    ) -> list[dict[str, str]]:
        return lookup.names_of_queries(first, count)

    @app.post("/api/search", summary="The most helpful and most harmful training rows of a question")
    async def search(asked: Search) -> Response:
        return await answered(lambda: lookup.answer(asked.question(), asked.k, asked.method, seconds))

    @app.post("/api/tokens", summary="Influence of some training rows on each token of a question")
    async def tokens(asked: Tokens) -> Response:
        return await answered(lambda: lookup.tokens(asked.question(), asked.ids, seconds))

    @app.exception_handler(RequestValidationError)
    async def refused(_: Any, error: RequestValidationError) -> Response:
        parts = [f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors()[:5]]
        return _problem(422, "; ".join(parts))

    app.add_middleware(partial(_Guard, token=token))
    return app


def serve(
    lookup: Lookup,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    token: str | None = None,
    seconds: float = 30.0,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until the process is asked to stop; ``ready`` is told the page's address, once the first answer takes no longer
    than later ones.

    Raises:
        InputError: another address than the loopback without a token of 16 characters or more.
    """
    check_address(host, token)
    app = make_app(lookup, token=token, seconds=seconds)
    config = uvicorn.Config(
        app, host, port, log_level="warning", access_log=False, timeout_keep_alive=5, timeout_graceful_shutdown=5,
        server_header=False, proxy_headers=False, ws="none",
    )  # fmt: skip
    config.load()
    listening = config.bind_socket()
    # From now on whoever connects waits instead of being refused.
    listening.listen(config.backlog)
    shown = f"[{host}]" if ":" in host else host
    lookup.warm()
    ready(f"http://{shown}:{listening.getsockname()[1]}/")
    uvicorn.Server(config).run(sockets=[listening])


def check_address(host: str, token: str | None) -> None:
    """InputError unless this address may be served with this token."""
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise InputError("token: expected at least 16 printable ASCII characters without spaces")
    if token is None and not is_loopback(host):
        raise InputError(
            f"host: {host} can be reached from other machines; that needs --token, 16 characters or more, hard to guess"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, for itself alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Guard:
    """Before any request is read: who asks, by which name, how much; and the headers of every answer."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, with_headers)
            return
        try:
            body = await asyncio.wait_for(_body(receive), _SECONDS_TO_SEND)
        except (TimeoutError, asyncio.TimeoutError):
            await _problem(408, f"the request did not arrive within {_SECONDS_TO_SEND} s")(scope, receive, with_headers)
            return
        if body is None:
            await _problem(413, f"a request has at most {_MOST_BYTES} bytes")(scope, receive, with_headers)
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> MutableMapping[str, Any]:
            return first.pop() if first else await receive()

        await self.app(scope, replayed, with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            origin = urlsplit(headers["origin"]).netloc if "origin" in headers else host
        except ValueError:
            return _problem(400, "the Host or Origin header cannot be read")
        if self.token is None and not is_loopback(name):
            return _problem(403, f"this page is http://127.0.0.1, not {name!r}")
        if origin != host:
            return _problem(403, "pages from elsewhere may not ask here")
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > _MOST_BYTES:
            return _problem(413, f"a request has at most {_MOST_BYTES} bytes")
        if self.token is None:
            return None
        if scope["path"] == "/" and scope["method"] == "GET":
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if self._is_token(given):
                # Out of the address bar, where others could read it.
                answer = Response(status_code=303, headers={"location": "/"})
                answer.set_cookie(_COOKIE, given, httponly=True, samesite="strict")
                return answer
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(bearer) or self._is_token(_cookie(headers.get("cookie", ""))):
            return None
        return _problem(401, "a token is needed: open /?token=TOKEN, or send Authorization: Bearer TOKEN")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.token or "").encode())


async def _body(receive: Receive) -> bytes | None:
    """All of a request, whatever length it said; None where it is too large."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_BYTES:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(_COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _problem(status: int, message: str, retry: int | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, None if retry is None else {"retry-after": str(retry)})


def _described(document: dict[str, Any]) -> str:
    """The calls as a plain page, from their OpenAPI document."""
    parts = []
    for path, calls in document["paths"].items():
        for verb, call in calls.items():
            parts.append(f"<h2><code>{html.escape(verb.upper())} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(call.get('summary', ''))}</p>")
            for one in call.get("parameters", []):
                parts.append(f"<pre>{html.escape(one['name'])}: {html.escape(json.dumps(one['schema']))}</pre>")
            body = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if name := body.get("$ref", "").rpartition("/")[2]:
                schema = document["components"]["schemas"][name]
                parts.append(f"<p>{html.escape(schema.get('description', ''))}</p>")
                parts.append(f"<pre>{html.escape(json.dumps(schema['properties'], indent=1))}</pre>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>influence_fast: calls</title>'
        '<link rel="stylesheet" href="/files/page.css"><main><h1>Calls</h1><p><a href="/">The page</a> · '
        f'<a href="/openapi.json">OpenAPI document</a></p>{"".join(parts)}</main></html>'
    )
