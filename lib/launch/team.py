"""The machines of one run: do they fit together, before anything starts, and how did the run end on all of them?

One machine is a team of one, which has nothing to compare and nobody to ask.
"""

import argparse
import base64
import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.distributed import network
from lib.distributed.compilation import check_compilation
from lib.errors import FAULT, MISTAKE, STOPPED, UNKILLABLE_SECONDS, UserError
from lib.launch.facts import differences, facts
from lib.launch.meeting import JOIN_SECONDS, RETURN_SECONDS, Left, Lost, Meeting
from lib.launch.start_ranks import GRACE_SECONDS, LAST_UPLOAD_SECONDS, OWN_WORDS_SECONDS

REACH_SECONDS = 5
START_SECONDS = 120  # within which hosts.py has started this command on all machines
# After another machine's ranks have failed, start_ranks lets this one's say so and end by themselves.
LAST_WORDS_SECONDS = OWN_WORDS_SECONDS + GRACE_SECONDS + 1
GONE_SECONDS = 2  # the same after a machine has gone, of which nothing more can be heard
# Within which another machine ends its ranks: exit functions, and processes that the kernel holds.
END_SECONDS = LAST_UPLOAD_SECONDS + GRACE_SECONDS + UNKILLABLE_SECONDS


@dataclass(frozen=True)
class Start:
    """What all machines know of one start. options: for the launcher; on one machine, beside those of its devices."""

    run_dir: str | None
    resume: bool
    restarts: int
    options: list[str]


