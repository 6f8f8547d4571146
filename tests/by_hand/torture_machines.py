"""Everything that can happen to a run on two machines, done on the two hosts of tests/machines/hosts.py. Run by hand,
as root; each fault takes half a minute on 2 cores:

    python tests/by_hand/torture_machines.py                                 every fault, three times
    python tests/by_hand/torture_machines.py --only "link cut" --times 1     those that have these words in their names
    python tests/by_hand/torture_machines.py --folder /var/tmp/torture       a folder that is there is gone on with

One run is started again and again, by --resume, and each time a fault ends it. Beside it a second run trains on the
same hosts. Measured is how long the first run's processes are there after a fault, by the hosts' namespaces; whether
the exit codes are those of docs/machines.md; whether the second run's processes are the same ones and train on; and
whether the losses of both runs are those of runs to which nothing happens. docs/machines.md keeps the table.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in (".", "contract", "machines"))]

from conftest import read_losses
from hosts import Host, missing, two_hosts
from machine_runs import RECIPE, SILENCE

LIMIT = SILENCE + 60  # seconds within which all processes must have ended
STEADY = [*RECIPE, "--lr_schedule", "constant"]  # by which a step's loss does not depend on how many steps there are
TORTURED = [*STEADY, "--save_every", "10", "--rank_timeout", str(SILENCE / 60)]
BESIDE = [*STEADY, "--batch_size", "512", "--hidden_size", "128", "--save_minutes", "1"]
FOREVER = 1_000_000  # steps
ENOUGH = 300  # steps of the second run, after which a new one begins: to judge it, as many are trained once more
STRETCH = 400  # steps by which the undisturbed runs grow
PROCESSES = {
    "rank": "--local_rank=0", "start_ranks": "lib.launch.start_ranks", "supervisor": "lib.launch.supervise",
    "hosts.py": "lib.launch.hosts", "ssh": "ServerAliveInterval",
}  # fmt: skip
ALPHA, BETA = 0, 1


class Job:
    """One start of a run on the hosts; `name` is in the environment of all its processes."""

    def __init__(self, hosts: list[Host], run: Path, name: str, settings: list[Any], by_hostfile: bool = False):
        self.hosts, self.run, self.name = hosts, run, name
        self.older = inode_of(run / "metrics.jsonl")
        self.consoles = [run.parent / f"{name}-{host.name}.txt" for host in hosts[: 1 if by_hostfile else None]]
        port = {"tortured": 29500, "beside": 29600, "undisturbed": 29700}[name]
        command = ["env", f"JOB={name}", *(["nice", "-n", 19] if name == "beside" else []), "./launch.sh", *settings]
        command += ["--run_dir", run, "--resume"]
        if by_hostfile:
            (run.parent / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
            commands = [[*command, "--hostfile", run.parent / "hostfile", "--env", f"JOB={name}"]]
        else:
            where = ["--master", f"{hosts[0].name}:{port}", "--nodes", len(hosts), "--ranks", 2 // len(hosts)]
            commands = [[*command, *where, "--node_rank", node] for node in range(len(hosts))]
        self.processes, self.started = [], time.time()
        for host, words, console in zip(hosts, commands, self.consoles, strict=False):
            with console.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        host.command(*words), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                    )
                )

    def there(self) -> dict[int, str]:
        """{process id: command line} of what it has on its hosts."""
        found = {}
        for host in self.hosts:
            for process, line in host.processes().items():
                with contextlib.suppress(OSError):  # it has ended
                    environment = (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
                    is_beside = b"JOB=beside" in environment
                    if is_beside == (self.name == "beside"):  # what belongs to neither run counts as this one's
                        found[process] = line
        return found

    def has(self, host: int, what: str) -> set[int]:
        return set(self.hosts[host].processes(PROCESSES[what])) & set(self.there())

    def process(self, host: int, what: str) -> int:
        found = self.has(host, what)
        if len(found) != 1:
            raise SystemExit(f"{what} on {self.hosts[host].name}: {found}\n{self.said()}")
        return found.pop()

    def steps(self) -> int:
        """Those that the run has, of earlier starts too, once this start trains: it then writes the file anew."""
        metrics = self.run / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError):  # not there yet; half a line
            return len(read_losses(self.run)) if inode_of(metrics) != self.older else 0
        return 0

    def wait(self, what: Callable[[], Any], why: str, seconds: float = 180, poll: float = 0.05) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise SystemExit(f"{self.name}: {why} did not come\n{self.said()}")
            time.sleep(poll)

    def advance(self, steps: int) -> None:
        """Wait until it has trained some steps more."""
        self.wait(self.steps, "the first step")
        at = self.steps()
        self.wait(lambda: self.steps() >= at + steps, f"step {at + steps}")

    def end(self, seconds: float) -> float | None:
        """Wait until no process is left, and end those that are left after so long. Returns the seconds, if enough."""
        started = time.monotonic()
        while left := self.there():
            if time.monotonic() - started > seconds:
                print(f"left behind: {left}\n{self.said()}", flush=True)
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                return None
            time.sleep(0.1)
        return time.monotonic() - started

    def codes(self) -> list[int]:
        return [process.wait(10) for process in self.processes]

    def said(self) -> str:
        return "\n".join(f"--- {console.name}\n{console.read_text()[-2500:]}" for console in self.consoles)


def last_checkpoint(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def inode_of(file: Path) -> int:
    return file.stat().st_ino if file.exists() else 0


@dataclass(frozen=True)
class Fault:
    """do: makes it happen to a run that is in the state `when`. codes: those of the consoles, [] if the run goes on."""

    name: str
    do: Callable[[Job], Any]
    codes: list[int]
    when: str = "training"
    by_hostfile: bool = False
    beside: str = "both"  # the host on which the second run is alone, where a host goes


def send(number: int, *targets: tuple[int, str], pause: float = 0.0) -> Callable[[Job], None]:
    """Send a signal to each (host, process), all of which are found before the first gets it."""

    def do(job: Job) -> None:
        for process in [job.process(host, what) for host, what in targets]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
            time.sleep(pause)

    return do


def cut(job: Job) -> None:
    """The link comes back when the run has ended: the second run waits so long."""
    job.hosts[BETA].cut()


def cut_for(seconds: float) -> Callable[[Job], None]:
    def do(job: Job) -> None:
        job.hosts[BETA].cut()
        time.sleep(seconds)
        job.hosts[BETA].mend()

    return do


def fill_for(seconds: float) -> Callable[[Job], None]:
    def do(job: Job) -> None:
        filler = job.run.parent / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        time.sleep(seconds)
        filler.unlink()

    return do


def take_away_for(seconds: float) -> Callable[[Job], None]:
    def do(job: Job) -> None:
        job.run.rename(job.run.with_name("away"))
        time.sleep(seconds)
        job.run.with_name("away").rename(job.run)

    return do


def kill_host(host: int) -> Callable[[Job], None]:
    return lambda job: os.kill(job.hosts[host].init, signal.SIGKILL)


def stop_then_kill(job: Job) -> None:
    """The process that would end a rank's fellows is stopped."""
    send(signal.SIGSTOP, (BETA, "start_ranks"))(job)
    send(signal.SIGKILL, (BETA, "rank"))(job)


