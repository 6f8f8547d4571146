"""On two real hosts (hosts.py): faults are said where one looks, machines that are left go on, and what is amiss is
found before anything starts."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ALL
from hosts import Host
from machine_runs import (
    RECIPE,
    SILENCE,
    Hosts,
    alike,
    end,
    one_machine,
    process_of,
    ranks_on,
    start,
    wait,
    wait_for,
)

from lib.distributed.network import free_port
from lib.errors import ROOT, UserError
from lib.launch import hosts as by_hostfile
from lib.launch import meeting, start_ranks, team
from lib.launch.facts import facts
from lib.settings.ds_config import read_json, takes_cpu_adam

SLOW = "tc qdisc add dev eth0 root tbf rate 100mbit burst 64k latency 400ms"

# What Python runs first where this is on its path: each rank's optimizer fails in its first step.
BROKEN = """
import os, sys
if "LOCAL_RANK" in os.environ:
    import torch
    def step(*_, **__):
        print("a library of this host"); {fault}
    torch.optim.AdamW.step = step
"""


def write(host: Host, file: str, text: str) -> None:
    """Write a file that this host alone has."""
    assert host.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1"', "sh", file, text).returncode == 0


ONLY_ALL = pytest.mark.skipif(not ALL, reason="./launch.sh test --all")
BUG, MISTAKE = "raise KeyError('of beta')", "torch.empty(1 << 50)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "fault"),
    [
        ("hand", BUG),
        pytest.param("hand", MISTAKE, marks=ONLY_ALL),
        pytest.param("file", BUG, marks=ONLY_ALL),
        pytest.param("file", MISTAKE, marks=ONLY_ALL),
    ],
)
def test_what_fails_on_another_machine_is_seen_on_the_first(hosts: Hosts, shared: Path, way: str, fault: str) -> None:
    """A traceback, or the line on no memory; what libraries print is in the log of the host."""
    alpha, beta = hosts
    write(beta, "/tmp/broken/sitecustomize.py", BROKEN.format(fault=fault))
    run = shared / "run"
    if way == "hand":
        command = ["env", "PYTHONPATH=/tmp/broken", "./launch.sh", *RECIPE, "--run_dir", run, "--nodes", 2]
        command += ["--master", "alpha:29503", "--ranks", 1, "--node_rank"]
        codes, printed = end([host.start(*command, number) for number, host in enumerate(hosts)], hosts)
        assert codes == [1, 1] and "alpha: " not in printed[1]
    else:
        (shared / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
        command = ["./launch.sh", *RECIPE, "--hostfile", shared / "hostfile", "--run_dir", run]
        codes, printed = end([alpha.start(*command, "--env", "PYTHONPATH=/tmp/broken")], hosts)
        assert codes == [1]
    if fault == BUG:
        assert printed[0].count("\nbeta: Traceback (most recent call last):\n") == 1, printed
        assert printed[0].count("\nbeta: KeyError: 'of beta'\n") == 1
    else:
        assert printed[0].count("\nbeta: error: rank 1: out of memory") == 1, printed
        assert "can't allocate memory" in (run / "log-beta.txt").read_text()
    assert "a library of this host\n" in (run / "log-beta.txt").read_text()
    assert "a library of" not in (run / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", pytest.param("hand", marks=ONLY_ALL)])
def test_machines_that_are_left_go_on(hosts: Hosts, shared: Path, way: str) -> None:
    """By a hostfile the supervisor of a machine is killed, by hand its link is cut: one rank is left, and ends well."""
    alpha, beta = hosts
    steps, run = ["--max_steps", "100"], shared / "run"  # so many that a fast machine does not end before the fault
    settings = [*steps, "--save_every", 10, "--rank_timeout", SILENCE / 60, "--restarts", 1, "--min_nodes", 1]
    settings += ["--run_dir", run]
    if way == "file":
        (shared / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
        both = [alpha.start("./launch.sh", *RECIPE, "--hostfile", shared / "hostfile", *settings)]
        wait_for(run, 12, both)
        os.kill(process_of(beta, "lib.launch.supervise"), signal.SIGKILL)
    else:
        both = start(hosts, *settings, "--ranks", 1)
        wait_for(run, 12, both)
        beta.cut()
    gone = time.monotonic()
    try:
        wait(lambda: not any(ranks_on(hosts)), both, SILENCE + 60)
        expected = one_machine(2, shared / "1x2", *steps)  # while the one waits for the other
        if way == "hand":
            cut_off = both[1].communicate(timeout=60)[0]
            assert both[1].returncode == 1 and "node 0 did not answer at alpha:29500 within 45 s" in cut_off
        assert not beta.processes() and time.monotonic() - gone < SILENCE + 60
        codes, (printed,) = end(both[:1], hosts)
    finally:
        beta.mend()
    assert codes == [0] and "node 1 (beta) has gone" in printed, printed
    assert "going on without node 1 of 2, which did not come back within 30 s" in printed
    assert "device   1 rank x CPU" in printed and alike(run, expected)


@pytest.mark.slow
@ONLY_ALL
def test_a_machine_that_comes_back_in_time_takes_part_again(hosts: Hosts, shared: Path) -> None:
    steps, run = ["--max_steps", "100"], shared / "run"
    settings = [*steps, "--save_every", 10, "--restarts", 1, "--min_nodes", 1, "--run_dir", run, "--ranks", 1]
    alpha, beta = start(hosts, *settings)
    wait_for(run, 12, [alpha, beta])
    os.kill(process_of(hosts[1], "lib.launch.supervise"), signal.SIGKILL)
    assert beta.wait(20) == -signal.SIGKILL
    own = ["--nodes", 2, "--node_rank", 1, "--master", "alpha:29500"]
    again = hosts[1].start("./launch.sh", *RECIPE, *own, *settings)
    codes, (printed, _) = end([alpha, again], hosts)
    assert codes == [0, 0] and "restart  exit code" in printed and "going on without" not in printed, printed
    assert alike(run, one_machine(2, shared / "1x2", *steps))


@pytest.mark.slow
@ONLY_ALL
def test_a_batch_that_the_ranks_that_are_left_cannot_share_ends_the_run(hosts: Hosts, shared: Path) -> None:
    run = shared / "run"
    (shared / "hostfile").write_text("alpha slots=2\nbeta slots=1\n")
    settings = ["--max_steps", 1000, "--save_every", 10, "--batch_size", 3, "--restarts", 1, "--min_nodes", 1]
    command = ["./launch.sh", *RECIPE, "--hostfile", shared / "hostfile", "--run_dir", run, *settings]
    both = [hosts[0].start(*command)]
    wait_for(run, 12, both)
    os.kill(process_of(hosts[1], "lib.launch.supervise"), signal.SIGKILL)
    codes, (printed,) = end(both, hosts)
    assert codes == [2] and "batch_size 3 cannot be cut into 2 ranks" in printed, printed


def test_all_that_is_amiss_on_a_machine_is_said_at_once(hosts: Hosts, shared: Path) -> None:
    """Rows that a machine lacks, another model, a run folder that it may only read, a lock, devices that it lacks; and,
    where a machine of the hostfile is not there, what is amiss on the others."""
    alpha, beta = hosts
    write(alpha, "/tmp/rows.jsonl", '{"text": "some words"}\n')
    for host, text in ((alpha, "{}"), (beta, "{ }")):
        write(host, "/tmp/model/config.json", text)
    lock = "/tmp/.cache/torch_extensions/py311_cpu/cpu_adam/lock"
    write(beta, lock, "")
    beta.run("touch", "-d", "1 hour ago", lock)
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (shared / "offload.json").write_text(json.dumps(offload))
    beta.run("mount", "--bind", shared, shared)
    beta.run("mount", "-o", "remount,bind,ro", shared)
    command = ["./launch.sh", *RECIPE, "--nodes", 2, "--master", "alpha:29504", "--run_dir", shared / "run"]
    command += ["--dataset", "/tmp/rows.jsonl", "--model", "/tmp/model"]
    command += ["--ds_config", shared / "offload.json", "--node_rank"]
    started = time.monotonic()
    both = [alpha.start(*command, 0), beta.start("env", "DS_ACCELERATOR=cuda", *command, 1)]
    try:
        codes, printed = end(both, hosts)
    finally:
        beta.run("umount", shared)
    assert codes == [2, 2] and time.monotonic() - started < 20
    for text in printed:
        faults = sorted(line for line in text.splitlines() if line.startswith("error: "))
        assert faults == [
            "error: /tmp/model: node 1 (beta) has other files there than node 0 (alpha), or of other sizes: "
            "copy it anew, or share one",
            f"error: beta may only read {shared}: mount it there for writing too",
            f"error: beta: {lock} was left by a compilation of cpu_adam that was killed, and this run would wait for "
            "it for ever: delete the file (unless another machine that shares it is compiling now)",
            "error: beta: DS_ACCELERATOR=cuda, but there is no NVIDIA GPU to use; leave it out, or set "
            "DS_ACCELERATOR=cpu",
            "error: node 1 (beta) has no /tmp/rows.jsonl, which node 0 (alpha) has: copy it to the same path there, "
            "or put it on a shared disk",
        ], text
        assert "deepspeed.launcher" not in text

    (shared / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
    folder = "TORCH_EXTENSIONS_DIR=/tmp/.cache/torch_extensions"  # by ssh, the home is another one
    done = alpha.run("env", folder, "./launch.sh", "check", "--hostfile", shared / "hostfile")
    assert done.returncode == 2 and done.stderr.startswith(f"error: beta: {lock} was left by a compilation"), done
    beta.run("rm", lock)

    (shared / "hostfile").write_text("gamma slots=1\nalpha slots=1\nbeta slots=1\n")
    command = ["./launch.sh", *RECIPE, "--hostfile", shared / "hostfile", "--master", "gamma:29500"]
    done = alpha.run(*command, "--run_dir", "/tmp/run")
    faults = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(faults) == 2 and "deepspeed.launcher" not in done.stdout, done
    assert faults[0].startswith("error: ssh does not reach gamma (")
    assert faults[1].startswith("error: beta does not see the folder of alpha's run, /tmp")
    done = alpha.run(*command, "--run_dir", shared / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: ssh does not reach gamma ("), done
    assert not (shared / "run").exists() and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_check_measures_the_network(hosts: Hosts, shared: Path) -> None:
    alpha, beta = hosts
    (shared / "hostfile").write_text("alpha slots=1\nbeta slots=2\n")
    rates = []
    for limit in ([], SLOW.split()):
        for host in hosts if limit else ():
            assert host.run(*limit).returncode == 0
        started = time.monotonic()
        # The user has come to alpha by a network that beta does not reach.
        login = ["env", "SSH_CONNECTION=192.0.2.7 50000 127.0.0.1 22"]
        done = alpha.run(*login, "./launch.sh", "check", "--hostfile", shared / "hostfile")
        assert done.returncode == 0 and time.monotonic() - started < 20, done
        line = done.stdout.splitlines()[-1].split()
        assert line[0] == "network" and line[2] == "Gbit/s" and "by gloo" in done.stdout
        rates.append(float(line[1]))
    for host in hosts:
        host.run("tc", "qdisc", "del", "dev", "eth0", "root")
    assert 0.08 < rates[1] < 0.105 and rates[0] > 2 * rates[1], rates
    assert not alpha.processes() and not beta.processes()


LAUNCHED = start_ranks.parse(
    ["--master_port", "0", "--num_accelerators", "2", str(ROOT / "recipes" / "causal_lm.py"),
     "--deepspeed_config", str(ROOT / "ds_configs" / "causal_lm" / "zero2.json")]
)  # fmt: skip


def has_ipv6() -> bool:
    return any(found.address == "::1" for all_of in psutil.net_if_addrs().values() for found in all_of)


def test_the_first_machine_goes_on_with_the_run_of_the_others(tmp_path: Path) -> None:
    """Its command was started again, and knows nothing of the run that has begun."""
    address = f"127.0.0.1:{free_port()}"
    first, second = (team.Team(2, node, address, silence=40 * 24 * 3600) for node in range(2))

    def starts(of_first: tuple[Any, ...], of_second: tuple[Any, ...]) -> list[tuple[str | None, bool, int]]:
        """(run_dir, resume, restarts) of both, from what each believed."""
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(
                lambda one, believed: one.gather(LAUNCHED, *believed), (first, second), (of_first, of_second)
            )
            return [(found.run_dir, found.resume, found.restarts) for found in both]

    ours, other = str(tmp_path / "ours"), str(tmp_path / "other")
    assert starts((ours, False, 3), (None, False, 3)) == [(ours, False, 3)] * 2
    first.leave()
    first = team.Team(2, 0, address, silence=5)
    assert second.meeting is not None
    while not second.meeting.lost:
        second.meeting.hear(1)
    assert starts((other, False, 3), (ours, True, 2)) == [(ours, True, 2)] * 2


def test_machines_that_are_left_are_numbered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three supervisors, in one process, the second leaves, and comes back by IPv6; then the first one has gone."""
    for module in (meeting, team):
        monkeypatch.setattr(module, "RETURN_SECONDS", 1)
    port = free_port()
    address = f"127.0.0.1:{port}"

    def places(*teams: team.Team) -> list[tuple[int, int]]:
        """(its number, of how many) of each machine, after they have come together."""
        with ThreadPoolExecutor(len(teams)) as pool:
            starts = list(pool.map(lambda one: one.gather(LAUNCHED, str(tmp_path), False, 1), teams))
        found = [start_ranks.parse([*start.options, "recipe.py"]) for start in starts]
        return [(options.node_rank, len(options.nodes)) for options in found]

    def leave(one: team.Team, *others: team.Team) -> None:
        one.leave()
        for other in others:
            while other.meeting is not None and not other.meeting.lost:
                other.meeting.hear(1)

    first, second, third = (team.Team(3, node, address, silence=5, least=2) for node in range(3))
    assert places(first, second, third) == [(0, 3), (1, 3), (2, 3)]
    leave(second, first, third)
    assert places(first, third) == [(0, 2), (1, 2)]
    second = team.Team(3, 1, f"[::1]:{port}" if has_ipv6() else address, silence=5, least=2)
    assert places(first, second, third) == [(0, 3), (1, 3), (2, 3)]
    monkeypatch.setattr(team, "RETURN_SECONDS", -14)  # it looks for the first one 15 s longer than for the others
    leave(first, second)
    with pytest.raises(meeting.Left, match="node 0 did not answer"):
        places(second)
    # One that has not come at all is no mistake of the settings: at another start it may be there.
    monkeypatch.setattr(team, "JOIN_SECONDS", 0)
    with pytest.raises(meeting.Lost, match="node 0 did not answer"):
        places(team.Team(3, 1, address, silence=5))