class Team:
    """All machines of a run; on each machine its supervisor makes one.

    silence: seconds without a sign of another machine after which it is lost. least: so many machines, the first one
    among them, are enough to start again; 0: all of them. paths: settings that may be files of each machine. mistake:
    a line on why this machine cannot take part (lib/launch/preflight.py), which is said to all. by_hand: whether a user
    starts and ends each machine's command, and not lib/launch/hosts.py. only_check: nothing is to be started, as a
    machine is absent of which lib/launch/hosts.py has said so.
    """

    def __init__(
        self, nodes: int = 1, node: int = 0, master: str = "", silence: float = 600, least: int = 0,
        paths: Sequence[Any] = (), mistake: str | None = None, by_hand: bool = True,
        only_check: bool = False,
    ):  # fmt: skip
        self.nodes, self.node, self.silence, self.least, self.paths = nodes, node, silence, least or nodes, paths
        self.host, self.port = split_address(master) if nodes > 1 else ("", 0)
        self.mistake, self.by_hand, self.only_check = mistake, by_hand, only_check
        self.meeting: Meeting | None = None
        self._others_failed_at: float | None = None

    def gather(
        self, launched: argparse.Namespace, run_dir: str | None, began: bool, restarts: int, dry_run: bool = False
    ) -> Start:
        """Wait until all machines are here, and compare them. Where to run and how often is said by node 0, or, if the
        run has begun, by a machine that was there: node 0's command may have been started again.

        launched: what this machine's launcher was told (start_ranks.parse). Raises UserError with all faults that were
        found, a line each, Lost where a machine has gone, and Left where this one does not find back to the others.
        """
        if self.mistake and (self.nodes == 1 or dry_run):
            raise UserError(self.mistake)
        if self.only_check and (self.nodes == 1 or dry_run):
            raise UserError("")  # there is nothing to add
        if self.nodes == 1:
            return Start(run_dir, began, restarts, ["--master_port", str(network.free_port())])
        if dry_run:
            options = options_of([launched.ids] * self.nodes, self.node, self.host, self.port)
            return Start(run_dir, began, restarts, options)
        meeting = self._meet()
        self._others_failed_at = None
        nodes = self._compare(meeting, launched, {"run_dir": run_dir, "began": began, "restarts": restarts})
        number = meeting.members.index(self.node)  # without machines that have gone
        options = options_of([node["ids"] for node in nodes], number, meeting.master_address, nodes[0]["port"])
        leader = next((node for node in nodes if node["began"]), nodes[0])
        return Start(leader["run_dir"], leader["began"], leader["restarts"], options)

    def _compare(self, meeting: Meeting, launched: argparse.Namespace, run: dict[str, Any]) -> list[dict[str, Any]]:
        """What each machine says of itself, this one also what `run` has. Raises UserError where they do not fit."""
        settings, here = launched.arguments, meeting.names[self.node]
        folder = run["run_dir"] if self.node == 0 else None
        chosen = os.environ.get("GLOO_SOCKET_IFNAME")
        # launch.sh has set it, but for CUDA. On a machine with a mistake it says nothing.
        accelerator = {} if self.mistake else {"accelerator": os.environ.get("DS_ACCELERATOR", "cuda")}
        token = _leave_token(folder)
        with _removed_in_the_end(token), network.listen(backlog=self.nodes) as server:
            mine = {
                "facts": facts(Path(launched.script), settings, self.paths) | accelerator, "settings": settings,
                "ids": launched.ids, "address": network.address_of(chosen) if chosen else meeting.own_address,
                "interface": chosen, "reach": server.getsockname()[1], "port": network.free_port(),
                "folder": folder and str(Path(folder).absolute()), "token": token,
                "clocks": {str(number): ahead for number, ahead in meeting.clocks.items()},
            }  # fmt: skip
            nodes = meeting.exchange(mine | run)
            first, names = nodes[0], [meeting.names[number] for number in meeting.members]
            for number, node in zip(meeting.members, nodes, strict=True):
                node["clock"] = first["clocks"].get(str(number), 0)
            problems = [
                f"{here}: {self.mistake}" if self.mistake else None,
                _problem_with_compilation(settings, here),
                _problem_with_folder(first, names[0], here, self.node == 0),
            ]
            with ThreadPoolExecutor(64) as pool:
                others = [each for each in zip(meeting.members, names, nodes, strict=True) if each[0] != self.node]
                problems += pool.map(lambda other: _cannot_reach(here, *other[1:]), others)
            faults = differences(nodes, list(map(meeting.name_of, meeting.members)))
            faults += [problem for found in meeting.exchange(list(filter(None, problems))) for problem in found]
        if faults and self.node and not self.by_hand:  # node 0 has said them on the one console
            raise UserError(f"{len(faults)} of what {meeting.name_of(0)} says")
        if faults or self.only_check:
            raise UserError("\n".join(faults))
        return nodes

    def _meet(self) -> Meeting:
        """Come together, unless all are together still."""
        if self.meeting is not None and not self.meeting.lost and len(self.meeting.members) == self.nodes:
            return self.meeting
        is_first = self.meeting is None
        self.leave()
        least, patience = self.nodes, float(JOIN_SECONDS if self.by_hand else START_SECONDS)
        if not is_first:
            least = self.least
            if least < self.nodes or not self.by_hand:  # nobody else will start node 0 again
                patience = RETURN_SECONDS + 15
        meeting = Meeting(self.nodes, self.node, self.silence, self.by_hand)
        try:
            meeting.come_together(self.host, self.port, least, patience)
        except (UserError, Lost) as error:
            if is_first:
                raise
            raise (Left if self.node and patience < JOIN_SECONDS else Lost)(str(error)) from None
        self.meeting = meeting
        return meeting

    def others_failed(self) -> bool:
        """Whether the ranks of another machine have failed and those here have had the time to say so."""
        if self.meeting is None:
            return False
        failed = any(end["status"] not in (0, STOPPED) for end in self.meeting.heard().values())
        if self._others_failed_at is None and (failed or self.meeting.lost):
            self._others_failed_at = time.monotonic()
        patience = GONE_SECONDS if self.meeting.lost else LAST_WORDS_SECONDS
        return self._others_failed_at is not None and time.monotonic() - self._others_failed_at > patience

    def verdict(self, status: int, finished: bool, signal: int | None, words: Sequence[str] = ()) -> tuple[int, bool]:
        """(exit code of the run, whether another start may help), the same on all machines.

        status: the exit code of this machine's ranks. finished: whether the run's last file is there. signal: the one
        that asked this machine to stop. words: the lines of this machine's ranks on what went wrong, for the first
        machine's console.
        """
        if self.meeting is None:
            return verdict([{"status": status, "finished": finished, "signal": signal}])
        self.meeting.tell({"status": status, "finished": finished, "signal": signal, "words": list(words)})
        ends = self.meeting.all_of(END_SECONDS)
        code, again = verdict(ends)
        if code not in (0, STOPPED):
            for number, end in zip(self.meeting.members, ends, strict=True):
                for line in end["words"] if end is not None and self.node == 0 else ():
                    print(f"{self.meeting.names[number]}: {line}", file=sys.stderr)
                if number != self.node and (end is None or end["status"] == code or end["signal"]):
                    how = "has gone" if end is None else f"ended with exit code {code}"
                    print(f"error: {self.meeting.name_of(number)} {how}", file=sys.stderr)
        return code, again

    def leave(self) -> None:
        if self.meeting is not None:
            self.meeting.close()


