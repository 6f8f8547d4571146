"""What the tests of several machines share: runs on the two hosts of hosts.py, and what is left of them."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import read_losses, run_ranks
from hosts import Host

Hosts = tuple[Host, Host]
RECIPE = ["causal_lm", "--quick", "--samples", "0", "--log_every", "1"]
STEPS = ["--max_steps", "200"]
SILENCE = 12  # seconds of --rank_timeout


def start(
    hosts: Hosts, *settings: object, recipe: list[str] = RECIPE, port: int = 29500
) -> list[subprocess.Popen[str]]:
    """The command by hand on both machines."""
    return [
        host.start(
            "./launch.sh", *recipe, "--nodes", 2, "--node_rank", number, "--master", f"alpha:{port}", *settings
        )
        for number, host in enumerate(hosts)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen[str]], hosts: Hosts, seconds: float = 150) -> tuple[list[int], list[str]]:
    """(exit codes, what was printed). Nothing may be left on either host."""
    printed = [process.communicate(timeout=seconds)[0] for process in processes]
    assert [host.processes() for host in hosts] == [{}, {}]
    return [process.returncode for process in processes], printed


def wait(what: Callable[[], Any], processes: list[subprocess.Popen[str]], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        ended = [process.communicate()[0] for process in processes if process.poll() is not None]
        assert not ended, "\n".join(ended)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    return len(read_losses(run)) if (run / "metrics.jsonl").exists() else 0


def wait_for(run: Path, steps: int, processes: list[subprocess.Popen[str]]) -> None:
    wait(lambda: steps_of(run) >= steps, processes)


def process_of(host: Host, *words: str) -> int:
    (found,) = host.processes(*words)
    return found


def ranks_on(hosts: Hosts) -> list[dict[int, str]]:
    return [host.processes("--local_rank=") for host in hosts]


def alike(run: Path, other: Path) -> bool:
    ours, theirs = read_losses(run), read_losses(other)
    return len(ours) == len(theirs) and ours == pytest.approx(theirs, rel=1e-5)


def one_machine(ranks: int, run: Path, *settings: str, recipe: list[str] = RECIPE, config: str = "zero2") -> Path:
    run_ranks(
        ranks, "recipe_worker", recipe[0], "--deepspeed_config", f"ds_configs/{recipe[0]}/{config}.json", *recipe[1:],
        *settings, "--run_dir", run,
    )  # fmt: skip
    return run
