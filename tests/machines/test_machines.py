"""Runs on two real hosts (hosts.py): the same losses as on one, the end is the end on both, and mistakes are said."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine_runs import (
    RECIPE,
    SILENCE,
    STEPS,
    Hosts,
    alike,
    end,
    one_machine,
    process_of,
    ranks_on,
    start,
    steps_of,
    wait,
    wait_for,
)

from lib.errors import ROOT, UserError
from lib.launch.facts import differences
from lib.launch.hosts import chosen
from lib.launch.team import verdict


@pytest.mark.slow
def test_two_machines_train_as_one(hosts: Hosts, shared: Path) -> None:
    """1 x 4 and 2 x 2, by a hostfile. Each has a cache of its own, and Debian's `127.0.1.1 <own name>`."""
    (shared / "hostfile").write_text("alpha slots=2\nbeta slots=2\n")
    command = ["./launch.sh", *RECIPE, "--hostfile", shared / "hostfile", "--run_dir", shared / "2x2"]
    codes, printed = end([hosts[0].start(*command)], hosts)
    assert codes == [0], printed
    assert "device   4 ranks" in printed[0] and "deepspeed.launcher.launch" in printed[0]
    assert "\nstep 20/20" in printed[0] and "beta: step" not in printed[0] and "Traceback" not in printed[0]
    assert alike(shared / "2x2", one_machine(4, shared / "1x4"))
    assert json.loads((shared / "2x2" / "result.json").read_text())["finished"]


@pytest.mark.slow
def test_whatever_happens_on_a_machine_happens_to_both(hosts: Hosts, shared: Path) -> None:
    """A rank is killed, a link is cut, Ctrl-C, a killed supervisor; in the end the losses are those of one machine."""
    alpha, beta = hosts
    run = shared / "run"
    settings = [*STEPS, "--ranks", "1", "--save_every", "10", "--rank_timeout", str(SILENCE / 60), "--run_dir", run]

    both = start(hosts, *settings, "--restarts", 2)
    wait_for(run, 15, both)
    os.kill(process_of(beta, "--local_rank=0"), signal.SIGKILL)
    wait(lambda: not any(ranks_on(hosts)), both, SILENCE + 60)
    wait_for(run, 40, both)

    beta.cut()
    wait(lambda: not any(ranks_on(hosts)), both, SILENCE + 60)
    time.sleep(SILENCE / 4)  # the supervisors too have noticed it
    beta.mend()
    wait(lambda: all(ranks_on(hosts)), both)
    at = steps_of(run)
    wait_for(run, at + 10, both)

    os.kill(process_of(beta, "lib.launch.supervise"), signal.SIGINT)
    codes, printed = end(both, hosts)
    assert codes == [75, 75] and "--resume goes on" in printed[0], printed
    assert "restart  exit code 247" in printed[0] and "restart  exit code 247" in printed[1]
    assert "node 1 (beta) ended with exit code 247" in printed[0]
    assert "node 1 (beta) has gone" in printed[0] and "node 0 (alpha) has gone" in printed[1]
    assert "Traceback" not in printed[0] + printed[1]

    for host, expected in ((beta, [1, -9]), (alpha, [-9, 1])):  # and with the first one, what is left of the others
        at = steps_of(run)
        both = start(hosts, *settings, "--resume")
        wait_for(run, at + 15, both)
        os.kill(process_of(host, "lib.launch.supervise"), signal.SIGKILL)
        wait_all = time.monotonic() + 60
        while any(other.processes() for other in hosts) and time.monotonic() < wait_all:
            time.sleep(0.1)
        codes, printed = end(both, hosts, 10)
        assert codes == expected, printed

    codes, printed = end(start(hosts, *settings, "--resume"), hosts)
    assert codes == [0, 0], printed
    assert alike(run, one_machine(2, shared / "1x2", *STEPS))


# What Python runs first where this is on its path: another clock, which a host cannot have, and another Python.
OTHER = """import platform, time
now, time.time = time.time, lambda: now() + 100
platform.python_version = "3.99".lower
"""