def verdict(ends: list[dict[str, Any] | None]) -> tuple[int, bool]:
    """(exit code, whether another start may help) from how each machine's ranks ended; None is a machine that has gone.

    Only the first machine's word on whether the run has finished counts, as the others may see the disk later.
    """
    first = ends[0]
    if first is not None and first["finished"]:
        return 0, False
    # DeepSpeed's launcher ends with 0 when its child was killed.
    codes = [end["status"] for end in ends if end is not None]
    for end in ends:
        if end is not None and end["signal"]:  # of Ctrl-C on this machine
            code = next((code for code in codes if code in (MISTAKE, STOPPED)), end["status"])
            return (code if 0 < code < 128 else 128 + end["signal"]), False
    for code in (MISTAKE, STOPPED):
        if code in codes:
            return code, False
    # A rank that only lost contact ends with FAULT: what another one ended with says more.
    telling = [code % 256 for code in codes if code % 256 not in (0, FAULT)]
    return (telling[0] if telling else FAULT), True


def options_of(ids: list[list[int]], node: int, address: str, port: int) -> list[str]:
    """The options by which a launcher starts the ranks of one machine. ids: the devices of each machine."""
    world = json.dumps({f"node{number}": of_node for number, of_node in enumerate(ids)})
    return [
        f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}", f"--node_rank={node}",
        f"--master_addr={address}", f"--master_port={port}",
    ]  # fmt: skip


def _cannot_reach(here: str, name: str, node: dict[str, Any]) -> str | None:
    """Why this machine's ranks could not talk to another's."""
    try:
        socket.create_connection((node["address"] or "", node["reach"]), REACH_SECONDS).close()
    except OSError as error:
        remedy = (
            f"GLOO_SOCKET_IFNAME is {node['interface']} there; leave it out, or name the interface that all reach"
            if node["interface"]
            else "does a firewall between the machines close ports above 1024?"
        )
        where = f"at {node['address']} ({error.strerror or 'no answer'})" if node["address"] else "(no address)"
        return f"{here} cannot reach {name} {where}: {remedy}"
    return None


def _leave_token(run_dir: str | None) -> str | None:
    """Write a file by which the other machines see that they have the same folder. Returns its path; None if it cannot
    be written."""
    if run_dir is None:
        return None
    folder = Path(run_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    token = folder / f".launch-{secrets.token_hex(8)}"
    try:
        token.touch()
    except OSError:
        return None
    return str(token)


@contextlib.contextmanager
def _removed_in_the_end(file: str | None) -> Iterator[None]:
    try:
        yield
    finally:
        if file:
            Path(file).unlink(missing_ok=True)


def _problem_with_folder(first: dict[str, Any], first_name: str, name: str, is_first: bool) -> str | None:
    """Why this machine cannot take part in a run whose folder the first one has named."""
    if first["token"] is None:
        return _not_writable(Path(first["folder"]), name) if first["folder"] and is_first else None
    token, here = Path(first["token"]), str(Path(first["run_dir"]).absolute())
    if here != first["folder"]:
        return (
            f"the run's folder is {first['folder']} on {first_name} and {here} on {name}: start both in the same folder"
        )
    deadline = time.monotonic() + 5  # a network file system may show a new file late
    while not token.is_file():
        if time.monotonic() > deadline:
            return (
                f"{name} does not see the folder of {first_name}'s run, {token.parent}: it must be on a disk that all "
                "machines share; give one with --run_dir"
            )
        time.sleep(0.2)
    return None if os.access(token.parent, os.W_OK) else _not_writable(token.parent, name)


def _not_writable(folder: Path, name: str) -> str:
    while not folder.is_dir():
        folder = folder.parent
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{name} may only read {folder}: mount it there for writing too"
    return f"{name} may not write to {folder}: let user {os.getuid()} write there, on every machine"


def _problem_with_compilation(settings: Sequence[str], name: str) -> str | None:
    """Why a rank of this machine would wait for a compilation that nobody does any more."""
    from lib.settings import ds_config  # it takes 0.2 s, which a run on one machine need not spend

    try:
        config = ds_config.read_json(Path(settings[settings.index("--deepspeed_config") + 1]))
        compiles = ds_config.takes_cpu_adam(config)
    except (UserError, AttributeError):  # of a JSON that the recipe will refuse
        return None
    try:
        if compiles:
            check_compilation("cpu_adam")
    except UserError as error:
        return f"{name}: {error}"
    return None


def least_of(text: str, nodes: int, restarts: int) -> int:
    """The number that --min_nodes says; without it, all. Raises UserError."""
    if not text:
        return nodes
    if not text.isdigit() or not 0 < int(text) <= nodes:
        raise UserError(f"--min_nodes is {text}; it must be a whole number from 1 to {nodes}, the number of machines")
    if not restarts:
        raise UserError(f"--min_nodes {text} is for what --restarts starts again; give --restarts N too")
    return int(text)


def split_address(text: str) -> tuple[str, int]:
    """("host", 29500) of "host:29500". Raises UserError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--master is {text!r}; it must be HOST:PORT, such as 10.0.0.1:29500, node 0 and a free port there"
        )
    return host.strip("[]"), int(port)
