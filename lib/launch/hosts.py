"""Start a recipe on every machine of a hostfile, or only look whether that would work.

    ./launch.sh <recipe> --hostfile FILE [--include|--exclude HOSTS] [--env NAME=VALUE]... [--master HOST:PORT] ...
    ./launch.sh check --hostfile FILE [--include|--exclude HOSTS] ...      look at all machines, and print a table

The hostfile is DeepSpeed's: a line `name slots=N` for each machine, N ranks there. HOSTS are `alpha@beta` or
`alpha:0,2@beta`, with the numbers of slots. On each machine there must be this checkout and this Python environment at
the same paths, and a key for ssh without a password. ssh starts `./launch.sh ... --node_rank N` there, which is also
what one can do by hand: the rest is in lib/launch/supervise.py and lib/launch/team.py.

This process passes signals on. When it ends, so do the others, which notice the end of their stdin.
"""

import argparse
import contextlib
import itertools
import json
import math
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

from lib.errors import FAULT, INTERRUPTED, MISTAKE, ROOT, STOPPED, UserError, display_path
from lib.launch.facts import differences
from lib.launch.supervise import SIGNALS, silence_of
from lib.launch.team import least_of, options_of, split_address

SSH = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"]
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


def start(
    host: str, command: list[str], environment: dict[str, str], silence: float = 120, **options: Any
) -> subprocess.Popen[str]:
    """Start a command on a host, in this folder. Its stdin stays open: for the numbers of signals.

    silence: seconds without a sign of the host after which its ssh gives up.
    """
    far = [sys.executable, str(ROOT / "lib" / "launch" / "far.py")]
    alive = f"ServerAliveCountMax={max(8, math.ceil(silence / 15))}"
    if is_here(host):  # this login came from somewhere else, and says nothing about the hosts
        start_it, environment = far, {**environment, "SSH_CONNECTION": ""}
    else:
        start_it = [*SSH, "-o", alive, host, shlex.join(far)]
    process = subprocess.Popen(
        start_it, stdin=subprocess.PIPE, text=True, errors="replace", start_new_session=True, **options
    )
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


