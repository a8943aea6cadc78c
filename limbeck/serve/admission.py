"""Who may ask, by the headers that browsers cannot forge for a page: a web page must neither use nor read the server.

A page of another origin is told by `Origin`, and by `Sec-Fetch-Site` where a browser leaves that out; a page whose own
name was re-bound to this address (DNS rebinding) by `Host`. Clients that are no browsers send neither of the first two.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "::1", "localhost")
BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


class Denial(NamedTuple):
    """Why a request is not let in."""

    status: int
    message: str


class Admission:
    """Checks of one server."""

    def __init__(self, host: str, allow_host: Sequence[str], allow_origin: Sequence[str], api_key: str | None) -> None:
        """`host`: the address that the server listens on."""
        self._hosts = {name.lower() for name in (*LOOPBACK, host, *allow_host)}
        self._any_address = host not in LOOPBACK
        self._origins = {origin.rstrip("/").lower() for origin in allow_origin}
        self._key = None if api_key is None else _digest(api_key.encode())

    def denial(self, method: str, headers: Mapping[bytes, bytes], is_open: bool) -> Denial | None:
        """Why a request is refused by its headers; None lets it in. `is_open`: needs no key."""
        host, origin = _text(headers, b"host"), _text(headers, b"origin")
        if not self._knows(_name(host)):
            return Denial(403, f"The host {host[:100]!r} is not a name of this server; --allow-host lets it be one.")
        if not self._may_come_from(origin, host, headers):
            found = repr(origin[:100]) if origin else "another site"
            return Denial(403, f"Web pages of {found} may not use this server; --allow-origin lets them.")
        is_preflight = method == "OPTIONS"
        if not is_open and not is_preflight and not self._has_key(headers):
            return Denial(401, "A valid key is needed: send it as `Authorization: Bearer KEY`.")
        return _unreadable(headers) if method in BODY_METHODS else None

    def _knows(self, name: str) -> bool:
        if "*" in self._hosts or name in self._hosts:
            return True
        return self._any_address and _is_address(name)  # a name can be re-bound, an address cannot

    def _may_come_from(self, origin: str, host: str, headers: Mapping[bytes, bytes]) -> bool:
        if origin:
            known = origin.lower()
            return bool({"*", known} & self._origins) or urlsplit(known).netloc == host.lower()
        if _text(headers, b"sec-fetch-site") in ("cross-site", "same-site"):
            return "*" in self._origins or _text(headers, b"sec-fetch-mode") == "navigate"
        return True

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        if self._key is None:
            return True
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        # Digests have one length, so that comparing takes one time whatever was sent.
        return hmac.compare_digest(_digest(sent.strip()), self._key) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1").strip()


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower() if "]" in host else ""
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _unreadable(headers: Mapping[bytes, bytes]) -> Denial | None:
    """A body of another type is what a page can send without asking."""
    kind = _text(headers, b"content-type").partition(";")[0].strip().lower()
    if kind != "application/json":
        return Denial(415, f"A body of type {kind[:100]!r}; send the header content-type: application/json.")
    encoding = _text(headers, b"content-encoding").lower()
    if encoding not in ("", "identity"):
        return Denial(415, f"content-encoding {encoding[:40]!r} is not read; send the body as it is.")
    return None
