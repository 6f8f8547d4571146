"""What the tests share: the recipes found in the tree, and real launches."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # these tests run on the CPU, with or without a GPU
os.environ["HF_HUB_OFFLINE"] = "1"  # and need no network
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes what it runs in the background, and all that this starts, ignore Ctrl-C

CONFIGS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]  # that every recipe has
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
SCRIPTS = Path(sys.executable).parent
MEASURED: list[str] = []  # figures that tests found, shown at the end


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MEASURED:
        terminalreporter.section("measured: largest relative difference of a loss over 20 steps")
        for line in MEASURED:
            terminalreporter.line(line)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process as the only rank."""
    from lib import ranks  # imports deepspeed, which the other tests of a quick run can do without

    ranks.init(timeout_minutes=10)
    yield
    torch.distributed.destroy_process_group()
    ranks._cpu_group.cache_clear()


def execute(command: list[Any], cwd: Path = ROOT, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, and end the whole group at the timeout."""
    process = subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} took more than {timeout} s\n{out[-2000:]}\n{err[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def deepspeed(world_size: int, script: str | Path, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return execute([SCRIPTS / "deepspeed", "--quiet", "--num_accelerators", world_size, "--master_port", port, script, *arguments], **options)


def launch(*arguments: Any, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """launch.sh, with the environment that runs the tests."""
    return execute([cwd / "launch.sh", *arguments], cwd=cwd, PATH=f"{SCRIPTS}:{os.environ['PATH']}", **options)


def read_losses(run: Path) -> list[float]:
    """The losses in a run's metrics.jsonl, one an optimizer step."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]
