"""A small web server for pages on this machine: what the viewer and the studio share.

It binds to this machine alone unless told otherwise, and answers only to its own names, so that no web page elsewhere
can reach it through a browser (DNS rebinding, cross-site requests).
"""

import ipaddress
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from geodiff4d.core.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LocalServer(ThreadingHTTPServer):
    """HTTP server that knows by which names it may be called."""

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: "type[LocalHandler]"):
        """Open the port.

        Raises:
            UserError: it is taken, or the address is not this machine's.
        """
        self.local = host in LOOPBACK
        self.names = {*LOOPBACK, host.lower()} | (set() if self.local else own_names())
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --port or --host") from None

    def link(self, host: str) -> str:
        """Return the address that a browser opens; of a server that listens on all of them, this machine's own."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
        name = everywhere.get(host, host)
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: a browser that disconnects during an answer is no error."""


class LocalHandler(BaseHTTPRequestHandler):
    """Who is answered, and how."""

    server: LocalServer
    timeout = 60

    def welcome(self) -> bool:
        """Return whether a request was meant for this server and sent by its own page; answer 403 if not."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        name = (host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host).strip("[]").lower()
        # No page elsewhere can make a browser send a bare address as Host, only a name of its own.
        known = name in self.server.names or (not self.server.local and is_address(name))
        if known and origin in (None, f"http://{host}"):
            return True
        self.send_error(403)
        return False

    def send(self, kind: str, data: bytes, status: int = 200, **headers: str) -> None:
        """Answer with a whole document; underscores in the headers' names stand for hyphens."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin(self, kind: str) -> None:
        """Begin an answer that goes on until one side leaves."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Print nothing."""


def own_names() -> set[str]:
    """Return this machine's host names, also with `.local`, as phones on the same network use."""
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"}


def is_address(name: str) -> bool:
    """Return whether a host is an IP address and not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
