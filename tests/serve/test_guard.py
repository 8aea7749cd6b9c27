"""Who may ask, what of, and how large it may be."""

import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.conftest import SUM, call, post
from trimaran.serve import body
from trimaran.serve.app import application
from trimaran.serve.guard import HEADERS
from trimaran.serve.main import running
from trimaran.serve.neutral import BOTH, CHAT, asks_for_nothing
from trimaran.serve.problem import Problem
from trimaran.serve.settings import KEY, ServeSettings

SECRET = "hüll-and-mast"
OPEN = {"/health", "/"}


@pytest.fixture(scope="module")
def locked(folder):
    """A server with a key, and one page of another origin that it knows."""
    extra = [f"serve.api_key={SECRET}", 'serve.origins=["https://sail.example"]', "engine.rows=2"]
    with running(folder, ["serve.port=0", "serve.limits.body_seconds=0.3", *extra]) as server:
        yield server


def routes(server):
    """(method, path) of everything that the server declares."""
    paths = application(server.service).openapi()["paths"]
    declared = [(method.upper(), path.replace("{name}", "x")) for path, methods in paths.items() for method in methods]
    return [*declared, ("GET", "/openapi.json"), ("GET", "/nowhere"), ("DELETE", "/v1/models"), ("GET", "/")]


def test_every_route_but_health_and_the_page_asks_for_the_key(locked):
    assert len(routes(locked)) > 12
    for method, path in routes(locked):
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": SECRET}, {"x-api-key": SECRET + "x"}):
            status, told, raw = call(locked, method, path, b"" if method == "POST" else None, headers)
            if path in OPEN:
                assert status != 401
            else:
                assert status == 401 and told["www-authenticate"] == "Bearer", path
                assert json.loads(raw)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_the_key_opens(locked, header):
    # header values travel as bytes: http.client would write them in Latin-1
    value = SECRET if header == "x-api-key" else f"bearer {SECRET}"
    spelled = value.encode().decode("latin-1")
    assert call(locked, "GET", "/v1/models", headers={header: spelled})[0] == 200


def test_the_key_may_come_from_the_environment(monkeypatch):
    assert ServeSettings().key() is None
    monkeypatch.setenv(KEY, "from outside")
    assert ServeSettings().key() == "from outside"
    assert ServeSettings(api_key="own").key() == "own"


def test_static_files_are_open_and_end_at_their_folder(locked):
    status, headers, page = call(locked, "GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and b"<script" in page
    assert call(locked, "GET", "/static/page.css")[0] == 200
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"):
        assert call(locked, "GET", path)[0] in (401, 404)


def test_answers_carry_the_headers_of_a_careful_server(server):
    for method, path in (("GET", "/health"), ("GET", "/nowhere"), ("POST", "/v1/completions")):
        headers = call(server, method, path)[1]
        assert all(headers[name] == value for name, value in HEADERS.items()) and "server" not in headers


def test_known_origins_are_let_in_by_browsers_and_others_are_not(locked):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://sail.example", True), ("https://other.example", False)):
        status, headers, _ = call(locked, "OPTIONS", "/v1/chat/completions", headers={"origin": origin, **asked})
        assert (status == 200, headers.get("access-control-allow-origin") == origin) == (allowed, allowed)
    headers = call(locked, "GET", "/v1/models", headers={"origin": "https://sail.example"})[1]
    assert headers["access-control-allow-origin"] == "https://sail.example", "so that the page can read the 401"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_a_foreign_page_could_post_is_not_read(server, kind):
    status, _, raw = call(server, "POST", "/v1/completions", {"prompt": "a"}, {"content-type": kind})
    assert status == 415 and json.loads(raw)["error"]["type"] == "invalid_request_error"


def test_unknown_routes_and_methods_answer_in_the_same_form(server):
    for method, path, expected in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/x", 404)):
        status, _, raw = call(server, method, path, {} if method == "PUT" else None)
        assert status == expected and json.loads(raw)["error"]["message"].startswith("no")


def spoken(server, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes back on a connection on which `data` is all that is ever said."""
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=seconds) as line:
        line.sendall(data)
        answer = b""
        while piece := line.recv(65536):
            answer += piece
        return answer


def test_a_body_that_does_not_come_is_not_waited_for(locked):
    key = f"x-api-key: {SECRET}\r\n".encode()
    head = b"POST /tokenize HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\ncontent-length: 50\r\n"
    began = time.monotonic()
    assert spoken(locked, head + key + b'\r\n{"prompt"').startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 3


def test_a_body_of_gigabytes_is_refused_at_its_head(server):
    head = b"POST /tokenize HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
    head += b"content-length: 99999999999\r\n\r\n"
    answer = spoken(server, head)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer


def test_what_is_no_http_is_answered(server):
    assert spoken(server, b"\x16\x03\x01\x02\x00 garbage\r\n\r\n").startswith(b"HTTP/1.1 400")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5, alphabet='ab[{"\\'), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(VALUES, st.booleans())
def test_strict_reading_is_json_s_own(value, ascii):
    assert body.read(json.dumps(value, ensure_ascii=ascii).encode(), 64) == value


@settings(max_examples=60)
@given(VALUES)
def test_nesting_is_counted_outside_of_strings(value):
    def depth(one):
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert body.nesting(json.dumps(value).encode()) == depth(value)


@settings(max_examples=60)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\0e1N-', max_size=40).map(str.encode))
def test_strict_reading_of_anything_gives_a_value_or_a_problem(raw):
    with contextlib.suppress(Problem):
        body.read(raw, 8)


def test_neutral_values_ask_for_nothing_and_others_are_refused(server):
    for name, values in CHAT.items():
        for value in (None, *(("anything",) if values is None else values)):
            status, said = post(server, "/v1/chat/completions", {"messages": [SUM], "max_tokens": 1, name: value})
            assert status == 200, (name, value, said)
        if values is not None:
            status, said = post(server, "/v1/chat/completions", {"messages": [SUM], name: "something"})
            assert status == 400 and name in said["error"]["message"]
    assert not asks_for_nothing(True, BOTH["best_of"]) and not asks_for_nothing(0, BOTH["store"])
