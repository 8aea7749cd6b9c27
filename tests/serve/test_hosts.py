"""Which names a server answers to: a page whose own name was pointed at this machine is turned away."""

import json
from urllib.parse import urlsplit

import openai
import pytest
from starlette.datastructures import Headers

from tests.serve.conftest import call
from tests.serve.test_guard import spoken
from trimaran import config
from trimaran.errors import Refusal
from trimaran.serve.hosts import Hosts
from trimaran.serve.main import running
from trimaran.serve.problem import Problem
from trimaran.serve.settings import ServerSettings, ServeSettings

OWN = [
    "localhost",
    "LOCALHOST:80",
    "chat.localhost:3000",
    "127.0.0.1",
    "127.8.9.1:1",
    "[::1]",
    "[::1]:8000",
    "localhost.",
]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "notlocalhost",
    "evil.example@localhost",
    "localhost, evil.example",
    "192.168.1.4",
    "0.0.0.0",
    "[::2]",
    "localhost:80:80",
    "localhost/x",
    "",
]
QUESTION = {"model": "learnt", "messages": [{"role": "user", "content": "What is two and two?"}], "max_tokens": 2}


def lets_in(hosts: Hosts | None, *given: str) -> bool:
    try:
        if hosts is not None:
            hosts.check(Headers(raw=[(b"host", one.encode()) for one in given]))
    except Problem:
        return False
    return True


def test_a_server_without_a_key_answers_to_its_own_names():
    hosts = Hosts.of(ServeSettings())
    assert [host for host in OWN if not lets_in(hosts, host)] == []
    assert [host for host in FOREIGN if lets_in(hosts, host)] == []
    assert not lets_in(hosts) and not lets_in(hosts, "localhost", "evil.example")


@pytest.mark.parametrize(
    ("chosen", "known", "unknown"),
    [
        (
            {"allowed_hosts": ("Boat.Example", "10.0.0.7")},
            ["boat.example:80", "10.0.0.7", "localhost"],
            ["a.boat.example"],
        ),
        ({"allowed_hosts": ("*",)}, FOREIGN, []),
        ({"api_key": "k"}, FOREIGN, []),  # who holds the key may call the server what he likes
        ({"host": "0.0.0.0"}, FOREIGN, []),  # all the network may ask, as the warning says
        ({"host": "127.0.1.1"}, ["127.0.1.1", "localhost"], FOREIGN),
        ({"api_key": "k", "allowed_hosts": ("boat.example",)}, ["boat.example", "[::1]"], FOREIGN),
        ({"host": "0.0.0.0", "allowed_hosts": ("fe80::7",)}, ["[fe80::7]:1", "0.0.0.0"], ["evil.example"]),
    ],
)
def test_names_are_asked_for_where_they_protect_or_are_given(chosen, known, unknown, monkeypatch):
    monkeypatch.delenv("TRIMARAN_API_KEY", raising=False)
    hosts = Hosts.of(ServeSettings(**chosen))
    assert [host for host in known if not lets_in(hosts, host)] == []
    assert [host for host in unknown if lets_in(hosts, host)] == []


@pytest.mark.parametrize("host", ["http://boat.example", "boat.example:80", "boat.example/x", "", "*.example"])
def test_an_allowed_host_is_a_name_alone(host):
    with pytest.raises(ValueError, match="is no host"):
        ServeSettings(allowed_hosts=(host,))
    with pytest.raises(Refusal, match="allowed_hosts"):
        config.load(ServerSettings, None, [f'serve.allowed_hosts=["{host}"]'])


def test_a_rebound_page_gets_nothing(server):
    """Every route, the page and /health too: what a foreign page must not read is that there is anything at all."""
    routes = [("GET", "/"), ("GET", "/health"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/static/page.css")]
    for method, path in [*routes, ("POST", "/v1/chat/completions")]:
        body = json.dumps(QUESTION).encode() if method == "POST" else None
        status, _, raw = call(
            server, method, path, body, {"host": "evil.example:8000", "origin": "http://evil.example"}
        )
        said = json.loads(raw)["error"]
        assert status == 421 and said["code"] == "unknown_host" and "serve.allowed_hosts" in said["message"]
        assert call(server, method, path, body, {"host": "localhost:9000"})[0] == 200
    assert spoken(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421")


def test_clients_by_every_name_of_this_machine(server):
    port = urlsplit(server.url).port
    for name in ("127.0.0.1", "localhost"):
        client = openai.OpenAI(base_url=f"http://{name}:{port}/v1", api_key="none", max_retries=0)
        assert client.models.list().data[0].id == "learnt"
        stranger = client.with_options(default_headers={"host": "evil.example"})
        with pytest.raises(openai.APIStatusError) as refused:
            stranger.chat.completions.create(**QUESTION)
        assert refused.value.status_code == 421 and refused.value.body["code"] == "unknown_host"


def test_a_name_that_the_settings_allow(folder):
    with running(folder, ["serve.port=0", "engine.rows=1", 'serve.allowed_hosts=["boat.example"]']) as server:
        for host, expected in (("boat.example", 200), ("other.example", 421)):
            assert call(server, "GET", "/health", headers={"host": host})[0] == expected
