"""Launch a recipe and answer for it: pass signals on to its ranks, leave no process behind, start again after a fault.

    python -m lib.launch.supervise RUN_NAME YAML RESTARTS DRY_RUN -- deepspeed options ... recipe.py settings ...

launch.sh becomes this process. It imports nothing large, so that it is there at once and weighs nothing while the ranks train.

It prints a `deepspeed` command and starts the ranks of it by lib/launch/start_ranks.py. DeepSpeed's launcher gives the ranks 30 seconds on SIGTERM, dies on SIGUSR1,
leaves ranks that train on when it is killed, and ends with exit code 0 when its own child is killed (DeepSpeed 0.19.8). So signals go to the ranks alone, all
processes of the launch are in one session that is ended as a whole, and a run has succeeded if its own result.json says so.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from lib.errors import FAULT, MISTAKE, STOPPED, from_home, new_folder
from lib.run.console import Console

START_RANKS = [
    sys.executable,
    "-P",
    "-m",
    "lib.launch.start_ranks",
]  # in the place of `deepspeed`; launch.sh has put lib on PYTHONPATH
UNKILLABLE_SECONDS = 60  # after which a process that was killed and is still there is left to itself
FALSE = ("0", "off", "f", "false", "n", "no")  # what a setting of a recipe takes for it
stop_signals: list[tuple[int, float]] = []  # (number, when), of those that came


def session_of(leader: int) -> list[psutil.Process]:
    """All processes of the launch."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def ranks_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The ranks among them: DeepSpeed's launcher gives each one its --local_rank."""
    found = []
    for process in processes:
        try:
            if any(argument.startswith("--local_rank=") for argument in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def run_once(command: list[str], output: IO[str] | None = None, ended: Callable[[], bool] | None = None) -> int:
    """Run the command in a session of its own. Returns its exit code, when no process of the session is left.

    output: where it prints; None: where this process does. ended: says that all is done, and what still runs may be killed (exit code 0):
    DeepSpeed's launcher takes two seconds to notice that its ranks have gone.
    """
    launcher: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: Any) -> None:
        """The first signal lets the ranks save and stop, or ends them where they are still starting; a second one ends everything."""
        stop_signals.append((number, time.monotonic()))
        again = stop_signals[-1][1] - stop_signals[0][1] > 1  # a terminal that closes sends two at once
        processes = session_of(launcher.pid) if launcher else []
        for process in processes if again else ranks_of(processes) or processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    }
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, pass_on)

    def ignore_warning_signal() -> None:  # Slurm sends it to all processes, and DeepSpeed's launcher would die of it
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    environment = os.environ | {"SUPERVISED_BY": str(os.getpid())}  # the ranks leave when this process is gone
    launcher = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=ignore_warning_signal, stdout=output, stderr=output
    )
    if stop_signals:  # it came before there was anything to pass it on to
        launcher.terminate()
    while ended is not None and launcher.poll() is None and not ended():
        time.sleep(0.05)
    status = 0 if ended is not None and ended() else launcher.wait()
    deadline = time.monotonic() + UNKILLABLE_SECONDS
    while left := session_of(launcher.pid):  # the launcher was killed, and its ranks train on
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if time.monotonic() > deadline:  # in the kernel, which does not come back from a disk or a device
            print(
                f"warning: process {', '.join(str(process.pid) for process in left)} was killed and does not end, as where a disk or a device no longer "
                "answers; it may keep its device and run folder in use",
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
    """What is another one when the file was written anew; None where it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def end_marker(run_dir: str | None) -> tuple[int, int] | None:
    """The version of the result.json of a run that has ended well, by its own word; None where there is none."""
    marker = Path(run_dir or "") / "result.json"
    try:
        return version_of(marker) if json.loads(marker.read_text(encoding="utf-8"))["finished"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve(arguments: list[str], yaml_path: str) -> tuple[str | None, bool]:
    """(run_dir, resume) as the recipe will see them: the last ones on the command line, else those of the YAML."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--run_dir")
    parser.add_argument("--resume", nargs="?", const="true")
    parser.add_argument("--config", default=yaml_path)
    parser.add_argument("--quick", action="store_true")
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # the recipe will say what is wrong
        return None, True
    try:
        values = yaml.safe_load(Path(from_home(given.config)).read_text(encoding="utf-8"))
        values |= values.pop("quick", {}) if given.quick else {}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):  # likewise
        values = {}
    run_dir, resume = (
        values.get(name) if getattr(given, name) is None else getattr(given, name) for name in ("run_dir", "resume")
    )
    return None if str(run_dir).lower() in ("none", "null") else from_home(str(run_dir)), str(resume).lower() not in (
        "none",
        *FALSE,
    )


def free_port() -> int:
    """A port of its own for each start, so that two runs on one machine do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> int:
    sys.stdout, sys.stderr = Console(1), Console(2)
    split = sys.argv.index("--")
    run_name, yaml_path, restarts, dry_run = sys.argv[1:split]
    launcher, *arguments = sys.argv[split + 1 :]
    run_dir, resume = resolve(arguments, yaml_path)
    own_name = run_dir is None and not resume
    if own_name:
        run_dir = (
            f"runs/{run_name}-{time.strftime('%Y%m%d-%H%M%S')}" if dry_run else str(new_folder(f"runs/{run_name}"))
        )
        arguments += ["--run_dir", str(run_dir)]
    try:
        return run_until_it_ends(launcher, arguments, run_dir, int(restarts), bool(dry_run))
    finally:
        if own_name:
            with contextlib.suppress(OSError):  # it is not empty, as a rule: the run has begun
                Path(str(run_dir)).rmdir()


def run_until_it_ends(launcher: str, arguments: list[str], run_dir: str | None, restarts: int, dry_run: bool) -> int:
    """Launch, and after a fault launch again. Returns the exit code."""
    status = FAULT
    config = Path(run_dir or "") / "config.yaml"
    before_all = version_of(config)
    for attempt in range(restarts + 1):
        # What failed before it began has left the folder as it was, with an older run in it perhaps, which is to be overwritten and not resumed.
        again = ["--resume", "true", "--overwrite", "false"] if version_of(config) != before_all else []
        command = [launcher, "--log_level", "critical", "--master_port", str(free_port()), *arguments, *again]
        print(shlex.join([part.removeprefix(f"{Path.cwd()}/") for part in command]))
        if dry_run:
            return 0
        before = end_marker(run_dir)
        status = run_once([*START_RANKS, *command[1:]])
        if end_marker(run_dir) not in (None, before):
            return 0
        if stop_signals:
            return status if 0 < status < 128 else 128 + stop_signals[0][0]
        if status in (MISTAKE, STOPPED):  # another start would not help, or is not wanted
            return status
        status = status % 256 or FAULT  # a launcher whose child was killed ends with 0
        left = restarts - attempt
        if left:
            print(
                f"restart  exit code {status}; starting again from the newest checkpoint ({left} restart{'s' if left > 1 else ''} left)"
            )
        elif run_dir and (Path(run_dir) / "checkpoints").is_dir():
            print(
                f"error: the run ended with exit code {status}; the same command with --run_dir {run_dir} --resume goes on",
                file=sys.stderr,
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
