"""Supervisors on several machines tell each other what each must know of all others, and notice who has gone.

Each machine has one supervisor (lib/launch/supervise.py) and a number, its node rank. Node 0 listens at the port of
--master, the others connect to it, and it passes on what they say: lines of JSON. Nothing of what is said is code.
"""

import contextlib
import json
import platform
import select
import socket
import time
from typing import Any

from lib.distributed import network
from lib.errors import UserError

JOIN_SECONDS = 600  # machines that are started by hand may come so much later than the first one
QUIET_SECONDS = 5  # of waiting before the console says so
# With --min_nodes, for so long a machine that was lost may come back before the others start again without it.
RETURN_SECONDS = 30


class Lost(Exception):
    """Another machine has gone, with its supervisor or its network, or has not come in time."""


class Left(Lost):
    """This machine is alone; the others may have started again without it."""


class Lines:
    """Connections to other supervisors, each with lines of JSON.

    silence: seconds without a sign of the other end after which a connection is closed.
    """

    def __init__(self, silence: float):
        self.silence = min(silence, 100_000)  # the kernel takes no more
        self.open: dict[socket.socket, bytes] = {}  # {connection: the start of a line that has not come whole}

    def watch(self, connection: socket.socket) -> None:
        """Let the kernel find out whether the machine at the other end is still there."""
        every = max(1, int(self.silence / 4))
        connection.settimeout(self.silence)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, every),
            (socket.TCP_KEEPINTVL, every),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, int(1000 * self.silence)),
            (socket.TCP_NODELAY, 1),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def readable(self, seconds: float) -> list[socket.socket]:
        return select.select(list(self.open), [], [], seconds)[0] if self.open else []

    def read(self, connection: socket.socket) -> tuple[list[bytes], bool]:
        """The whole lines that have come, and whether there can be more."""
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self.open[connection] = (self.open[connection] + data).split(b"\n")
        return lines, bool(data)

    def send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who has gone is found when reading
            connection.sendall(json.dumps(message).encode() + b"\n")

    def forget(self, connection: socket.socket) -> None:
        self.open.pop(connection, None)
        connection.close()


