"""Launch a recipe and see it through: pass signals on to its ranks, leave no process behind, start again after a fault.

    python -m lib.launch.supervise RUN_NAME YAML RESTARTS DRY_RUN -- deepspeed options ... recipe.py settings ...
    python -m lib.launch.supervise RUN_NAME YAML RESTARTS DRY_RUN NODES NODE_RANK HOST:PORT MIN_NODES [MISTAKE] -- ...

launch.sh becomes this process, which imports nothing large: it starts at once, and takes little memory while the ranks
train. It prints a `deepspeed` command and starts that command's ranks by lib/launch/start_ranks.py.

DeepSpeed 0.19.8's launcher gives the ranks 30 seconds on SIGTERM and dies on SIGUSR1. When it is killed, its ranks
train on, and when its own child is killed, it ends with exit code 0. So here signals go to the ranks alone, all
processes of a launch are in one session that is ended as a whole, and a run has succeeded if its result.json says so.

On several machines each has a supervisor, and these act together (lib/launch/team.py): a start is one of all machines,
and the end of one machine's ranks is the end of all.
"""

import argparse
import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from lib.errors import FAULT, MISTAKE, ROOT, STOPPED, UNKILLABLE_SECONDS, UserError, from_home, new_folder
from lib.launch import start_ranks, words
from lib.launch.facts import PATHS
from lib.launch.meeting import Left, Lost
from lib.launch.team import Team, least_of
from lib.run.console import Console
from lib.settings.run_settings import RunSettings

# Takes the place of the word `deepspeed` in a command. launch.sh has put lib's folder on PYTHONPATH.
START_RANKS = [sys.executable, "-P", "-m", "lib.launch.start_ranks"]
FALSE = ("0", "off", "f", "false", "n", "no")  # the words that a recipe's setting reads as false
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # that stop a run
stop_signals: list[tuple[int, float]] = []  # (number, time.monotonic()) of each signal that came


def session_of(leader: int) -> list[psutil.Process]:
    """All processes of the session that this process leads: those of one launch."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def ranks_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The ranks among these processes, which are known by their argument --local_rank."""
    found = []
    for process in processes:
        try:
            if any(argument.startswith("--local_rank=") for argument in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def run_once(command: list[str], output: IO[Any] | None = None, ended: Callable[[], bool] | None = None) -> int:
    """Run the command in its own session. Returns the command's exit code when no process of the session is left.

    output: where the command prints; None: where this process prints.
    ended: tells whether all work is done. Then what still runs is killed, and the exit code is 0: DeepSpeed's launcher
    takes two seconds to notice that its ranks have ended.
    """
    launcher: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: Any) -> None:
        """Pass a signal on. The first lets ranks save and stop, or ends ranks that still start. A second kills all."""
        stop_signals.append((number, time.monotonic()))
        # A terminal that closes sends two signals at once, which count as one.
        is_second = stop_signals[-1][1] - stop_signals[0][1] > 1
        processes = session_of(launcher.pid) if launcher else []
        for process in processes if is_second else ranks_of(processes) or processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if is_second else signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP, and so does its child
            signal.signal(number, pass_on)

    def ignore_warning_signal() -> None:  # Slurm sends SIGUSR1 to all processes, and DeepSpeed's launcher dies of it
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    # START_RANKS finds lib there.
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # The ranks end when this process has ended.
    environment = os.environ | {
        "PYTHONPATH": python_path,
        "SUPERVISED_BY": str(os.getpid()),
    }
    launcher = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=ignore_warning_signal, stdout=output, stderr=output
    )
    if stop_signals:  # a signal came before there was a process to pass it on to
        launcher.terminate()
    while ended is not None and launcher.poll() is None and not ended():
        time.sleep(0.05)
    status = 0 if ended is not None and ended() else launcher.wait()
    deadline = time.monotonic() + UNKILLABLE_SECONDS
    while remaining := session_of(launcher.pid):  # the launcher has ended, but other processes may still run
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if time.monotonic() > deadline:  # the process hangs in a call to the kernel
            print(
                f"warning: process {', '.join(str(process.pid) for process in remaining)} was killed and does not end,"
                " as where a disk or a device no longer answers; it may keep its device and run folder in use",
                file=Console(2),
            )
            break
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(1)
    for number, handler in before.items():
        signal.signal(number, handler)
    return status


