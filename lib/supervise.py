"""Launch a recipe and answer for it: pass signals on to its ranks, leave no process behind, start again after a fault.

    supervise.py RUN_NAME YAML RESTARTS DRY_RUN -- deepspeed options ... recipe.py settings ...

launch.sh becomes this process. It imports nothing large, so that it is there at once and weighs nothing while the ranks train.

DeepSpeed's launcher cannot do it: on SIGTERM it gives the ranks 30 seconds, on SIGUSR1 it dies, when it is killed its ranks train
on, and when its own child is killed it ends with exit code 0 (DeepSpeed 0.19.8). So signals go to the ranks alone, all processes
of the launch are in one session that is ended as a whole, and a run has succeeded if its own result.json says so.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

USER_ERROR, STOPPED = 2, 75  # exit codes of lib/config.py, after which another start would not help, or is not wanted
stop_signals: list[int] = []


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


def run_once(command: list[str]) -> int:
    """Run the command in a session of its own. Returns its exit code, when no process of the session is left."""

    def ignore_warning_signal() -> None:  # Slurm sends it to all processes, and DeepSpeed's launcher would die of it
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    environment = os.environ | {"SUPERVISED_BY": str(os.getpid())}  # the ranks leave when this process is gone
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=ignore_warning_signal)

    def pass_on(number: int, _: Any) -> None:
        stop_signals.append(number)
        processes = session_of(launcher.pid)
        if len(stop_signals) > 1:  # the second one ends everything at once
            for process in processes:
                process.kill()
        # A rank that is still starting has no handler: SIGTERM ends it without the traceback that SIGINT would leave.
        for process in ranks_of(processes) or processes:
            process.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 and process in ranks_of(processes) else signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, pass_on)
    status = launcher.wait()
    while left := session_of(launcher.pid):  # the launcher was killed, and its ranks train on
        for process in left:
            process.kill()
        time.sleep(0.05)
    return status


def end_marker(run_dir: str | None) -> tuple[int, int] | None:
    """What identifies the result.json of a run that has ended well, by its own word; None where there is none."""
    marker = Path(run_dir or "") / "result.json"
    try:
        found = marker.stat()
        return (found.st_ino, found.st_mtime_ns) if json.loads(marker.read_text(encoding="utf-8"))["finished"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def value_of(setting: str, arguments: list[str], yaml_path: Path) -> str | None:
    """A setting's value as the recipe will see it: on the command line, else in the YAML."""
    for at, argument in enumerate(arguments):
        if argument == f"--{setting}":
            return arguments[at + 1] if at + 1 < len(arguments) else None
        if argument.startswith(f"--{setting}="):
            return argument.split("=", 1)[1]
        if argument == "--config" and at + 1 < len(arguments):
            yaml_path = Path(arguments[at + 1])
    try:
        value = yaml.safe_load(yaml_path.read_text(encoding="utf-8"))[setting]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # the recipe will say what is wrong
        return None
    return None if value is None else str(value)


def free_port() -> int:
    """A port of its own for each start, so that two runs on one machine do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> int:
    split = sys.argv.index("--")
    run_name, yaml_path, restarts, dry_run = sys.argv[1:split]
    launcher, *arguments = sys.argv[split + 1 :]
    run_dir = value_of("run_dir", arguments, Path(yaml_path))
    if run_dir is None and not any(argument == "--resume" or argument.startswith("--resume=") for argument in arguments):
        run_dir = f"runs/{run_name}-{time.strftime('%Y%m%d-%H%M%S')}"
        arguments += ["--run_dir", run_dir]
    status = 1
    for attempt in range(int(restarts) + 1):
        again = ["--resume", "true", "--overwrite", "false"] if attempt else []
        command = [launcher, "--log_level", "critical", "--master_port", str(free_port()), *arguments, *again]
        print(shlex.join([part.removeprefix(f"{Path.cwd()}/") for part in command]), flush=True)
        if dry_run:
            return 0
        before = end_marker(run_dir)
        status = run_once(command)
        if end_marker(run_dir) not in (None, before):
            return 0
        if stop_signals:
            return status if status == STOPPED else 128 + stop_signals[0]
        if status in (USER_ERROR, STOPPED):
            return status
        status = status % 256 or 1  # a launcher whose child was killed ends with 0
        left = int(restarts) - attempt
        if left:
            print(f"restart  exit code {status}; starting again from the newest checkpoint ({left} restart{'s' if left > 1 else ''} left)", flush=True)
        elif run_dir and (Path(run_dir) / "checkpoints").is_dir():
            print(f"error: the run ended with exit code {status}; the same command with --run_dir {run_dir} --resume goes on", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
