"""The machines of one run: do they fit together, before anything starts, and how did the run end on all of them?

One machine is a team of one, which has nothing to compare and nobody to ask.
"""

import argparse
import base64
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.distributed import network
from lib.errors import FAULT, MISTAKE, ROOT, STOPPED, UserError
from lib.launch.meeting import Lost, Meeting

VERSIONS_OF = ("torch", "deepspeed", "transformers")  # what must be the same on all machines, beside Python
CLOCK_SECONDS = 30  # by so much clocks may differ: dates of files and logs are all that depends on them
REACH_SECONDS = 5
# After another machine's ranks have failed, this one's may say so and end by themselves: start_ranks gives them 11 s.
LAST_WORDS_SECONDS = 12
GONE_SECONDS = 2  # the same after a machine has gone, of which nothing more can be heard
END_SECONDS = 200  # within which another machine ends its ranks: exit functions, and processes that the kernel holds


def facts(script: Path | None = None, arguments: Sequence[str] = ()) -> dict[str, str]:
    """What must be the same on all machines: {what it is: its value, or a checksum of it}.

    script, arguments: of the recipe, if one is to be run.
    """
    found = {"Python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    found["this code"] = _checksum(*sorted((ROOT / "lib").rglob("*.py")), *([script] if script else []))
    if script is None:
        return found
    found["the recipe's YAML"] = _checksum(script.with_suffix(".yaml"))
    for name in ("deepspeed_config", "config"):
        if f"--{name}" in arguments[:-1]:
            found[f"--{name}"] = _checksum(Path(arguments[arguments.index(f"--{name}") + 1]))
    return found


def _checksum(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + (file.read_bytes() if file.is_file() else b"missing"))
    return digest.hexdigest()[:12]


def differences(nodes: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A line for each thing that a machine has otherwise than the first one, with the remedy.

    nodes: {"facts": see above, "settings": the settings as given, "clock": seconds ahead of the first} of each machine.
    """
    found, (first, first_name) = [], (nodes[0], names[0])
    for node, name in list(zip(nodes, names, strict=True))[1:]:
        for what, value in node["facts"].items():
            expected = first["facts"].get(what)
            if value == expected:
                continue
            if what in ("Python", *VERSIONS_OF):
                found.append(
                    f"{name} has {what} {value}, {first_name} has {expected}: install the same on all machines"
                )
            else:
                found.append(
                    f"{what}: {name} has another content than {first_name}: "
                    "bring the checkouts to the same commit and the same changes"
                )
        if node["settings"] != first["settings"]:
            theirs, ours = " ".join(node["settings"]), " ".join(first["settings"])
            found.append(f"{name} was started with {theirs!r}, {first_name} with {ours!r}: give the same settings")
        if abs(node["clock"]) > CLOCK_SECONDS:
            side = "ahead of" if node["clock"] > 0 else "behind"
            found.append(
                f"the clock of {name} is {abs(node['clock']):.0f} s {side} that of {first_name}: "
                "let both follow a time server (timedatectl set-ntp true)"
            )
    return found


@dataclass(frozen=True)
class Start:
    """What all machines know of one start. options: for the launcher; on one machine, beside those of its devices."""

    run_dir: str | None
    resume: bool
    restarts: int
    options: list[str]


class Team:
    """All machines of a run; on each machine its supervisor makes one.

    silence: seconds without a sign of another machine after which it is lost.
    """

    def __init__(self, nodes: int = 1, node: int = 0, master: str = "", silence: float = 600):
        self.nodes, self.node, self.silence = nodes, node, silence
        self.host, self.port = split_address(master) if nodes > 1 else ("", 0)
        self.meeting: Meeting | None = None
        self._others_failed_at: float | None = None

    def gather(
        self, launched: argparse.Namespace, run_dir: str | None, resume: bool, restarts: int, dry_run: bool = False
    ) -> Start:
        """Wait until all machines are here, and compare them. What to run, where and how often is said by node 0.

        launched: what this machine's launcher was told (start_ranks.parse). Raises UserError with all faults that were
        found, a line each, and Lost where a machine has gone.
        """
        ids, script, settings = launched.ids, Path(launched.script), launched.arguments
        if self.nodes == 1:
            return Start(run_dir, resume, restarts, ["--master_port", str(network.free_port())])
        if dry_run:
            return Start(run_dir, resume, restarts, self._options([ids] * self.nodes, self.host, self.port))
        if self.meeting is None or self.meeting.lost:
            is_first = self.meeting is None
            self.leave()
            try:
                self.meeting = Meeting(self.nodes, self.node, self.host, self.port, self.silence)
            except UserError as error:
                if is_first:
                    raise
                raise Lost(str(error)) from None  # they had come before: it is no mistake
        meeting = self.meeting
        self._others_failed_at = None
        folder = run_dir if self.node == 0 else None
        chosen = os.environ.get("GLOO_SOCKET_IFNAME")
        token = _leave_token(folder)
        with _removed_in_the_end(token), socket.create_server(("", 0), backlog=self.nodes) as server:
            mine = {
                "facts": facts(script, settings), "settings": settings, "ids": ids,
                "address": network.address_of(chosen) if chosen else meeting.own_address, "interface": chosen,
                "reach": server.getsockname()[1], "port": network.free_port(), "run_dir": folder, "resume": resume,
                "restarts": restarts, "folder": folder and str(Path(folder).absolute()), "token": token,
                "clocks": meeting.clocks,
            }  # fmt: skip
            all_nodes = meeting.exchange(mine)
            first = all_nodes[0]
            for number, node in enumerate(all_nodes):
                node["clock"] = {int(key): value for key, value in first["clocks"].items()}.get(number, 0)
            names = [meeting.names[number] for number in range(self.nodes)]
            faults = differences(all_nodes, [meeting.name_of(number) for number in range(self.nodes)])
            problems = [_problem_with_folder(first, names[0], names[self.node])] if self.node else []
            problems += [self._cannot_reach(number, node, names) for number, node in enumerate(all_nodes)]
            faults += [problem for found in meeting.exchange(list(filter(None, problems))) for problem in found]
        if faults and self.node and "SIGNALS_BY_STDIN" in os.environ:  # by hosts.py, where node 0 has said them
            raise UserError(f"{len(faults)} of what {meeting.name_of(0)} says")
        if faults:
            raise UserError("\n".join(faults))
        options = self._options([node["ids"] for node in all_nodes], meeting.master_address, first["port"])
        return Start(first["run_dir"], first["resume"], first["restarts"], options)

    def _options(self, ids: list[list[int]], address: str, port: int) -> list[str]:
        world = json.dumps({f"node{number}": of_node for number, of_node in enumerate(ids)})
        return [
            f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}", f"--node_rank={self.node}",
            f"--master_addr={address}", f"--master_port={port}",
        ]  # fmt: skip

    def _cannot_reach(self, number: int, node: dict[str, Any], names: list[str]) -> str | None:
        """Why this machine's ranks could not talk to another's."""
        if number == self.node:
            return None
        try:
            socket.create_connection((node["address"] or "", node["reach"]), REACH_SECONDS).close()
        except OSError as error:
            remedy = (
                f"GLOO_SOCKET_IFNAME is {node['interface']} there; leave it out, or name the interface that all reach"
                if node["interface"]
                else "does a firewall between the machines close ports above 1024?"
            )
            where = f"at {node['address']} ({error.strerror or 'no answer'})" if node["address"] else "(no address)"
            return f"{names[self.node]} cannot reach {names[number]} {where}: {remedy}"
        return None

    def others_failed(self) -> bool:
        """Whether the ranks of another machine have failed and those here have had the time to say so."""
        if self.meeting is None:
            return False
        failed = any(end["status"] not in (0, STOPPED) for end in self.meeting.heard().values())
        if self._others_failed_at is None and (failed or self.meeting.lost):
            self._others_failed_at = time.monotonic()
        patience = GONE_SECONDS if self.meeting.lost else LAST_WORDS_SECONDS
        return self._others_failed_at is not None and time.monotonic() - self._others_failed_at > patience

    def verdict(self, status: int, finished: bool, signal: int | None) -> tuple[int, bool]:
        """(exit code of the run, whether another start may help), the same on all machines.

        status: the exit code of this machine's ranks. finished: whether the run's last file is there. signal: the one
        that asked this machine to stop.
        """
        if self.meeting is None:
            return verdict([{"status": status, "finished": finished, "signal": signal}])
        mine = {"status": status, "finished": finished, "signal": signal}
        self.meeting.tell(mine)
        ends = self.meeting.all_of(END_SECONDS)
        code, again = verdict(ends)
        if code not in (0, STOPPED):
            for number, end in enumerate(ends):
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


def _leave_token(run_dir: str | None) -> str | None:
    """Write a file by which the other machines see that they have the same folder. Returns its path; None if it cannot
    be written, which the ranks will report."""
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


def _problem_with_folder(first: dict[str, Any], first_name: str, name: str) -> str | None:
    """Why this machine cannot take part in a run whose folder the first one has named."""
    if first["token"] is None:
        return None
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
    if not os.access(token.parent, os.W_OK):
        return f"{name} may not write to {token.parent}: let user {os.getuid()} write there, on every machine"
    return None


def split_address(text: str) -> tuple[str, int]:
    """("host", 29500) of "host:29500". Raises UserError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--master is {text!r}; it must be HOST:PORT, such as 10.0.0.1:29500, node 0 and a free port there"
        )
    return host.strip("[]"), int(port)