KILL, STOP, INT, TERM, USR1, HUP = (
    signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP,
)  # fmt: skip
A_RANK, B_RANK = (ALPHA, "rank"), (BETA, "rank")
A_START, B_START = (ALPHA, "start_ranks"), (BETA, "start_ranks")
A_SUPER, B_SUPER = (ALPHA, "supervisor"), (BETA, "supervisor")
FAULTS = [
    Fault("a rank stopped on beta", send(STOP, B_RANK), [1, 1]),
    Fault("supervisor killed on alpha", send(KILL, A_SUPER), [-9, 1]),
    Fault("hosts.py killed", send(KILL, (ALPHA, "hosts.py")), [-9], by_hostfile=True),
    Fault("the disk is full for 5 s", fill_for(5), []),
    Fault("link cut until the end", cut, [1, 1]),
    Fault("a rank killed on beta", send(KILL, B_RANK), [247, 247]),
    Fault("link cut during a checkpoint", cut, [1, 1], "checkpoint"),
    Fault("start_ranks killed on beta", send(KILL, B_START), [247, 247]),
    Fault("SIGTERM to the supervisor on beta", send(TERM, B_SUPER), [75, 75]),
    Fault("SIGINT to hosts.py", send(INT, (ALPHA, "hosts.py")), [75], by_hostfile=True),
    Fault("ssh killed", send(KILL, (ALPHA, "ssh")), [1], by_hostfile=True),
    Fault("a rank killed while it starts", send(KILL, B_RANK), [247, 247], "start"),
    Fault("a rank killed during the export", send(KILL, A_RANK), [247, 247], "export"),
    Fault("link cut for 4 s", cut_for(4), []),
    Fault("both supervisors killed", send(KILL, A_SUPER, B_SUPER), [-9, -9]),
    Fault("start_ranks stopped, its rank killed", stop_then_kill, [1, 1]),
    Fault("the run's folder is away for 5 s", take_away_for(5), []),
    Fault("SIGUSR1 to the supervisor on alpha", send(USR1, A_SUPER), [75, 75]),
    Fault("link cut while ranks start", cut, [1, 1], "start"),
    Fault("beta is gone", kill_host(BETA), [1, -9], beside="alpha"),
    Fault("alpha is gone", kill_host(ALPHA), [-9, 1], beside="beta"),
    Fault("a rank killed on alpha", send(KILL, A_RANK), [247, 247]),
    Fault("all ranks killed", send(KILL, A_RANK, B_RANK), [247, 247]),
    Fault("a rank stopped on alpha", send(STOP, A_RANK), [1, 1]),
    Fault("start_ranks killed on alpha", send(KILL, A_START), [247, 247]),
    Fault("supervisor killed on beta", send(KILL, B_SUPER), [1, -9]),
    Fault("SIGTERM to the supervisor on alpha", send(TERM, A_SUPER), [75, 75]),
    Fault("SIGINT to the supervisor on alpha", send(INT, A_SUPER), [75, 75]),
    Fault("SIGINT to the supervisor on beta", send(INT, B_SUPER), [75, 75]),
    Fault("SIGUSR1 to the supervisor on beta", send(USR1, B_SUPER), [75, 75]),
    Fault("SIGHUP to both supervisors", send(HUP, A_SUPER, B_SUPER), [75, 75]),
    Fault("SIGTERM to hosts.py", send(TERM, (ALPHA, "hosts.py")), [75], by_hostfile=True),
    Fault("link cut for 25 s", cut_for(25), [1, 1]),
    Fault("a rank killed during a checkpoint", send(KILL, B_RANK), [247, 247], "checkpoint"),
    Fault("supervisor killed while ranks start", send(KILL, B_SUPER), [1, -9], "start"),
    Fault("SIGINT while ranks start", send(INT, B_SUPER), [130, 130], "start"),
    Fault("a rank killed while it loads", send(KILL, A_RANK), [247, 247], "loading"),
    Fault("a rank stopped while it loads", send(STOP, B_RANK), [1, 1], "loading"),
    Fault("a rank stopped during the export", send(STOP, B_RANK), [1, 1], "export"),
    Fault("link cut, by hostfile", cut, [1], by_hostfile=True),
]