def preflight(
    hosts: dict[str, list[int]], environment: dict[str, str], locks: bool = False
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Look at all hosts side by side: {host: what it is} of those that can take part, and a line on each other one.

    locks: whether what a killed compilation has left is a fault, which only some runs would wait for. Raises UserError
    with all faults, a line each, where those that can take part have some.
    """
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = dict(zip(hosts, pool.map(lambda host: look_at(host, environment), hosts), strict=True))
    absent = [what["fault"] for what in found.values() if "facts" not in what]
    seen: dict[str, dict[str, Any]] = {}
    machines: dict[tuple[str, str | None], str] = {}
    for host, what in found.items():
        if "facts" in what:
            # Cloned machines may have one name, and containers of one machine one boot.
            same = machines.setdefault((what["name"], what["boot"]), host)
            if same == host:
                seen[host] = what
            else:
                remedy = "give it one line in the hostfile"
                absent.append(f"{same} and {host} are the same machine, {what['name']}: {remedy}")
    faults = [what["fault"] for what in seen.values() if what["fault"]]
    if seen:
        first = next(iter(seen.values()))["clock"]
        nodes = [{**what, "settings": [], "clock": what["clock"] - first} for what in seen.values()]
        faults += differences(nodes, list(seen))
    for host, what in seen.items():
        if what["devices"] and max(hosts[host]) >= what["devices"]:
            faults.append(
                f"{host} has {what['devices']} devices, and the hostfile or --include says slot {max(hosts[host])}: "
                f"write slots={what['devices']}"
            )
        if locks and what["lock"]:
            faults.append(f"{host}: {what['lock']}")
    if faults:
        raise UserError("\n".join([*absent, *faults]))
    return seen, absent


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


def measure(
    hosts: dict[str, list[int]], found: dict[str, dict[str, Any]], master: str, environment: dict[str, str]
) -> str:
    """What an all-reduce over all hosts takes, in a line. It takes some seconds. Raises UserError where it fails."""
    on_gpus = all(found[host]["accelerator"] == "cuda" for host in hosts)
    backend = "nccl" if on_gpus else "gloo"
    ids = [slots if on_gpus else [0] for slots in hosts.values()]
    print(f"measuring  the network between {len(hosts)} machines, by {backend}; some seconds", flush=True)
    processes = {}
    for node, host in enumerate(hosts):
        options = [*options_of(ids, node, *split_address(master)), "--module", "lib.launch.link_speed", backend]
        command = [sys.executable, "-P", "-m", "lib.launch.start_ranks", *options]
        own = environment | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": found[host]["accelerator"]}
        processes[host] = start(host, command, own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = {host: process.communicate() for host, process in processes.items()}
    if any(process.returncode for process in processes.values()):
        errors = [
            f"{host}: {line}" for host, (_, err) in said.items() for line in err.splitlines() if "Error: " in line
        ]
        raise UserError(
            f"no all-reduce by {backend} ({errors[-1] if errors else 'no answer'}): does a firewall between the "
            f"machines close ports above 1024, or {backend.upper()}_SOCKET_IFNAME name an interface that not all reach?"
        )
    speed = json.loads(next(iter(said.values()))[0].splitlines()[-1])
    return (
        f"network  {speed['bytes_per_second'] * 8 / 1e9:.3g} Gbit/s each way (all-reduces of "
        f"{speed['bytes'] / 1e6:.0f} MB by {backend}), latency {speed['latency_seconds'] * 1e3:.2g} ms (of one number)"
    )


def address_of_first(found: dict[str, dict[str, Any]]) -> str:
    """HOST:PORT of the first host, for the others: a name of the hostfile may be known to this machine's ssh alone.

    found: what preflight has found. It is the address that ssh has reached; where the first host is this machine, the
    one from which ssh has reached another.
    """
    (host, first), *others = found.items()
    known = [first["address"], *(other["other_end"] for _, other in others)]
    return f"{next((address for address in known if address), host)}:{first['port']}"


def train(
    hosts: dict[str, list[int]], master: str, arguments: list[str], environment: dict[str, str], least: int,
    silence: float,
) -> int:  # fmt: skip
    """Start `./launch.sh arguments` on every host, and wait for their end. Returns the exit code.

    least: so many hosts, the first one among them, may go on where the others have gone. silence: after so many seconds
    without a sign of this process the hosts end, and without one of a host it is given up.
    """
    processes: list[subprocess.Popen[str]] = []
    shown: list[threading.Thread] = []
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: send(number, processes))
    for node, (host, slots) in enumerate(hosts.items()):
        here = [str(ROOT / "launch.sh"), *arguments, "--ranks", str(len(slots))]
        here += ["--nodes", str(len(hosts)), "--node_rank", str(node), "--master", master]
        own = environment | {"SIGNALS_BY_STDIN": "yes"}
        if slots != list(range(len(slots))):
            own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if node else {}
        processes.append(start(host, here, own, silence, **pipes))
        if node:
            shown.append(threading.Thread(target=show, args=(host, processes[-1]), daemon=True))
            shown[-1].start()
    threading.Thread(target=give_signs, args=(processes, max(0.1, silence / 4)), daemon=True).start()
    # Until the first host has ended, which does so after all that it has not lost, or too few are left.
    while (codes := [process.poll() for process in processes])[0] is None and enough_left(codes, least):
        time.sleep(0.1)
    end(processes)
    for thread in shown:  # the last lines
        thread.join(5)
    code = codes[0] if codes[0] is not None else next(code for code in codes if code and code != STOPPED)
    return code if 0 <= code < 255 else FAULT  # 255: ssh itself


def send(number: int, processes: list[subprocess.Popen[str]]) -> None:
    """Send a signal's number to the command on each host; 0 is a sign of life."""
    for process in processes:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            os.write(process.stdin.fileno(), f"{int(number)}\n".encode())  # at once, or a signal might meet half


def give_signs(processes: list[subprocess.Popen[str]], every: float) -> None:
    while True:
        time.sleep(every)
        send(0, processes)


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Wait until all have ended, and tell those that do not: a host that has found a mistake, or could not begin, does
    not tell the others, who would wait for it."""
    for turn in itertools.count():
        deadline = time.monotonic() + ALONE_SECONDS
        while (running := [process for process in processes if process.poll() is None]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not running:
            return
        send(signal.SIGTERM, running)
        if turn and processes[0] not in running:  # the ssh of these hears nothing of it
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)


def enough_left(codes: list[int | None], least: int) -> bool:
    """Whether the hosts that have not failed may go on. codes: the exit code of each host, None while it runs."""
    failed = [code for code in codes if code not in (None, 0, STOPPED)]
    return not failed or (MISTAKE not in failed and len(codes) - len(failed) >= least)


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
    parser.add_argument("--restarts", default="0")
    parser.add_argument("--min_nodes", default="")
    given, arguments = parser.parse_known_args()
    hosts = chosen(read_hostfile(Path(given.hostfile).expanduser()), given.include, given.exclude)
    least = least_of(given.min_nodes, len(hosts), given.restarts != "0")
    again = ["--restarts", given.restarts, *(["--min_nodes", given.min_nodes] if given.min_nodes else [])]
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
    if what == "check" and arguments[1:]:
        raise UserError(f"check knows no {arguments[1]}; it looks at machines, not at a run's settings")
    if what == "check":
        return check(hosts, environment, given.master)
    found, absent = preflight(hosts, environment)
    if not found:
        raise UserError("\n".join(absent))
    master, options = given.master, [*arguments, *again]
    if absent:  # nothing trains then, but the others say what else is amiss
        print(*(f"error: {line}" for line in absent), sep="\n", file=sys.stderr)
        master, options, least = None, arguments, len(found)
    environment["ONLY_CHECK"] = "yes" if absent else ""
    silence = silence_of(arguments[1:], str(ROOT / "recipes" / f"{what}.yaml"))
    slots = {host: hosts[host] for host in found}
    code = train(slots, master or address_of_first(found), options, environment, least, silence)
    return MISTAKE if absent else code


def check(hosts: dict[str, list[int]], environment: dict[str, str], master: str | None) -> int:
    found, absent = preflight(hosts, environment, locks=True)
    if absent:
        raise UserError("\n".join(absent))
    print(table(hosts, found))
    if len(hosts) > 1:
        print(measure(hosts, found, master or address_of_first(found), environment))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:  # of check; a run is stopped by it
        sys.exit(INTERRUPTED)