@pytest.mark.parametrize(
    ("text", "restarts", "words"),
    [("0", 1, "from 1 to 2"), ("3", 1, "from 1 to 2"), ("x", 1, "whole number"), ("1", 0, "give --restarts N too")],
)
def test_min_nodes_that_cannot_be_are_refused(text: str, restarts: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        team.least_of(text, 2, restarts)


@pytest.mark.parametrize(
    ("codes", "least", "enough"),
    [
        ([None, None], 2, True),
        ([None, 255], 2, False),
        ([None, 255], 1, True),
        ([None, 255, 1], 2, False),
        ([None, 2], 1, False),  # a mistake, which is one on all hosts
        ([None, 75, 0], 3, True),
    ],
)
def test_hosts_that_have_gone_end_the_others_unless_enough_are_left(
    codes: list[int | None], least: int, enough: bool
) -> None:
    assert by_hostfile.enough_left(codes, least) == enough


def test_a_lock_is_a_fault_of_runs_that_would_wait_for_it_alone() -> None:
    offload = read_json(ROOT / "ds_configs" / "causal_lm" / "zero2_offload.json")
    assert not takes_cpu_adam(offload) and takes_cpu_adam(offload | {"zero_force_ds_cpu_optimizer": True})
    assert not takes_cpu_adam({})


def test_files_are_compared_by_their_names_and_sizes(tmp_path: Path) -> None:
    folder, file = tmp_path / "rows", tmp_path / "rows" / "part" / "a.jsonl"
    mixture = f"{folder}=0.5,sotu=0.5"

    def found() -> tuple[str, str]:
        has = facts(tmp_path / "x.py", paths=[None, mixture])
        return has[str(folder)], has["sotu"]

    seen = [found()]
    file.parent.mkdir(parents=True)
    seen.append(found())
    file.write_text("12")
    seen.append(found())
    file.write_text("123")
    seen.append(found())
    file.rename(file.with_name("b.jsonl"))
    seen.append(found())
    assert len({value for value, _ in seen}) == 5 and {value for _, value in seen} == {"missing"}
    assert facts(tmp_path / "x.py", paths=["{{ x }}" * 1000])["{{ x }}" * 1000] == "missing"
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").touch()
    assert found() == seen[-1]
