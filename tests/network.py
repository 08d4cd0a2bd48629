"""Two hosts on one machine: network namespaces joined by a cable that can be pulled, which nobody is told of.

Linux, iproute2, and the right to make namespaces.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Network:
    """`hosts`: names of the namespaces. `address`: the first one's. Both call their end of the cable `interface`."""

    hosts: tuple[str, str]
    address: str
    interface: str = "cable"

    def cut_off(self, host: str) -> None:
        """Connections stay open and nothing arrives: no FIN, no RST."""
        _ip("-n", host, "link", "set", self.interface, "down")


def missing() -> str | None:
    """What is not here that a network needs."""
    if shutil.which("ip") is None:
        return "no `ip`: install iproute2"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as problem:
        return f"no network namespaces here (root makes them): {problem.stderr.decode().strip()}"


@contextmanager
def two_hosts() -> Iterator[Network]:
    hosts = f"gristmill-{os.getpid()}-a", f"gristmill-{os.getpid()}-b"
    network = Network(hosts, "10.213.0.1")
    try:
        for host in hosts:
            _ip("netns", "add", host)
        name = network.interface
        _ip("-n", hosts[0], "link", "add", name, "type", "veth", "peer", "name", name, "netns", hosts[1])
        for number, host in enumerate(hosts, 1):
            _ip("-n", host, "address", "add", f"10.213.0.{number}/24", "dev", name)
            _ip("-n", host, "link", "set", name, "up")
            _ip("-n", host, "link", "set", "lo", "up")
        yield network
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def enter(host: str) -> None:
    """This process, and the threads that it starts from now on, are on that host."""
    with (Path("/run/netns") / host).open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)
