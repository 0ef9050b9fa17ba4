"""Which addresses a cluster has: pure arithmetic over its index.

Clusters of different names can be up at the same time. Each gets an index, and
from it blocks that overlap with no other cluster's, so that the machine can hold
routes to the pods and services of all of them. The fourth of 10.200-10.203 is
divided into 16 service ranges, hence the limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network

MAX_CLUSTERS = 16


@dataclass(frozen=True)
class AddressPlan:
    """The networks of the cluster with this index."""

    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < MAX_CLUSTERS:
            raise ValueError(f"index {self.index} is not in 0..{MAX_CLUSTERS - 1}")

    @property
    def link(self) -> IPv4Network:
        """The wire between the machine and the node."""
        return IPv4Network(f"10.200.{self.index}.0/24")

    @property
    def host_ip(self) -> str:
        return str(self.link[1])

    @property
    def node_ip(self) -> str:
        return str(self.link[2])

    @property
    def pods(self) -> IPv4Network:
        return IPv4Network(f"10.201.{self.index}.0/24")

    @property
    def fake_pods(self) -> IPv4Network:
        """Addresses that KWOK writes into the status of pods on fake nodes; nothing listens there."""
        return IPv4Network(f"10.202.{self.index}.0/24")

    @property
    def services(self) -> IPv4Network:
        return IPv4Network(f"10.203.{self.index * 16}.0/20")

    @property
    def dns_ip(self) -> str:
        return str(self.services[10])

    @property
    def interface(self) -> str:
        """The machine's end of the wire (at most 15 characters)."""
        return f"tuneserve{self.index}"

    @property
    def networks(self) -> tuple[IPv4Network, ...]:
        return (self.link, self.pods, self.fake_pods, self.services)


def free_index(taken: Collection[int], routes: Iterable[IPv4Network]) -> int | None:
    """The lowest index that no other cluster has and whose networks no route of the machine touches."""
    used = list(routes)
    for index in range(MAX_CLUSTERS):
        plan = AddressPlan(index)
        if index in taken:
            continue
        if not any(mine.overlaps(theirs) for mine in plan.networks for theirs in used):
            return index
    return None


def parse_routes(ip_route_output: str) -> list[IPv4Network]:
    """The destinations in the output of `ip -4 route show table all`, without the default route."""
    found = []
    for line in ip_route_output.splitlines():
        words = line.split()
        while words and words[0] in ("unicast", "local", "broadcast", "unreachable", "blackhole", "prohibit"):
            words = words[1:]
        if not words:
            continue
        try:
            network = IPv4Network(words[0], strict=False)
        except ValueError:
            continue
        if network.prefixlen:
            found.append(network)
    return found
