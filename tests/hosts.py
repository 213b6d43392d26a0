"""Several hosts on this machine: network namespaces, connected by one that is their switch.

Needs root and `ip`. Whoever runs a process on a host starts it with `ip netns exec HOST`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

INTERFACE, SWITCH = "rw0", "rw-switch"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def connected_hosts(addresses: Mapping[str, str]) -> Iterator[None]:
    """Namespaces whose `INTERFACE` has an address, and a switch between them.

    Args:
        addresses: of one /24 network, by host; at most 15 characters each.
    """
    everything = (*addresses, SWITCH)
    for name in everything:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        ip("netns", "add", name)
    try:
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for host, address in addresses.items():
            cable = ["link", "add", INTERFACE, "netns", host, "type", "veth"]
            ip(*cable, "peer", "name", host, "netns", SWITCH)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                ip("-n", host, "link", "set", interface, "up")
            ip("-n", SWITCH, "link", "set", host, "up")
            plug(host, in_place=True)
        yield
    finally:
        for name in everything:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def plug(host: str, in_place: bool) -> None:
    """Let a host's packets through, or lose them without a word, as a dead switch port would."""
    where = ("master", "bridge") if in_place else ("nomaster",)
    ip("-n", SWITCH, "link", "set", host, *where)
