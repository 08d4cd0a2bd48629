"""Settings of a server, and the bounds that hold for every client."""

import ipaddress
import math
from dataclasses import dataclass

from gristmill.errors import InputError

MAX_HEADER_BYTES = 16384  # a key and the headers of a browser and a proxy take a tenth of it
MAX_BODY_BYTES = 2 << 20  # a context of 262,144 token ids, written as JSON
MAX_ANSWERS = 128  # of one request, all prompts together: as many as OpenAI's n
MAX_BACKLOG = 16384  # pieces that wait for one slow reader; then its request is cancelled
HEADER_S, BODY_S = 10.0, 30.0  # for a client to send them: 2 MiB within 30 s is a phone's line
STALL_S = 30.0  # for which a client may leave data unread
HALF_CLOSED_S = 2.0  # after which a client that closed its sending side, and has no answer yet, is probed


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """name: of the model, which requests must give. max_requests: worked on at once; more get 503. request_s: the most
    time of one request. drain_s: time for running requests to end after SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "gristmill"
    max_requests: int = 512
    request_s: float = 600
    drain_s: float = 30

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"port={self.port} must be from 0 (any free one) to 65535")
        if not self.name or not self.name.isprintable():
            raise InputError(
                f"name={self.name!r:.80} must be printable and not empty; it is the model's id for clients: give --name"
            )
        if self.max_requests < 1:
            raise InputError(f"max_requests={self.max_requests} must be at least 1")
        if not 0 < self.request_s < math.inf:
            raise InputError(f"timeout={self.request_s} must be a positive number of seconds")
        if not 0 <= self.drain_s < math.inf:
            raise InputError(f"drain={self.drain_s} must be a number of seconds from 0; 0 cancels running requests")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. A name other than localhost is not looked up."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