def version_of(file: Path) -> tuple[int, int] | None:
    """A value that changes when the file is written anew; None where the file does not exist."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def end_marker(run_dir: str | None) -> tuple[int, int] | None:
    """The version_of a run's result.json if that file says that the run has finished; else None."""
    marker = Path(run_dir or "") / "result.json"
    try:
        return version_of(marker) if json.loads(marker.read_text(encoding="utf-8"))["finished"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_of(arguments: list[str], yaml_path: str, *names: str) -> list[Any] | None:
    """These settings as the recipe will see them: the last ones on the command line, else those in the YAML, else None.

    None where the command line cannot be read, which the recipe will report.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("run_dir", "rank_timeout", *PATHS):
        parser.add_argument(f"--{name}")
    parser.add_argument("--resume", nargs="?", const="true")
    parser.add_argument("--config", default=yaml_path)
    parser.add_argument("--quick", action="store_true")
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return None
    try:
        values = yaml.safe_load(Path(from_home(given.config)).read_text(encoding="utf-8"))
        values |= values.pop("quick", {}) if given.quick else {}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):  # the recipe will report it
        values = {}
    return [values.get(name) if getattr(given, name) is None else getattr(given, name) for name in names]


def resolve(arguments: list[str], yaml_path: str) -> tuple[str | None, bool]:
    """(run_dir, resume) as the recipe will see them."""
    found = settings_of(arguments, yaml_path, "run_dir", "resume")
    if found is None:
        return None, True
    run_dir, resume = found
    return None if str(run_dir).lower() in ("none", "null") else from_home(str(run_dir)), str(resume).lower() not in (
        "none",
        *FALSE,
    )


def team_of(machines: list[str], restarts: int, arguments: list[str], yaml_path: str, by_hand: bool) -> Team:
    """The machines that launch.sh was told of: [nodes, node rank, address of node 0, least], and a mistake on this one,
    if there is one. Raises UserError."""
    nodes, node, master, least, *mistakes = machines
    for name, value, lowest in (("nodes", nodes, 1), ("node_rank", node, 0)):
        if not value.isdigit() or int(value) < lowest:
            raise UserError(f"--{name} is {value or 'missing'}; it must be a whole number from {lowest} up")
    if int(node) >= int(nodes):
        raise UserError(f"--node_rank is {node}; of {nodes} nodes the last has {int(nodes) - 1}")
    return Team(
        int(nodes), int(node), master, silence_of(arguments, yaml_path), least_of(least, int(nodes), restarts),
        (settings_of(arguments, yaml_path, *PATHS) or []), next(iter(mistakes), None), by_hand,
        not by_hand and bool(os.environ.get("ONLY_CHECK")),
    )  # fmt: skip


def silence_of(arguments: list[str], yaml_path: str) -> float:
    """Seconds after which a machine that gives no sign is given up: the setting rank_timeout."""
    (minutes,) = settings_of(arguments, yaml_path, "rank_timeout") or [None]
    try:
        return 60 * float(RunSettings.rank_timeout if minutes is None else minutes)
    except ValueError:  # the recipe will report it
        return 60 * RunSettings.rank_timeout


def obey_stdin(silence: float) -> None:
    """Take the numbers of signals from stdin, as from lib/launch/hosts.py over ssh, which sends a 0, no signal, as a
    sign of life. At its end, or without a sign for so many seconds, end at once."""
    rest = b""
    while select.select([0], [], [], silence)[0] and (data := os.read(0, 1024)):
        *numbers, rest = (rest + data).split(b"\n")
        for number in numbers:
            os.kill(os.getpid(), int(number))
    for _ in range(2):  # the second signal ends all
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)


def leave(number: int, _: Any) -> None:
    """At a signal while there are no ranks, to which it would go on: before they start, or between two starts."""
    sys.exit(128 + number)


def main() -> int:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    by_hand = "SIGNALS_BY_STDIN" not in os.environ
    sys.stdout, sys.stderr = Console(1), Console(2)
    split = sys.argv.index("--")
    run_name, yaml_path, restarts, dry_run, *machines = sys.argv[1:split]
    launcher, *arguments = sys.argv[split + 1 :]
    run_dir, resume = resolve(arguments, yaml_path)
    named = run_dir is None and not resume
    if not by_hand:
        threading.Thread(target=obey_stdin, args=(silence_of(arguments, yaml_path),), daemon=True).start()
    try:
        team = team_of(machines, int(restarts), arguments, yaml_path, by_hand) if machines else Team()
        if named and (team.node == 0 or dry_run):  # the other machines are told the name
            run_dir = (
                f"runs/{run_name}-{time.strftime('%Y%m%d-%H%M%S')}" if dry_run else str(new_folder(f"runs/{run_name}"))
            )
        return run_until_it_ends(launcher, arguments, run_dir, int(restarts), bool(dry_run), team, named)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return MISTAKE
    finally:
        if named and run_dir is not None:
            with contextlib.suppress(OSError):  # the folder is empty only if the run never began
                Path(run_dir).rmdir()


def run_until_it_ends(
    launcher: str, arguments: list[str], run_dir: str | None, restarts: int, dry_run: bool,
    team: Team | None = None, named: bool = False,
) -> int:  # fmt: skip
    """Launch, and after a fault launch again, up to `restarts` times. Returns the exit code.

    named: whether run_dir is no setting, but was made up for this run; then the ranks are told it too. Raises UserError
    where several machines do not fit together.
    """
    team = team or Team()
    options = start_ranks.parse(["--master_port", "0", *arguments])
    config_before = version_of(Path(run_dir or "") / "config.yaml")
    while True:
        # An attempt that failed before its run began has not touched the folder. The folder may then hold an older run,
        # which is to be overwritten and not resumed.
        began = version_of(Path(run_dir or "") / "config.yaml") != config_before
        try:
            start = team.gather(options, run_dir, began, restarts, dry_run)
        except Lost as lost:
            print(f"error: {lost}", file=sys.stderr)
            if isinstance(lost, Left):
                return FAULT
            status, again = FAULT, True
        else:
            run_dir, restarts = start.run_dir, start.restarts
            program = [launcher] if team.nodes == 1 else start_ranks.launcher_of(start.options)
            at_script = arguments.index(options.script)
            ranks = [
                "--log_level", "critical", *start.options, *(arguments[:at_script] if team.nodes == 1 else []),
                *arguments[at_script:], *(["--run_dir", str(run_dir)] if named else []),
                *(["--resume", "true", "--overwrite", "false"] if start.resume else []),
            ]  # fmt: skip
            print(shlex.join([word.removeprefix(f"{Path.cwd()}/") for word in (*program, *ranks)]))
            if dry_run:
                return 0
            marker_before = end_marker(run_dir)
            # What is printed here by lib/launch/hosts.py's order is on its console anyway.
            with words.overheard(team.node > 0 and team.by_hand) as (output, lines):
                status = run_once([*START_RANKS, *ranks], output, team.others_failed if team.nodes > 1 else None)
            finished = end_marker(run_dir) not in (None, marker_before)
            said = [] if status in (0, STOPPED) else words.of_the_fault(lines)
            status, again = team.verdict(status, finished, stop_signals[0][0] if stop_signals else None, said)
        if not again:  # it has ended well, as asked, or by a mistake that another start would make too
            return status
        if not restarts:
            break
        print(
            f"restart  exit code {status}; starting again from the newest checkpoint"
            f" ({restarts} restart{'s' if restarts > 1 else ''} left)"
        )
        restarts -= 1
    if run_dir and (Path(run_dir) / "checkpoints").is_dir():
        print(
            f"error: the run ended with exit code {status}; the same command with --run_dir {run_dir} --resume goes on",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
