"""The server: who may ask what, how much and how long; and many at once."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import influence_fast as inf
from influence_fast.serving.lookup import Lookup, Question

app = pytest.importorskip("influence_fast.serving.app", exc_type=inf.BackendError, reason="FastAPI is not installed")
JSON = {"content-type": "application/json"}
TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def address(lookup: Lookup, serving: Callable[..., Any]) -> Iterator[str]:
    with serving(lookup) as found:
        yield found


def send(address: str, verb: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection(address, timeout=30)
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(verb, path, raw, {**(JSON if body is not None else {}), **(headers or {})})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    found = json.loads(text) if answer.headers.get_content_type() == "application/json" else text
    return answer.status, found, answer.headers


def test_the_calls(address: str, lookup: Lookup) -> None:
    status, about, _ = send(address, "GET", "/api/about")
    assert (status, about["rows"], about["methods"]) == (200, 20, ["dot", "cosine", "trak", "trackstar"])
    assert [one["name"] for one in send(address, "GET", "/api/queries?first=3&count=9")[1]] == ["3", "4"]
    asked = {"text": "w1 w2", "label": "1", "k": 3, "method": "trackstar"}
    found = send(address, "POST", "/api/search", asked)[1]
    expected = lookup.answer(Question("w1 w2", label="1"), 3, "trackstar")
    assert {**found, "seconds": 0} == {**json.loads(json.dumps(expected)), "seconds": 0}
    tokens = send(address, "POST", "/api/tokens", {"text": "w1 w2", "label": "1", "ids": ["row/5"]})[1]
    assert [one["text"] for one in tokens["tokens"]] == ["w1", "w2"]


def test_pages_load_nothing_from_elsewhere(address: str) -> None:
    for path in ("/", "/docs", "/files/page.js", "/files/page.css"):
        status, text, headers = send(address, "GET", path)
        assert status == 200
        assert "//" not in text.replace("// ", "").replace("http://127.0.0.1", "")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert "/api/search" in send(address, "GET", "/docs")[1]
    assert set(send(address, "GET", "/openapi.json")[1]["paths"]) == {
        "/api/about", "/api/queries", "/api/search", "/api/tokens"
    }  # fmt: skip
    for path in ("/files/app.py", "/files/..%2Fapp.py", "/redoc", "/x"):
        assert send(address, "GET", path)[0] == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Field required"),
        (b"{", "JSON"),
        (b"[]", "body"),
        ({"text": "w1", "label": "1", "k": 51}, "k: "),
        ({"text": "w1", "label": "1", "k": 0}, "k: "),
        ({"text": "w" * 20_001, "label": "1"}, "text: "),
        ({"text": "w1", "label": "1", "method": "nope"}, "method: expected one of"),
        ({"text": "w1", "label": "1", "more": 1}, "more: "),
        ({"text": "w1"}, "label: a classifier"),
        ({"row": "nobody"}, "no row has the id"),
        ({"row": "row/4", "query": "1"}, "expected one of text, query and row"),
    ],
)
def test_wrong_questions_are_explained(address: str, body: Any, message: str) -> None:
    status, found, _ = send(address, "POST", "/api/search", body)
    assert status == 422
    assert message in found["error"]


def test_large_requests_are_not_read(address: str) -> None:
    large = b"x" * ((256 << 10) + 1)
    assert send(address, "POST", "/api/search", large)[0] == 413
    connection = http.client.HTTPConnection(address, timeout=30)
    parts = (large[:70_000] for _ in range(10))
    connection.request("POST", "/api/search", parts, JSON, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert send(address, "GET", "/api/about")[0] == 200


def test_pages_from_elsewhere_cannot_ask(address: str) -> None:
    port = address.rpartition(":")[2]
    ask = {"row": "row/4"}
    for headers, status in [
        ({"host": f"evil.example:{port}"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[evil"}, 400),
        ({"origin": f"http://{address}"}, 200),
        ({"host": f"localhost:{port}"}, 200),
    ]:
        assert send(address, "POST", "/api/search", ask, headers)[0] == status, headers
    # A form of another page sends no JSON.
    assert send(address, "POST", "/api/search", b'{"row": "row/4"}', {"content-type": "text/plain"})[0] == 422


def test_a_token(lookup: Lookup, serving: Callable[..., Any]) -> None:
    with serving(lookup, token=TOKEN) as address:
        for headers in (
            {},
            {"authorization": "Bearer nope"},
            {"cookie": "influence_fast_token=nope"},
            {"cookie": "\xff="},
        ):
            for path in ("/", "/docs", "/openapi.json", "/api/about", "/files/page.js", "/?token=nope"):
                assert send(address, "GET", path, headers=headers)[0] == 401
        assert send(address, "GET", "/api/about", headers={"authorization": f"Bearer {TOKEN}"})[0] == 200
        status, _, headers = send(address, "GET", f"/?token={TOKEN}")
        assert (status, headers["location"]) == (303, "/")
        assert "HttpOnly" in headers["set-cookie"]
        assert "samesite=strict" in headers["set-cookie"].lower()
        cookie = headers["set-cookie"].partition(";")[0]
        assert send(address, "GET", "/", headers={"cookie": cookie})[0] == 200


def test_other_addresses_need_a_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        app.check_address(host, None)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(inf.InputError, match="can be reached from other machines; that needs --token"):
            app.check_address(host, None)
        app.check_address(host, TOKEN)
        with pytest.raises(inf.InputError, match="token: expected at least 16"):
            app.check_address(host, "short")


def test_fifty_at_once_lose_nothing(address: str, lookup: Lookup) -> None:
    questions = [{"text": f"w{i} w{7 * i} w2", "label": str(i % 3)} for i in range(3)]
    questions += [{"row": f"row/{i}"} for i in range(4, 11)]
    expected = [lookup.answer(Question(**question), 4) for question in questions]
    gate = threading.Barrier(50)

    def ask(number: int) -> tuple[int, Any]:
        gate.wait()
        return send(address, "POST", "/api/search", {**questions[number % 10], "k": 4})[:2]

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert [status for status, _ in answers] == [200] * 50
    for number, (_, found) in enumerate(answers):
        for kind in ("helpful", "harmful"):
            mine, own = found[kind], expected[number % 10][kind]
            assert [row["id"] for row in mine] == [row["id"] for row in own]
            assert [row["score"] for row in mine] == pytest.approx([row["score"] for row in own], rel=1e-4)


class Slow:
    """A lookup that answers when it is let."""

    def __init__(self, lookup: Lookup) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.inner = lookup

    def answer(self, *given: Any) -> dict[str, Any]:
        self.begun.release()
        self.go.wait(10)
        return {"answered": True}


def test_time_and_questions_at_once_are_bounded(lookup: Lookup, serving: Callable[..., Any]) -> None:
    slow = Slow(lookup)
    ask = {"row": "row/4"}
    with serving(slow, seconds=0.3) as address:
        begun = time.monotonic()
        status, found, headers = send(address, "POST", "/api/search", ask)
        assert time.monotonic() - begun < 5
        assert (status, headers["retry-after"]) == (503, "5")
        assert "no answer within 0.3 s" in found["error"]
        slow.go.set()
    slow = Slow(lookup)
    with serving(slow, waiting=2) as address, ThreadPoolExecutor(2) as pool:
        first = [pool.submit(send, address, "POST", "/api/search", ask) for _ in range(2)]
        for _ in range(2):
            assert slow.begun.acquire(timeout=10)
        status, found, headers = send(address, "POST", "/api/search", ask)
        assert (status, headers["retry-after"]) == (503, "1")
        slow.go.set()
        assert [future.result()[0] for future in first] == [200, 200]
        assert send(address, "POST", "/api/search", ask)[0] == 200


def test_a_request_that_does_not_arrive_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_SECONDS_TO_SEND", 0.2)
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.putrequest("POST", "/api/search")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "100")
    connection.endheaders()
    connection.send(b"{")
    assert connection.getresponse().status == 408
    connection.close()
