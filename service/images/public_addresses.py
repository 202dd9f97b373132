"""Which IP addresses belong to hosts of the public Internet. Pure: resolves nothing, connects to nothing.

What IANA keeps for special purposes leads into an operator's own network, or carries another address inside it
(IPv4-mapped, 6to4, Teredo, NAT64): such an address is never public here, whatever the one inside it is.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address

SPECIAL_IPV4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared behind carriers' NAT; some clouds' metadata
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # a cloud's own services, though it looks public
            "169.254.0.0/16",  # link-local; most clouds' metadata
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved; broadcast
        ),
    )
)
UNICAST_IPV6 = IPv6Network("2000::/3")
"""All that is assigned to hosts so far: loopback, link-local, unique local, multicast, mapped, NAT64 lie outside."""
SPECIAL_IPV6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments; Teredo
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4
            "3fff::/20",  # documentation
        ),
    )
)


def is_public(address: str) -> bool:
    """False as well for what is no address in its usual form."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv4Address):
        return not any(parsed in network for network in SPECIAL_IPV4)
    return parsed in UNICAST_IPV6 and not any(parsed in network for network in SPECIAL_IPV6)