class Meeting:
    """The supervisors of all nodes of one run, once they have come together.

    silence: seconds without a sign of another machine after which it is lost. by_hand: whether the user starts a
    command on each machine.
    """

    def __init__(self, nodes: int, node: int, silence: float, by_hand: bool):
        self.nodes, self.node, self.by_hand = nodes, node, by_hand
        self.members = list(range(nodes))  # the nodes that have come
        self.names = {node: platform.node()}  # {node: its host's name}
        self.clocks: dict[int, float] = {}  # {node: seconds by which its clock is ahead}; on node 0
        self.own_address = self.master_address = "127.0.0.1"  # as the other machines see them
        self.said: dict[int, list[Any]] = {number: [] for number in range(nodes)}
        self.lost: dict[int, float] = {}  # {node: time.monotonic() when it was found to have gone}
        self._round = 0
        self.lines = Lines(silence)
        self.peers: dict[socket.socket, int] = {}  # on node 0 all others, on the others node 0

    def come_together(self, host: str, port: int, least: int, patience: float) -> None:
        """Wait for the other nodes, at this port of node 0.

        least: so many nodes, node 0 among them, are enough after RETURN_SECONDS. patience: for so many seconds node 0
        is looked for. Raises UserError where the nodes do not fit together, Lost where one stays away.
        """
        deadline = time.monotonic() + JOIN_SECONDS
        if self.node == 0:
            _receive(self, port, deadline, least)
        else:
            _connect(self, host, port, deadline, patience)
        self.members = sorted(self.names)

    def tell(self, value: Any) -> None:
        """Tell all others this node's next value."""
        self.said[self.node].append(value)
        self.pass_on(None, "said", value)

    def heard(self) -> dict[int, Any]:
        """{node: value} of this round from those of the others that have told it."""
        self.hear(0)
        return {
            number: values[self._round]
            for number, values in self.said.items()
            if number != self.node and len(values) > self._round
        }

    def all_of(self, seconds: float) -> list[Any]:
        """Wait for this round's values of all members. That of a node that has gone, or is silent for long, is None."""
        deadline = time.monotonic() + seconds
        while len(found := self.heard() | dict.fromkeys(self.lost)) < len(self.members) - 1:
            if time.monotonic() > deadline:
                for number in set(self.members) - set(found) - {self.node}:
                    self.lost[number] = time.monotonic()
            self.hear(0.2)
        found = dict.fromkeys(self.lost) | self.heard() | {self.node: self.said[self.node][self._round]}
        self._round += 1
        return [found[number] for number in self.members]

    def exchange(self, value: Any, seconds: float = 60) -> list[Any]:
        """This round's values of all members, none of which is None. Raises Lost where one has gone without it."""
        self.tell(value)
        values = self.all_of(seconds)
        if None in values:
            raise Lost(f"{self.name_of(self.members[values.index(None)])} has gone")
        return values

    def name_of(self, node: int) -> str:
        return f"node {node} ({self.names.get(node, 'unknown')})"

    def close(self) -> None:
        for connection in self.lines.open:
            connection.close()
        self.lines.open.clear()
        self.peers.clear()

    def pass_on(self, source: socket.socket | None, kind: str, value: Any, node: int | None = None) -> None:
        """Send to all but the source."""
        for connection in self.peers:
            if connection is not source:
                self.lines.send(connection, {kind: value, "node": self.node if node is None else node})

    def hear(self, seconds: float) -> None:
        """Take in what the others have said, waiting so long for it. On node 0, pass it on."""
        for connection in self.lines.readable(seconds):
            lines, is_open = self.lines.read(connection)
            for message in map(json.loads, lines):
                if "refused" in message:
                    raise UserError(message["refused"])
                if "names" in message:
                    self.names = {int(number): name for number, name in message["names"].items()}
                elif "gone" in message:
                    self.lost.setdefault(message["gone"], time.monotonic())
                else:
                    node = self.peers[connection] if self.node == 0 else message["node"]
                    self.said[node].append(message["said"])
                    if self.node == 0:
                        self.pass_on(connection, "said", message["said"], node)
            if not is_open:
                node = self.peers.pop(connection)
                self.lines.forget(connection)
                # Without node 0, which passes on what they say, the others cannot be heard either.
                for number in [node] if self.node == 0 else set(self.members) - {self.node}:
                    self.lost.setdefault(number, time.monotonic())
                if self.node == 0:
                    self.pass_on(None, "gone", node)


# --- coming together


def _receive(meeting: Meeting, port: int, deadline: float, least: int) -> None:
    """On node 0: wait until all others are here, or for RETURN_SECONDS and until so many nodes are here."""
    try:
        server = network.listen(port, backlog=meeting.nodes)
    except OSError as error:
        raise UserError(
            f"--master: port {port} of this machine cannot be had ({error.strerror}); "
            "give another one, the same on every machine"
        ) from None
    with server:
        meeting.lines.open[server] = b""
        began, said_so = time.monotonic(), time.monotonic() + QUIET_SECONDS
        while missing := sorted(set(range(1, meeting.nodes)) - set(meeting.peers.values())):
            for connection in meeting.lines.readable(0.5):
                if connection is server:
                    visitor, _ = server.accept()
                    visitor.settimeout(10)
                    meeting.lines.open[visitor] = b""
                elif connection in meeting.peers:  # it has nothing to say yet: it has ended, and may come again
                    meeting.names.pop(meeting.peers.pop(connection))
                    meeting.lines.forget(connection)
                else:
                    _admit(meeting, connection)
            which = f"node {', '.join(map(str, missing))} of {meeting.nodes}"
            if len(meeting.peers) + 1 >= least < meeting.nodes and time.monotonic() - began > RETURN_SECONDS:
                print(f"going on without {which}, which did not come back within {RETURN_SECONDS} s")
                break
            if time.monotonic() > deadline:
                raise Lost(f"{which} did not come within {JOIN_SECONDS // 60} minutes")
            if time.monotonic() > said_so:
                said_so = deadline
                limit = f", for {RETURN_SECONDS} s" if len(meeting.peers) + 1 >= least < meeting.nodes else ""
                print(f"waiting  for {which}{limit}{_what_to_do(meeting, missing[0])}")
        del meeting.lines.open[server]
    for visitor in set(meeting.lines.open) - set(meeting.peers):  # of other programs
        meeting.lines.forget(visitor)
    meeting.pass_on(None, "names", meeting.names)


