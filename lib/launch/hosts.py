"""Start a recipe on every machine of a hostfile, or only look whether that would work.

    ./launch.sh <recipe> --hostfile FILE [--include|--exclude HOSTS] [--env NAME=VALUE]... [options] [settings]
    ./launch.sh check --hostfile FILE [--include|--exclude HOSTS]      look at all machines, and print a table

The hostfile is DeepSpeed's: a line `name slots=N` for each machine, N ranks there. HOSTS are `alpha@beta` or
`alpha:0,2@beta`, with the numbers of slots. On each machine there must be this checkout and this Python environment at
the same paths, and a key for ssh without a password. ssh starts `./launch.sh ... --node_rank N` there, which is also
what one can do by hand: the rest is in lib/launch/supervise.py and lib/launch/team.py.

This process passes signals on. When it ends, so do the others, which notice the end of their stdin.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from lib.errors import FAULT, MISTAKE, ROOT, STOPPED, UserError, display_path
from lib.launch.team import differences

SSH = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15",
       "-o", "ServerAliveCountMax=8"]  # fmt: skip
CHECK_SECONDS = 20
# What reaches the other machines of this one's environment, beside --env.
CARRIED = (
    "HF_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "WANDB_", "TOKENIZERS_", "TRITON_CACHE_DIR", "DS_ACCELERATOR",
    "OMP_NUM_THREADS", "XDG_CACHE_HOME",
)  # fmt: skip
ALONE_SECONDS = 20  # after a machine could not begin, the others are ended too


def read_hostfile(file: Path) -> dict[str, list[int]]:
    """{host: its slots} of a hostfile. Raises UserError with all faults, a line each."""
    where = display_path(file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"--hostfile {where}: {why}; it has a line such as `alpha slots=8` for each machine") from None
    hosts: dict[str, list[int]] = {}
    faults = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].strip()
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", words)
        if found is None:
            if words:
                faults.append(f"{where}:{number}: {words!r} should be like `alpha slots=8`")
        elif found[1] in hosts:
            faults.append(f"{where}:{number}: {found[1]} stands here twice; give it one line, with all its slots")
        else:
            hosts[found[1]] = list(range(int(found[2])))
    if not hosts and not faults:
        faults.append(f"{where} names no machine; write a line such as `alpha slots=8` for each")
    if faults:
        raise UserError("\n".join(faults))
    return hosts


def chosen(hosts: dict[str, list[int]], include: str | None, exclude: str | None) -> dict[str, list[int]]:
    """The hosts and slots that --include or --exclude leaves. Raises UserError."""
    if include and exclude:
        raise UserError("--include and --exclude together; give one of them")
    named: dict[str, list[int]] = {}
    for part in filter(None, (include or exclude or "").split("@")):
        host, colon, slots = part.partition(":")
        if host not in hosts:
            raise UserError(f"{part!r}: the hostfile has no {host}; it has {', '.join(hosts)}")
        try:
            numbers = [int(slot) for slot in slots.split(",")] if colon else hosts[host]
        except ValueError:
            raise UserError(f"{part!r} should be like `alpha:0,2`") from None
        unknown = sorted(set(numbers) - set(hosts[host]))
        if unknown:
            raise UserError(f"{part!r}: {host} has no slot {unknown[0]}; the last is {hosts[host][-1]}")
        named[host] = sorted({*named.get(host, []), *numbers})
    if exclude:
        named = {host: [slot for slot in slots if slot not in named.get(host, [])] for host, slots in hosts.items()}
    left = {host: named[host] for host in hosts if named.get(host)} if include or exclude else hosts
    if not left:
        raise UserError("--exclude leaves no slot of any machine")
    return left


def is_here(host: str) -> bool:
    """Whether this name is that of the machine we are on."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {address.address.split("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    return bool(addresses & own) or any(address.startswith("127.") for address in addresses)


