"""This machine's network interfaces, addresses and ports. It imports nothing large."""

import errno
import os
import socket

import psutil

NOWHERE = "192.0.2.1"  # an address of documentation (RFC 5737): what is sent there would take the default route


def address_towards(host: str) -> str:
    """This machine's own address on the route to a host; one of the loopback where the host is this machine's own name.

    Nothing is sent. Raises OSError where there is no such host or no route to it.
    """
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as unused:
        unused.connect(target)
        return str(unused.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address, such as "eth0"."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == address for found in addresses):
            return name
    return None


def interface_towards(master: str) -> str | None:
    """The interface through which this machine reaches the master and the others reach this machine; None if unknown.

    On the master itself its name often means the loopback (Debian writes `127.0.1.1 <own name>` into /etc/hosts). Then
    it is the interface of the default route, or else the first one that is up.
    """
    for host in (master, NOWHERE):
        try:
            found = interface_of(address_towards(host))
        except OSError:
            continue
        if found not in (None, "lo"):
            return found
    return next((name for name, now in sorted(psutil.net_if_stats().items()) if now.isup and name != "lo"), None)


def use_interface_towards(master: str) -> None:
    """Let gloo and NCCL take that interface, unless the user has chosen one.

    Gloo else takes the one of this machine's own name, which no other machine reaches where that is 127.0.1.1.
    """
    interface = interface_towards(master)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": this one, not all whose names begin so


def address_of(interface: str) -> str | None:
    """The address of an interface, IPv4 before IPv6; None where it has none, or does not exist."""
    addresses = psutil.net_if_addrs().get(interface, [])
    return next(
        (
            found.address
            for family in (socket.AF_INET, socket.AF_INET6)
            for found in addresses
            if found.family == family and not found.address.startswith("fe80:")  # which needs the interface's name too
        ),
        None,
    )


def listen(port: int = 0, backlog: int = 100) -> socket.socket:
    """A socket to which machines connect by IPv4 or IPv6. Raises OSError where the port is taken."""
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    except (OSError, ValueError) as error:  # ValueError: the system has no IPv6; EADDRNOTAVAIL: it is switched off
        if isinstance(error, OSError) and error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
    return socket.create_server(("", port), backlog=backlog)


def plain(address: str) -> str:
    """10.0.0.1 for ::ffff:10.0.0.1, as a socket of both families has it."""
    return address.removeprefix("::ffff:")


def free_port() -> int:
    """A port that no process uses, so that two runs on one machine do not disturb each other."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])
