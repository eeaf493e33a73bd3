"""Which node this is: the one module that asks netifaces."""

from __future__ import annotations

import netifaces

from ukai.config import Config
from ukai.errors import UsageError


def local_addresses() -> list[str]:
    """The IPv4 addresses of this machine's interfaces."""
    found = []
    for interface in netifaces.interfaces():
        for entry in netifaces.ifaddresses(interface).get(netifaces.AF_INET, []):
            found.append(str(entry["addr"]))
    return found


def own_address(config: Config) -> str:
    """The address by which the cluster knows this node.

    ``node_address`` where it is set; metad's address where this machine has it; else the only address that is
    not a loopback one.  Raises UsageError when that leaves a choice.
    """
    if config.node_address:
        return config.node_address
    addresses = local_addresses()
    if config.metad_address in addresses:
        return config.metad_address
    outside = [a for a in addresses if not a.startswith("127.")]
    if len(outside) == 1:
        return outside[0]
    raise UsageError(
        f"this machine has the addresses {', '.join(addresses) or 'none'}; set node_address to one of them"
    )
