"""docs/cluster/slurm.sbatch under a real Slurm on the two hosts: stopped, requeued, cancelled, and a node lost."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL, ROOT
from hosts import Host, missing, two_hosts
from machine_runs import RECIPE, Hosts, alike, one_machine, ranks_on, steps_of

DAEMONS = ("munged", "slurmctld", "slurmd")
ABSENT = [name for name in DAEMONS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin") is None]
STEPS = ["--max_steps", "300"]
NODE_SECONDS = 10  # without an answer of a node, after which Slurm takes it for lost
CONFIG = """
ClusterName=test
SlurmctldHost=alpha(10.77.0.1)
SlurmUser=root
AuthInfo=socket=/run/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout={node_seconds}
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2
NodeName=alpha NodeAddr=10.77.0.1 CPUs=1
NodeName=beta NodeAddr=10.77.0.2 CPUs=1
PartitionName=usual Nodes=ALL Default=YES
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def wait(what: Callable[[], Any], seconds: float = 150, said: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


class Slurm:
    """A cluster of the two hosts, and one job there at a time."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder, self.job = hosts, folder, ""
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, node_seconds=NODE_SECONDS))
        (folder / "key").write_bytes(bytes(range(256)) * 4)
        (folder / "key").chmod(0o400)
        for host in hosts:
            files = [f"--{what}-file=/run/munged.{what}" for what in ("pid", "log", "seed")]
            self.do(host, "munged", "--force", f"--key-file={folder}/key", "--socket=/run/munge.socket", *files)
        self.do(hosts[0], "slurmctld")
        for host in hosts:
            self.do(host, "slurmd")
        wait(lambda: self.ask("sinfo", "--noheader", "--format=%T") == "idle", 30, lambda: self.ask("sinfo", "-R"))

    def do(self, host: Host, *words: Any) -> str:
        done = host.run("env", f"SLURM_CONF={self.folder}/slurm.conf", *words)
        assert done.returncode == 0, done
        return done.stdout.strip()

    def ask(self, *words: Any) -> str:
        return self.do(self.hosts[0], *words)

    def submit(self, *settings: Any, limits: Iterable[str] = ()) -> None:
        self.job = self.ask(
            "sbatch", "--parsable", "--nodes", 2, "--output", self.folder / "console", *limits,
            "docs/cluster/slurm.sbatch", *settings,
        )  # fmt: skip

    def state(self) -> str:
        found = self.ask("scontrol", "show", "job", self.job).split()
        values = dict(word.partition("=")[::2] for word in found)
        return f"{values['JobState']}, restarts {values['Restarts']}"

    def said(self) -> str:
        return f"{self.state()}\n{(self.folder / 'console').read_text()[-6000:]}"


@pytest.fixture
def slurm(shared: Path) -> Iterator[Slurm]:
    """On hosts of its own, with which its daemons end."""
    why_not = missing() or (f"no {', '.join(ABSENT)}; on Debian: apt install slurm-wlm munge" if ABSENT else None)
    if why_not:
        pytest.skip(why_not)
    with two_hosts() as hosts:
        yield Slurm(hosts, shared)


ONLY_ALL = pytest.mark.skipif(not ALL, reason="it waits for Slurm, which takes minutes")


@pytest.mark.slow
@ONLY_ALL
def test_before_the_time_limit_a_job_is_saved_and_requeued(slurm: Slurm, shared: Path) -> None:
    run = shared / "run"
    settings = [*RECIPE, "--max_steps", 100_000, "--ranks", 1, "--run_dir", run, "--resume"]
    slurm.submit(*settings, limits=["--time=3", "--signal=B:USR1@60"])
    wait(lambda: steps_of(run) >= 5, said=slurm.said)
    begun = b"".join((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:5])
    wait(lambda: slurm.state() == "RUNNING, restarts 1", 200, slurm.said)
    at = steps_of(run)
    assert "--resume goes on" in slurm.said() and "TIME LIMIT" not in slurm.said()
    wait(lambda: steps_of(run) >= at + 5, said=slurm.said)
    assert (run / "metrics.jsonl").read_bytes().startswith(begun)  # with the seconds of its steps: not begun anew
    slurm.ask("scancel", slurm.job)
    wait(lambda: not any(ranks_on(slurm.hosts)), said=slurm.said)


@pytest.mark.slow
@ONLY_ALL
def test_slurm_starts_stops_and_requeues(slurm: Slurm, shared: Path) -> None:
    hosts, run = slurm.hosts, shared / "run"
    settings = [*RECIPE, *STEPS, "--ranks", 1, "--save_every", 10, "--rank_timeout", 0.2, "--run_dir", run, "--resume"]
    restarts = 0

    def trains() -> None:
        at = steps_of(run)
        wait(lambda: all(ranks_on(hosts)) and steps_of(run) >= at + 15, said=slurm.said)

    def requeued() -> None:
        nonlocal restarts
        restarts += 1
        wait(lambda: slurm.state() == f"RUNNING, restarts {restarts}", said=slurm.said)
        trains()

    slurm.submit(*settings)
    trains()

    # As before the time limit.
    slurm.ask("scancel", "--batch", "--signal=USR1", slurm.job)
    requeued()
    assert "--resume goes on" in slurm.said()

    slurm.ask("scontrol", "requeue", slurm.job)
    requeued()

    slurm.ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    requeued()
    assert "exit code 1\n" not in slurm.said()  # but 75: each time Slurm signals all processes at once

    hosts[1].cut()
    wait(lambda: "down" in slurm.ask("sinfo", "--noheader", "--nodes=beta", "--format=%T"), 60, slurm.said)
    wait(lambda: not any(ranks_on(hosts)), 12 + 60, slurm.said)
    hosts[1].mend()
    requeued()

    slurm.ask("scancel", slurm.job)
    wait(lambda: slurm.state() == f"CANCELLED, restarts {restarts}" and not any(ranks_on(hosts)), said=slurm.said)
    time.sleep(8)
    assert slurm.state() == f"CANCELLED, restarts {restarts}"

    slurm.submit(*settings)
    wait(lambda: slurm.state() == "COMPLETED, restarts 0", said=slurm.said)
    assert alike(run, one_machine(2, shared / "one", *STEPS))
    assert not list(ROOT.glob("slurm-*"))