def start(host: str, command: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start a command on a host, in this folder. Its stdin stays open: for the numbers of signals."""
    far = [sys.executable, str(ROOT / "lib" / "launch" / "far.py")]
    prefix = far if is_here(host) else [*SSH, host, shlex.join(far)]
    process = subprocess.Popen(prefix, stdin=subprocess.PIPE, text=True, start_new_session=True, **options)
    what = {"command": command, "folder": str(Path.cwd()), "environment": environment}
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has ended, as its exit code will say
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
    return process


def look_at(host: str, environment: dict[str, str]) -> dict[str, Any]:
    """What lib/launch/machine_facts.py says of a host, or {"fault": why it cannot be asked}."""
    asked = time.time()
    command = [sys.executable, "-P", "-m", "lib.launch.machine_facts"]
    environment = environment | {"PYTHONPATH": str(ROOT)}
    process = start(host, command, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"fault": f"{host} did not answer within {CHECK_SECONDS} s; try: ssh {host} true"}
    said = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1].removeprefix("error: ")
    if process.returncode == 255:
        return {"fault": f"ssh does not reach {host} ({said}); this must work without a password: ssh {host} true"}
    if process.returncode in (126, 127):
        return {"fault": f"{host} has no {sys.executable}: the same environment must be at the same path everywhere"}
    if process.returncode:
        remedy = "this checkout, and its environment, must be at the same path on every machine"
        return {"fault": f"{host}: {said}; {remedy}"}
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    # It looked at its clock between the asking and now.
    found["clock"] = found["time"] - min(max(found["time"], asked), time.time())
    if found["fault"]:
        found["fault"] = f"{host}: {found['fault']}"
    return found


def preflight(hosts: dict[str, list[int]], environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Look at all hosts side by side: {host: what it is}. Raises UserError with all faults, a line each."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = dict(zip(hosts, pool.map(lambda host: look_at(host, environment), hosts), strict=True))
    faults = [what["fault"] for what in found.values() if what["fault"]]
    seen = {host: what for host, what in found.items() if "facts" in what}
    if seen:
        first = next(iter(seen.values()))["clock"]
        nodes = [{**what, "settings": [], "clock": what["clock"] - first} for what in seen.values()]
        faults += differences(nodes, list(seen))
    names: dict[str, str] = {}
    for host, what in seen.items():
        if what["devices"] and max(hosts[host]) >= what["devices"]:
            faults.append(
                f"{host} has {what['devices']} devices, and the hostfile or --include says slot {max(hosts[host])}: "
                f"write slots={what['devices']}"
            )
        same = names.setdefault(what["name"], host)
        if same != host:
            faults.append(f"{same} and {host} are the same machine, {what['name']}: give it one line in the hostfile")
    if faults:
        raise UserError("\n".join(faults))
    return found


def table(hosts: dict[str, list[int]], found: dict[str, dict[str, Any]]) -> str:
    rows = [["host", "name", "ranks", "devices", "memory", "Python", "torch", "deepspeed", "transformers", "clock"]]
    for host, slots in hosts.items():
        what = found[host]
        devices = f"{what['devices']} x {what['accelerator']}" if what["devices"] else f"{what['cores']} CPU cores"
        versions = [what["facts"][name] for name in ("Python", "torch", "deepspeed", "transformers")]
        memory = f"{what['memory'] / 1e9:.0f} GB"
        rows.append([host, what["name"], str(len(slots)), devices, memory, *versions, f"{what['clock']:+.1f} s"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def train(hosts: dict[str, list[int]], master: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Start `./launch.sh arguments` on every host, and wait for their end. Returns the exit code."""
    processes: dict[str, subprocess.Popen[str]] = {}

    def begin(node: int, host: str) -> None:
        here = [str(ROOT / "launch.sh"), *arguments, "--ranks", str(len(hosts[host]))]
        here += ["--nodes", str(len(hosts)), "--node_rank", str(node), "--master", master]
        own = environment | {"SIGNALS_BY_STDIN": "yes"}
        if hosts[host] != list(range(len(hosts[host]))):
            own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, hosts[host]))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if node else {}
        processes[host] = start(host, here, own, **pipes)
        if node:
            threading.Thread(target=show, args=(host, processes[host]), daemon=True).start()

    def pass_on(number: int, _: Any) -> None:
        for process in processes.values():
            with contextlib.suppress(OSError, ValueError):
                assert process.stdin is not None
                process.stdin.write(f"{int(number)}\n")
                process.stdin.flush()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    for node, host in enumerate(hosts):
        begin(node, host)
    bad, bad_since = 0, 0.0
    while any(process.poll() is None for process in processes.values()):
        ended = [process.returncode for process in processes.values() if process.returncode is not None]
        if not bad and (bad := next((code for code in ended if code not in (0, STOPPED)), 0)):
            bad_since = time.monotonic()
        # One that has found a mistake, or could not begin, does not tell the others, who would wait for it.
        if bad and time.monotonic() - bad_since > ALONE_SECONDS:
            pass_on(signal.SIGTERM, None)
            bad_since = time.monotonic()
        time.sleep(0.1)
    codes = [process.returncode for process in processes.values()]
    code = bad or next((code for code in codes if code not in (0, STOPPED)), codes[0])
    return code if 0 <= code < 255 else FAULT  # 255: ssh itself


def show(host: str, process: subprocess.Popen[str]) -> None:
    """Print what comes from another machine, each line with the machine's name."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{host}: {line.rstrip()}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./launch.sh", allow_abbrev=False, add_help=False)
    parser.add_argument("--hostfile", required=True)
    parser.add_argument("--include")
    parser.add_argument("--exclude")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--master")
    given, arguments = parser.parse_known_args()
    hosts = chosen(read_hostfile(Path(given.hostfile).expanduser()), given.include, given.exclude)
    environment = {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}
    for setting in given.env:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UserError(f"--env is {setting!r}; it must be NAME=VALUE")
        environment[name] = value
    for option in ("--ranks", "--nodes", "--node_rank"):
        if any(argument == option or argument.startswith(f"{option}=") for argument in arguments):
            raise UserError(f"{option} and --hostfile: the hostfile says that; leave one of them out")
    what = arguments[0].removeprefix("recipes/").removesuffix(".py") if arguments else ""
    if what != "check" and not (ROOT / "recipes" / f"{what}.py").is_file():
        raise UserError(f"--hostfile is for recipes, which come first, and for check; {what or 'nothing'} is neither")
    found = preflight(hosts, environment)
    if arguments[:1] == ["check"]:
        print(table(hosts, found))
        return 0
    first_host, first = next(iter(found.items()))
    master = given.master or f"{first['address'] or first_host}:{first['port']}"
    return train(hosts, master, arguments, environment)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(MISTAKE)
