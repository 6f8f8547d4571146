"""What the tests share: the recipes found in the tree, and real launches."""

import importlib
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import STEPS

ROOT = Path(__file__).resolve().parents[1]
# For the processes that tests start: they import lib, and the workers in the folders of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "tests", *(ROOT / "tests").iterdir()]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # these tests run on the CPU, with or without a GPU
os.environ["HF_HUB_OFFLINE"] = "1"  # these tests need no network
# A process that a shell runs in the background ignores Ctrl-C, and so would the runs that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, and then a run does too

ALL = "TEST_ALL" in os.environ  # ./launch.sh test --all
CONFIGS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]  # every recipe has these
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
PIPELINES = [
    recipe
    for recipe in RECIPES
    if any("pipeline" in json.loads(path.read_text()) for path in (ROOT / "ds_configs" / recipe).glob("*.json"))
]
SCRIPTS = Path(sys.executable).parent
MEASURED: list[str] = []  # figures that tests found, shown at the end


# Seconds on 2 otherwise idle cores. test_exports.py and test_recipes.py share runs, which the first of them starts.
BUDGETS = {
    "test_exports.py": 360,
    "test_recipes.py": 360,
    "test_launch.py": 180,
    "test_compare.py": 180,
    "test_checkpoints.py": 100,
    "test_generation.py": 40,
    "test_parallel.py": 110,
    "test_pipelines.py": 40,
    "test_machines.py": 180,
    "test_operations.py": 100,
    "test_gpu_check.py": 60,
    "test_slowest.py": 40,
    "test_link.py": 40,
}
BUDGET = 30  # seconds of each other file
SECONDS: dict[str, float] = {}  # {file: seconds of its tests}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = Path(report.location[0]).name
    SECONDS[file] = SECONDS.get(file, 0) + report.duration


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MEASURED:
        terminalreporter.section(f"measured: largest relative difference of a loss over {STEPS} steps")
        for line in MEASURED:
            terminalreporter.line(line)
    terminalreporter.section("seconds of each file")
    for file, seconds in sorted(SECONDS.items(), key=lambda found: -found[1]):
        budget = BUDGETS.get(file, BUDGET)
        warning = "" if ALL or seconds <= budget else f"  WARNING: above its budget of {budget} s"
        terminalreporter.line(f"{seconds:7.1f}  {file}{warning}")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process as the only rank."""
    from lib.distributed import ranks  # here, because it imports deepspeed, which takes seconds

    ranks.init(timeout_minutes=10)
    yield
    torch.distributed.destroy_process_group()
    ranks.cpu_group.cache_clear()


def execute(
    command: list[Any], cwd: Path = ROOT, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, and end the whole group at the timeout."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} took more than {timeout} s\n{out[-2000:]}\n{err[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# Ranks are forked from one process that has imported the large libraries, which takes seconds. DeepSpeed's launcher
# starts each rank as a new process: test_launch.py, test_compare.py and tests/by_hand use it.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(
    ["deepspeed", "transformers", "datasets", "sklearn", "deepspeed.runtime.zero.stage3", "contract_worker"]
)


def _rank(worker: str, arguments: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
    """One rank: `main(*arguments)` of the module `worker`, which prints to the file `log`."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Copies of the descriptors, because a run sends 1 and 2 to its own log.
    sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(2), "w", buffering=1)
    errors = sys.stderr  # kept, because a run replaces sys.stderr too
    from lib.run import cli

    try:
        importlib.import_module(worker).main(*arguments)
    except BaseException:
        traceback.print_exc(file=errors)
        cli.leave(1)
    cli.leave(0)


def run_ranks(world_size: int, worker: str, *arguments: Any, timeout: float = 600) -> str:
    """Run `main(*arguments)` of a module of tests/ on `world_size` ranks of one thread. Returns what rank 0 printed.

    Raises AssertionError with the output of each failed rank.
    """
    with pytest.MonkeyPatch.context() as patch:
        # The ranks share the cores. Also, a process can be forked only before OpenMP has started threads.
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(world_size)]
        group = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        processes = [
            RANKS.Process(
                target=_rank,
                args=(worker, tuple(map(str, arguments)), log, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
            )
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        while any(process.exitcode is None for process in processes):
            failed = any(process.exitcode for process in processes)
            if failed or time.monotonic() > deadline:
                for process in processes:
                    process.join(5 if failed else 0)  # time for the other ranks to notice the failure and print it
                    process.kill()
            multiprocessing.connection.wait(
                [process.sentinel for process in processes if process.exitcode is None], timeout=1
            )
        problems = [
            f"rank {rank}: {log.read_text()[-4000:]}"
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
            if process.exitcode
        ]
        assert not problems, "\n".join(problems)
        return logs[0].read_text()


def deepspeed(world_size: int, script: str | Path, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return execute(
        [
            SCRIPTS / "deepspeed",
            "--quiet",
            "--num_accelerators",
            world_size,
            "--master_port",
            free_port(),
            script,
            *arguments,
        ],
        **options,
    )


def launch(*arguments: Any, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run launch.sh with the Python environment that runs the tests."""
    return execute([cwd / "launch.sh", *arguments], cwd=cwd, PATH=f"{SCRIPTS}:{os.environ['PATH']}", **options)


def read_losses(run: Path) -> list[float]:
    """The losses in a run's metrics.jsonl, one for each optimizer step."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="session")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run for each case of test_recipes.py, <recipe>/<case>-<ranks>, of the chosen recipes.

    A recipe is chosen where one of its tests is.
    """
    from test_recipes import cases_of

    folder = tmp_path_factory.mktemp("contract")
    parameters = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    recipes = sorted({str(test[name]) for test in parameters for name in ("runs", "learned") if name in test})
    cases = [cases_of(recipe, folder) for recipe in recipes]
    for name in ("2", "1", "4", "2, tensor parallel"):  # those on 1 and 4 ranks go on from checkpoints of the first
        chosen = [case for of_recipe in cases for case in of_recipe[name]]
        if chosen:
            run_ranks(int(name[0]), "contract_worker", folder, *chosen, timeout=300 + 30 * len(chosen))
    return folder


@pytest.fixture(scope="session")
def hosts() -> Iterator[Any]:
    """Two hosts, (alpha, beta), for all tests of several machines; where the system cannot have them, these skip."""
    from hosts import missing, two_hosts

    why_not = missing()
    if why_not:
        pytest.skip(why_not)
    with two_hosts() as found:
        yield found


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that both hosts see; each has its own /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
