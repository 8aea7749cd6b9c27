"""The names that a server goes by, as clients give them in the Host header.

A server that asks for no key relies on being out of reach. Another machine is, but a page of any site is not: its own
name may be pointed at 127.0.0.1 once it is loaded ("DNS rebinding"), and to the browser this server is then the page's
own origin, whose answers it may read. Only the Host header still has the name of that site.
"""

import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers

from trimaran.serve.problem import Problem
from trimaran.serve.settings import ServeSettings

ANY = "*"
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::\d*)?")  # a name or an address, perhaps with a port


class Hosts:
    """`names`, and this machine's own: localhost, names below it (nobody can point these away), 127.0.0.1, [::1]."""

    def __init__(self, names: Sequence[str]):
        self.names = frozenset(map(plain, names))

    @classmethod
    def of(cls, settings: ServeSettings) -> "Hosts | None":
        """The names that are let in; None: any, where names are no protection and none are asked for."""
        exposed = settings.key() is not None or not settings.local
        if ANY in settings.allowed_hosts or (exposed and not settings.allowed_hosts):
            return None
        return cls([settings.host, *settings.allowed_hosts])

    def check(self, headers: Headers) -> None:
        """Refuses with 421 what is meant for somebody else. Ports are not looked at: they may be forwarded."""
        given = headers.getlist("host")
        found = HOST.fullmatch(given[0].strip().lower()) if len(given) == 1 else None
        if found is None or not self.known(plain(found[1])):
            said = " and ".join(map(repr, given)) or "no name"
            allowed = ", ".join(sorted({"localhost", "127.0.0.1", "[::1]", *self.names}))
            message = f"a request for the host {said}; allowed: {allowed}; next: use one, or add to serve.allowed_hosts"
            raise Problem(421, message, code="unknown_host")

    def known(self, name: str) -> bool:
        return name in self.names or name == "localhost" or name.endswith(".localhost") or loopback(name)


def plain(name: str) -> str:
    """One spelling of a host: no brackets, no dot at its end, small letters."""
    return name.strip().lower().strip("[]").removesuffix(".")


def loopback(name: str) -> bool:
    """Whether `name` is an address of this machine alone."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
