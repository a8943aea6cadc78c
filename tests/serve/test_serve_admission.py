"""Who may ask: hosts, origins, keys and types of bodies."""

import httpx
import pytest
from limbeck_server import RunningServer

from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.serve.admission import Admission
from limbeck.serve.config import ServeConfig

JSON = {b"content-type": b"application/json"}


def status(admission, method="GET", is_open=False, **headers):
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    denial = admission.denial(method, named, is_open)
    return 200 if denial is None else denial.status


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[::1", 403),
        ("localhost.:8000", 200),
        ("attacker.test", 403),
        ("localhost.attacker.test", 403),
        ("127.0.0.1.attacker.test:8000", 403),
        ("192.168.0.7", 403),
        ("", 403),
    ],
)
def test_names_of_a_server_on_loopback(host, expected):
    assert status(Admission("127.0.0.1", (), (), None), host=host) == expected


def test_names_of_a_server_for_others():
    others = Admission("0.0.0.0", ("scores.intern",), (), None)
    assert status(others, host="192.168.0.7:80") == status(others, host="scores.intern") == 200
    assert status(others, host="attacker.test") == 403
    assert status(Admission("0.0.0.0", ("*",), (), None), host="attacker.test") == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "http://localhost:9000"}, 403),  # another program of this machine
        ({"origin": "http://127.0.0.1:8000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://app.test"}, 200),
        ({"origin": "https://app.test.attacker.test"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),  # a link to the page
    ],
)
def test_origins(headers, expected):
    admission = Admission("127.0.0.1", (), ("https://app.test/",), None)
    assert status(admission, host="localhost:8000", **headers) == expected


def test_a_link_cannot_post():
    admission = Admission("127.0.0.1", (), (), None)
    headers = {"host": "localhost", "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert status(admission, "POST", content_type="application/x-www-form-urlencoded", **headers) == 415


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("Bearer right", 200),
        ("bearer right", 200),
        ("Bearer wrong", 401),
        ("Basic right", 401),
        ("right", 401),
        ("", 401),
    ],
)
def test_keys(sent, expected):
    admission = Admission("127.0.0.1", (), (), "right")
    assert status(admission, host="localhost", authorization=sent) == expected
    assert status(admission, host="localhost", authorization=sent, is_open=True) == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content_type": "application/json"}, 200),
        ({"content_type": "Application/JSON; charset=utf-8"}, 200),
        ({"content_type": "text/plain"}, 415),
        ({}, 415),
        ({"content_type": "application/json", "content_encoding": "br"}, 415),
        ({"content_type": "application/json", "content_encoding": "identity"}, 200),
    ],
)
def test_types_of_bodies(headers, expected):
    assert status(Admission("127.0.0.1", (), (), None), "POST", host="localhost", **headers) == expected


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_refused_at_the_start(key):
    with pytest.raises(ConfigError, match="API key is empty"):
        build(ServeConfig, {"model": "tiny-student", "api_key": key})


def test_a_page_that_is_let_in_can_read():
    page = {"origin": "https://app.test"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with RunningServer(allow_origin=["https://app.test"], api_key="key") as server:
        preflight = httpx.options(server.url + "/v1/completions", headers={**page, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.test"
        key = {"authorization": "Bearer key"}
        answer = server.post("/v1/completions", {"prompt": "12", "max_tokens": 1}, headers={**page, **key})
        assert answer.headers["access-control-allow-origin"] == "https://app.test"
        other = {"origin": "https://attacker.test"}
        refused = httpx.options(server.url + "/v1/completions", headers={**other, **asked})
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


def test_small_things_of_http():
    with RunningServer() as server:
        for path in ("/health", "/ping", "/"):
            answer = httpx.head(server.url + path)
            assert (answer.status_code, answer.content) == (200, b"")
        refused = server.post("/v1/completions", {"prompt": "1"}, headers={"content-encoding": "gzip"})
        assert refused.status_code == 415 and "content-encoding" in refused.json()["error"]["message"]
        assert httpx.get(server.url).headers["content-security-policy"].startswith("default-src 'self'")