class Torture:
    """The two hosts, the run that is tortured and the one beside it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.small = folder / "small"  # a disk of its own
        self.run = self.small / "run"
        self.open = contextlib.ExitStack()
        self.hosts: list[Host] = []
        self.beside: Job | None = None
        self.unjudged: list[dict[str, Any]] = []  # faults after which the run has not been resumed yet

    def prepare(self, where: str) -> Job:
        """Let there be both hosts, and the second run on both or on one of them, which is returned."""
        any_gone = any(host.is_gone() for host in self.hosts)
        if any_gone or (self.beside and self.beside.steps() > ENOUGH):
            self.stop_beside()
        if any_gone:
            self.open.close()
            self.hosts = []
        if not self.hosts:
            self.hosts = list(self.open.enter_context(two_hosts()))
        on = [host for host in self.hosts if where in ("both", host.name)]
        if self.beside is None or self.beside.hosts != on:
            self.stop_beside()
            shutil.rmtree(self.folder / "beside", ignore_errors=True)
            self.beside = Job(on, self.folder / "beside", "beside", [*BESIDE, "--max_steps", FOREVER])
            self.beside.advance(1)
        return self.beside

    def stop_beside(self) -> None:
        if self.beside is None:
            return
        os.kill(self.beside.process(0, "supervisor"), signal.SIGINT)
        took, codes = self.beside.end(LIMIT), self.beside.codes()
        if took is None or set(codes) != {75}:
            raise SystemExit(f"the second run ended with {codes}\n{self.beside.said()}")
        self.beside.run.rename(self.folder / f"ended-{time.time():.0f}")
        self.beside = None

    def judge_beside(self) -> None:
        """The second runs have trained as if nothing had happened."""
        for run in self.folder.glob("ended-*"):
            losses = read_losses(run)
            expected = self.undisturbed("beside", BESIDE, len(losses))
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
            print(f"the second run: {len(losses)} steps, losses within {worst:.0e} of an undisturbed run's", flush=True)
            if worst > 1e-5:
                raise SystemExit("that is not what it must be")
            shutil.rmtree(run)

    def undisturbed(self, name: str, settings: list[str], steps: int) -> list[float]:
        """The first losses of a run to which nothing happens; it trains on if it has fewer."""
        run = self.folder / f"undisturbed-{name}"
        if not run.exists() or len(read_losses(run)) < steps:
            if not self.hosts or any(host.is_gone() for host in self.hosts):
                self.prepare("both")
            job = Job(self.hosts, run, "undisturbed", [*settings, "--max_steps", -(-steps // STRETCH) * STRETCH])
            if any(process.wait(600) for process in job.processes):
                raise SystemExit(job.said())
        return read_losses(run)[:steps]

    def reach(self, job: Job, when: str) -> None:
        """Wait until the run is in this state."""
        model, checkpoints = self.run / "model", self.run / "checkpoints"
        if when == "start":
            job.wait(lambda: all(job.has(host, "rank") for host in range(len(job.hosts))), "a rank")
            time.sleep(self.draw.uniform(0, 4))
        elif when == "loading":
            lock = self.run / ".lock"
            job.wait(lambda: lock.exists() and lock.stat().st_mtime > job.started, "the run's lock", poll=0.01)
            time.sleep(self.draw.uniform(0, 0.5))
        elif when == "export":
            job.wait(lambda: any(p.lstat().st_mtime > job.started for p in model.glob("*")), "the export", poll=0.001)
        else:
            job.advance(self.draw.randint(3, 25))
            if when == "checkpoint":
                job.wait(lambda: list(checkpoints.glob(".writing-*")), "a checkpoint", 30, poll=0.001)

    def once(self, fault: Fault) -> dict[str, Any]:
        """Start, let it happen, and see what is left. Returns what was measured."""
        beside = self.prepare(fault.beside)
        if fault.when == "export" and not self.run.exists():
            self.resume()
        steps = len(read_losses(self.run)) + 25 if fault.when == "export" else FOREVER
        job = Job(self.hosts, self.run, "tortured", [*TORTURED, "--max_steps", steps], fault.by_hostfile)
        self.reach(job, fault.when)
        losses = read_losses(self.run) if job.steps() else []
        before, step_beside = beside.there(), beside.steps()
        started = time.monotonic()
        fault.do(job)
        if not fault.codes:
            job.advance(40)
            started = time.monotonic()
            send(INT, A_SUPER)(job)
        took = job.end(LIMIT)
        seconds = None if took is None else time.monotonic() - started
        codes = job.codes()
        right = codes == (fault.codes or [75, 75])
        if not right:
            print(job.said(), flush=True)
        for host in self.hosts:
            if not host.is_gone():
                host.mend()
        lives = before.keys() <= beside.there().keys()
        beside.wait(lambda: beside.steps() > step_beside, "a step of the second run", 120)
        self.judge(losses)
        found = {"name": fault.name, "seconds": seconds, "codes": codes, "right": right, "beside": lives}
        self.unjudged.append(found)
        if fault.when == "export":
            self.resume(steps)
        return found

    def judge(self, losses: list[float]) -> None:
        """Those of the run when it had trained on after faults, if it had: are they those of an undisturbed run?"""
        if losses:
            same = losses == self.undisturbed("tortured", TORTURED, len(losses))
            while self.unjudged:
                self.unjudged.pop()["resumed"] = same

    def resume(self, steps: int = FOREVER) -> None:
        """Go on with the run, for some steps or to its end."""
        self.prepare("both")
        job = Job(self.hosts, self.run, "tortured", [*TORTURED, "--max_steps", steps])
        if steps == FOREVER:
            job.advance(15)
            send(INT, A_SUPER)(job)
        for process in job.processes:
            process.wait(180)
        if set(job.codes()) != {75 if steps == FOREVER else 0}:
            raise SystemExit(f"the resumed run ended with {job.codes()}\n{job.said()}")
        self.judge(read_losses(self.run))


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| what happens | times | all ended within | exit codes | second run | resumed |"
    yield "|---|---|---|---|---|---|"
    for fault in FAULTS:
        of_it = [one for one in found if one["name"] == fault.name]
        if of_it:
            seconds = [one["seconds"] for one in of_it]
            most = "NOT ENDED" if None in seconds else f"{max(seconds):.0f} s"
            codes = sorted({" and ".join(map(str, one["codes"])) for one in of_it})
            beside = "trained on" if all(one["beside"] for one in of_it) else "DISTURBED"
            resumed = "same losses" if all(one["resumed"] for one in of_it) else "OTHER LOSSES"
            wrong = "" if all(one["right"] for one in of_it) else " WRONG"
            yield f"| {fault.name} | {len(of_it)} | {most} | {'; '.join(codes)}{wrong} | {beside} | {resumed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORDS", help="faults with one of these in their names"
    )
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1e9, help="no further fault is begun after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which things happen")
    parser.add_argument("--folder", type=Path, help="where what was found is kept, and gone on with")
    options = parser.parse_args()
    why_not = missing()
    if why_not:
        raise SystemExit(f"error: {why_not}")
    if "OWN_MOUNTS" not in os.environ:  # the small disk is to go with this process
        os.environ["OWN_MOUNTS"] = "yes"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-", dir="/var/tmp"))
    (folder / "small").mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder / "small"], check=True)
    results = folder / "found.json"
    found: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    torture = Torture(folder, options.seed + len(found))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and the hosts with it
    stop_at = time.monotonic() + 60 * options.minutes
    try:
        for fault in FAULTS:
            done = sum(one["name"] == fault.name for one in found)
            for number in range(done, options.times):
                if not any(words in fault.name for words in options.only) or time.monotonic() > stop_at:
                    continue
                found.append(torture.once(fault))
                print(f"{time.strftime('%H:%M:%S')} {number + 1}/{options.times} {found[-1]}", flush=True)
        if torture.unjudged:
            torture.resume()
        torture.stop_beside()
        if time.monotonic() < stop_at:  # else when this is gone on with
            torture.judge_beside()
    finally:
        torture.open.close()
        results.write_text(json.dumps([one for one in found if "resumed" in one], indent=1))
    print("\n".join(table(found)))
    if not options.folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