def test_machines_that_do_not_fit_together_start_nothing(hosts: Hosts) -> None:
    """All faults at once, on both consoles; no rank is started."""
    alpha, beta = hosts
    at_alpha = ["./launch.sh", *RECIPE, "--nodes", 2, "--node_rank", 0, "--master", "alpha:29501"]
    at_beta = [*at_alpha, "--max_steps", 3]
    at_beta[at_beta.index(0)] = 1
    assert beta.run("mkdir", "-p", "/tmp/other/torch-9.9.dist-info").returncode == 0
    metadata = (
        "printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 9.9\\n' > /tmp/other/torch-9.9.dist-info/METADATA"
    )
    assert beta.run("sh", "-c", metadata).returncode == 0
    assert beta.run("sh", "-c", f"echo '{OTHER}' > /tmp/other/sitecustomize.py").returncode == 0
    changed = ROOT / "lib" / "run" / "metrics.py"
    beta.run("sh", "-c", f"echo '# changed' > /tmp/changed.py; mount --bind /tmp/changed.py {changed}")
    both = [
        alpha.start(*at_alpha, "--run_dir", "/tmp/run"),
        beta.start("env", "PYTHONPATH=/tmp/other", "GLOO_SOCKET_IFNAME=lo", *at_beta, "--run_dir", "/tmp/run"),
    ]
    started = time.monotonic()
    try:
        codes, printed = end(both, hosts)
    finally:
        beta.run("umount", changed)
    assert codes == [2, 2] and time.monotonic() - started < 20
    for text in printed:
        faults = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(faults) == 7, text
        for fault, words in zip(
            sorted(faults),
            (
                ["alpha cannot reach beta at 127.0.0.1", "GLOO_SOCKET_IFNAME is lo there; leave it out"],
                ["beta does not see the folder of alpha's run, /tmp", "on a disk that all machines share"],
                ["node 1 (beta) has Python 3.99, node 0 (alpha) has 3.", "install the same on all machines"],
                ["node 1 (beta) has torch 9.9, node 0 (alpha) has 2.", "install the same on all machines"],
                ["node 1 (beta) was started with", "--max_steps 3", "give the same settings"],
                ["the clock of node 1 (beta) is 100 s ahead of that of node 0 (alpha)", "follow a time server"],
                ["this code: node 1 (beta) has another content than node 0 (alpha)", "to the same commit"],
            ),
            strict=True,
        ):
            assert all(word in fault for word in words), fault
        assert "deepspeed" not in text.replace("deepspeed_config", "")


def test_who_is_not_expected_is_sent_away(hosts: Hosts, shared: Path) -> None:
    alpha, beta = hosts
    first = ["./launch.sh", *RECIPE, "--master", "alpha:29502", "--run_dir", shared / "run", "--nodes"]
    zero = alpha.start(*first, 2, "--node_rank", 0)
    stranger = "import socket; s = socket.create_connection(('alpha', 29502)); s.send(b'GET / HTTP/1.1\\r\\n\\r\\n')"
    wait(lambda: beta.run("python3", "-c", stranger).returncode == 0, [zero])
    many = beta.run(*first, 3, "--node_rank", 1)
    assert many.returncode == 2 and "beta cannot take part: it has --nodes 3, and node 0 (alpha) has" in many.stderr
    taken = alpha.run(*first, 2, "--node_rank", 0)
    assert taken.returncode == 2 and "port 29502 of this machine cannot be had" in taken.stderr
    again = beta.run(*first, 2, "--node_rank", 2)
    assert again.returncode == 2 and "--node_rank is 2; of 2 nodes the last has 1" in again.stderr
    assert zero.poll() is None
    os.kill(process_of(alpha, "lib.launch.supervise"), signal.SIGINT)
    codes, printed = end([zero], hosts)
    assert codes == [130] and "Traceback" not in printed[0]


@pytest.mark.slow
def test_a_hostfile_starts_and_ends_all_machines(hosts: Hosts, shared: Path) -> None:
    """By ssh, from beta, which is the second of the hosts. Arguments arrive as they are."""
    alpha, beta = hosts
    (shared / "hostfile").write_text("alpha slots=1\n# a comment\nbeta slots=4\n")
    prompt = """it's "quoted", $HOME `id` \\ * ; & | 'ü'"""
    command = ["./launch.sh", *RECIPE, "--hostfile", shared / "hostfile", "--include", "alpha@beta:0"]
    command += [
        "--max_steps",
        100_000,
        "--rank_timeout",
        SILENCE / 60,
        "--save_every",
        10,
        "--env",
        "WORDS=two  words",
        "--prompt",
        prompt,
    ]
    run = shared / "a run"
    first = [beta.start(*command, "--run_dir", run)]
    wait_for(run, 12, first)
    environment = Path(f"/proc/{process_of(alpha, '--local_rank=0')}/environ").read_bytes().split(b"\0")
    assert b"WORDS=two  words" in environment
    os.kill(process_of(beta, "lib.launch.hosts"), signal.SIGINT)
    codes, printed = end(first, hosts)
    assert codes == [75] and "--resume goes on" in printed[0], printed
    assert yaml.safe_load((run / "config.yaml").read_text())["prompt"] == prompt

    at = steps_of(run)
    second = [beta.start(*command, "--run_dir", run, "--resume")]
    wait_for(run, at + 12, second)
    os.kill(process_of(beta, "lib.launch.hosts"), signal.SIGSTOP)  # as where its machine has gone, not seen by ssh
    wait(lambda: not any(host.processes("lib.launch.supervise") for host in hosts), second, SILENCE + 60)
    os.kill(process_of(beta, "lib.launch.hosts"), signal.SIGKILL)
    second[0].send_signal(signal.SIGCONT)  # nsenter has stopped with it
    end(second, hosts, 10)


