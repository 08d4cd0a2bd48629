"""Settings of a server: where it listens, and what no client can make it exceed."""

import ipaddress
from dataclasses import dataclass

from gristmill.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """name: of the model, which requests must give. max_requests: worked on at once; more get 503.

    `header_s`, `body_s`: how long a client may take to send them. `half_closed_s`: after how long a client that has
    shut its sending side down, and has no answer yet, is asked for a sign of life. `stall_s`: how long a client may
    leave data unread. `request_s`: how long a request may take in all. `drain_s`: how long running requests get to end
    after SIGTERM.
    max_sequences: answers of one request, all prompts together. max_backlog: pieces that wait for one slow reader.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "gristmill"
    max_requests: int = 512
    max_sequences: int = 128
    max_header_bytes: int = 16384
    max_body_bytes: int = 2 << 20
    max_backlog: int = 16384
    header_s: float = 10
    body_s: float = 30
    stall_s: float = 30
    half_closed_s: float = 2
    request_s: float = 600
    drain_s: float = 30

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"port={self.port} must be from 0 (any free one) to 65535")
        if not self.name or not self.name.isprintable():
            raise InputError(
                f"name={self.name!r:.80} must be printable and not empty; it is the model's id for clients"
            )
        for name in ("max_requests", "max_sequences", "max_header_bytes", "max_body_bytes", "max_backlog"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("header_s", "body_s", "stall_s", "half_closed_s", "request_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be positive")
        if not self.drain_s >= 0:
            raise InputError(f"drain_s={self.drain_s} must not be negative; 0 cuts what runs off at once")

    @property
    def is_loopback(self) -> bool:
        """Whether nobody outside of this machine can connect. A name other than localhost is not looked up."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