def _what_to_do(meeting: Meeting, node: int) -> str:
    return f": the same command, there with --node_rank {node}" if meeting.by_hand else ""


def _admit(meeting: Meeting, visitor: socket.socket) -> None:
    """Let a node in, or send it away with the reason. A visitor that is no supervisor is sent away without one."""
    lines, is_open = meeting.lines.read(visitor)
    try:
        hello = json.loads(lines[0]) if lines else None
        if hello is None and is_open:
            return
        assert hello is not None
        node, nodes, name = int(hello["node"]), int(hello["nodes"]), str(hello["name"])
    except (ValueError, LookupError, TypeError, AssertionError):
        meeting.lines.forget(visitor)
        return
    refused = None
    if nodes != meeting.nodes:
        refused = f"it has --nodes {nodes}, and node 0 ({meeting.names[0]}) has --nodes {meeting.nodes}"
    elif node in meeting.names or not 0 < node < nodes:
        refused = f"node {node} is here already: {meeting.names.get(node)}; each machine needs its own --node_rank"
    if refused:
        meeting.lines.send(visitor, {"refused": f"{name} cannot take part: {refused}"})
        meeting.lines.forget(visitor)
        return
    if meeting.own_address == "127.0.0.1":
        meeting.own_address = meeting.master_address = network.plain(visitor.getsockname()[0])
    meeting.names[node], meeting.clocks[node] = name, float(hello["clock"]) - time.time()
    meeting.peers[visitor] = node
    meeting.lines.watch(visitor)


def _connect(meeting: Meeting, host: str, port: int, deadline: float, patience: float) -> None:
    """On the others: come to node 0, which may not be there yet, for so many seconds, and wait until all are here."""
    began, said_so = time.monotonic(), time.monotonic() + QUIET_SECONDS
    while not meeting.peers:
        try:
            connection = socket.create_connection((host, port), timeout=5)
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                raise UserError(f"--master: there is no host {host!r} ({error.strerror})") from None
            why = error.strerror or "no answer"
            if time.monotonic() - began > patience:
                raise Lost(
                    f"node 0 did not answer at {host}:{port} within {patience:.0f} s ({why}); is it started, and "
                    "does a firewall let this machine through? --master HOST:PORT names another of its addresses"
                ) from None
            if time.monotonic() > said_so:
                said_so = deadline
                print(f"waiting  for node 0 at {host}:{port} ({why}){_what_to_do(meeting, 0)}")
            time.sleep(0.5)
            continue
        meeting.own_address = network.plain(connection.getsockname()[0])
        meeting.master_address = network.plain(connection.getpeername()[0])
        meeting.lines.open[connection], meeting.peers[connection] = b"", 0
        meeting.lines.watch(connection)
        meeting.lines.send(
            connection,
            {"node": meeting.node, "nodes": meeting.nodes, "name": meeting.names[meeting.node], "clock": time.time()},
        )
        while 0 not in meeting.names and 0 not in meeting.lost:  # until node 0 says who is here
            try:
                meeting.hear(1)
            except (ValueError, LookupError, TypeError):
                raise UserError(f"what answers at {host}:{port} is no other node; give another --master") from None
            if time.monotonic() > deadline:
                raise Lost(f"not all {meeting.nodes} nodes came within {JOIN_SECONDS // 60} minutes")
            if time.monotonic() > said_so:
                said_so = deadline
                print(f"waiting  at {host}:{port} until all {meeting.nodes} nodes are here")
        if 0 in meeting.lost:  # it was about to end, or is no supervisor: try again
            meeting.lost.clear()
            meeting.close()
            time.sleep(0.5)