def test_a_hostfile_is_checked_before_anything_starts(hosts: Hosts, shared: Path) -> None:
    alpha, beta = hosts
    files = {
        "good": ("alpha slots=2\nbeta slots=1\n", []),
        "twice": ("alpha slots=1\nbeta\nalpha slots=2\n", ["twice:2: 'beta' should be", "twice:3: alpha stands here"]),
        "empty": ("# nothing\n", ["names no machine"]),
        "wrong": (
            "alpha slots=1\nbeta slots=1\n10.77.0.2 slots=1\ngamma slots=1\n10.77.0.9 slots=1\n",
            ["ssh does not reach gamma", "ssh does not reach 10.77.0.9", "beta and 10.77.0.2 are the same machine"],
        ),
    }
    for name, (text, faults) in files.items():
        (shared / name).write_text(text)
        started = time.monotonic()
        done = alpha.run("./launch.sh", "check", "--hostfile", shared / name)
        said = done.stderr.splitlines()
        assert done.returncode == (2 if faults else 0) and len(said) == len(faults), done
        assert all(fault in line for fault, line in zip(faults, said, strict=True)), said
        assert time.monotonic() - started < 25
        if not faults:
            header, *rows, _, _ = done.stdout.splitlines()  # then the network, in test_operations.py
            assert header.split()[:3] == ["host", "name", "ranks"]
            assert [row.split()[:3] for row in rows] == [["alpha", "alpha", "2"], ["beta", "beta", "1"]]
    missing_file = alpha.run("./launch.sh", "check", "--hostfile", shared / "nowhere")
    assert missing_file.returncode == 2 and "No such file" in missing_file.stderr
    more = alpha.run("./launch.sh", "check", "--hostfile", shared / "good", "--run_dir", shared)
    assert more.returncode == 2 and more.stderr.startswith("error: check knows no --run_dir")

    (key,) = (
        line.split()[1] for line in beta.run("cat", "/etc/ssh/ssh_config").stdout.splitlines() if "Identity" in line
    )
    keys = Path(key).with_name("authorized_keys")
    beta.run("mount", "--bind", "/dev/null", keys)
    refused = alpha.run("./launch.sh", "check", "--hostfile", shared / "good")
    beta.run("umount", keys)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ssh does not reach beta (")
    assert "Permission denied" in refused.stderr and len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, {"a": [0, 1], "b": [0, 1, 2]}),
        ("b:2,0@a", None, {"a": [0, 1], "b": [0, 2]}),
        (None, "a@b:1", {"b": [0, 2]}),
    ],
)
def test_hosts_are_chosen_as_by_deepspeed(include: str | None, exclude: str | None, left: dict[str, list[int]]) -> None:
    from deepspeed.launcher import runner

    hosts = {"a": [0, 1], "b": [0, 1, 2]}
    assert chosen(hosts, include, exclude) == left
    slots = {host: len(numbers) for host, numbers in hosts.items()}
    assert runner.parse_inclusion_exclusion(slots, include or "", exclude or "") == left


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("c", None, "the hostfile has no c"),
        ("b:3", None, "b has no slot 3; the last is 2"),
        (None, "a@b", "leaves no slot"),
        ("a", "b", "give one of them"),
        ("a:x", None, "should be like"),
    ],
)
def test_a_wrong_choice_of_hosts_is_refused(include: str | None, exclude: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        chosen({"a": [0, 1], "b": [0, 1, 2]}, include, exclude)


def node(**changed: Any) -> dict[str, Any]:
    facts = {"Python": "3.11", "this code": "ab", "accelerator": "cuda"}
    return {"facts": facts, "settings": ["--x", "1"], "clock": 0.0} | changed


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (node(facts={"Python": "3.12", "this code": "ab"}), ["beta has Python 3.12, alpha has 3.11"]),
        (node(facts={"Python": "3.11", "this code": "cd"}), ["this code: beta", "same commit"]),
        (node(facts=node()["facts"] | {"accelerator": "cpu"}), ["beta would train on cpu, alpha on cuda"]),
        (node(clock=95.4), ["clock of beta is 95 s ahead of that of alpha", "set-ntp"]),
        (node(clock=-40.0), ["40 s behind"]),
    ],
)
def test_a_difference_is_a_line_with_its_remedy(other: dict[str, Any], words: list[str]) -> None:
    (line,) = differences([node(), other], ["alpha", "beta"])
    assert all(word in line for word in words)
    assert differences([node(), node()], ["alpha", "beta"]) == []


def ended(status: int, finished: bool = False, signal: int | None = None) -> dict[str, Any]:
    return {"status": status, "finished": finished, "signal": signal}


@pytest.mark.parametrize(
    ("ends", "code", "again"),
    [
        ([ended(0, True), ended(0)], 0, False),
        ([ended(0, True), None], 0, False),  # its work was done
        ([ended(0), ended(0, True)], 1, True),  # the first one alone knows whether the run has finished
        ([ended(1), ended(247)], 247, True),  # a rank was killed; the other lost contact
        ([ended(247), ended(0)], 247, True),  # the other was ended here
        ([ended(1), None], 1, True),
        ([ended(75), ended(75, signal=2)], 75, False),
        ([ended(1), ended(-9, signal=2)], 130, False),  # Ctrl-C twice
        ([ended(2), ended(0)], 2, False),
    ],
)
def test_the_verdict_is_of_all_machines(ends: list[dict[str, Any] | None], code: int, again: bool) -> None:
    assert verdict(ends) == (code, again)
