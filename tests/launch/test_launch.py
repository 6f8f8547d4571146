"""launch.sh and the plain launcher, as a user calls them: real launches, errors, a copied recipe, clean ends."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, deepspeed, execute, launch, read_losses, run_ranks


def test_help_and_dry_run() -> None:
    out = launch("--help").stdout
    assert "text_classification" in out and "causal_lm" in out
    dry = launch("causal_lm", "--stage", "3", "--ranks", "4", "--dry_run", "--max_steps", "3").stdout
    assert "deepspeed --log_level critical --master_port " in dry
    command = (
        "--num_accelerators 4 recipes/causal_lm.py --deepspeed_config ds_configs/causal_lm/zero3.json"
        " --max_steps 3 --run_dir runs/causal_lm-zero3-"
    )
    assert command in dry.splitlines()[-1]
    assert (
        "ds_configs/causal_lm/zero3_offload.json"
        in launch("causal_lm", "--ds_config", "zero3_offload", "--dry_run").stdout
    )
    # A recipe without stage 2 begins at 1.
    assert "ds_configs/pipeline_lm/zero1.json" in launch("pipeline_lm", "--dry_run").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["causal"], ["recipes/causal.py", "causal_lm"]),
        (["causal_lm", "--stage", "4"], ["--stage is 4"]),
        (["causal_lm", "--stage"], ["--stage needs a value"]),
        (["causal_lm", "--stage", "2", "--ds_config", "zero3"], ["--stage 2", "--ds_config zero3"]),
        (["causal_lm", "--ds_config", "zero9"], ["zero9", "zero3.json"]),
        (["causal_lm", "--ranks", "two"], ["--ranks is two"]),
        (["--stage", "2"], ["recipe comes first"]),
    ],
)
def test_a_mistake_in_the_launch_is_refused(arguments: list[str], words: list[str]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.skipif(not shutil.which("flock"), reason="there is no flock command")
def test_the_environment_is_made_once(tmp_path: Path) -> None:
    """All nodes of a job start at once in a checkout that they share: one installs, the others wait, and find it."""
    for part in ("launch.sh", "requirements.txt", "requirements-no-deps.txt", "lib", "recipes", "ds_configs"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    for name in ("bare", "made"):
        venv.create(tmp_path / name, symlinks=True)
    (packages,) = (tmp_path / "made").glob("lib/python*/site-packages")
    (packages / "required.pth").write_text(sysconfig.get_path("purelib"))
    environment = {"PATH": f"{tmp_path / 'bare' / 'bin'}:{os.environ['PATH']}", "PIP_NO_INDEX": "yes"}
    command = [str(tmp_path / "launch.sh"), "causal_lm", "--help"]
    with (tmp_path / ".venv.lock").open("w") as lock, (tmp_path / "said").open("w+") as said:
        fcntl.flock(lock, fcntl.LOCK_EX)
        nodes = [subprocess.Popen(command, env=os.environ | environment, stdout=said) for _ in range(2)]
        deadline = time.monotonic() + 60
        while (tmp_path / "said").read_text().count("Waiting until another launch.sh") < len(nodes):
            assert time.monotonic() < deadline and not any(node.poll() for node in nodes)
            time.sleep(0.05)
        (tmp_path / "made").rename(tmp_path / ".venv")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert [node.wait(60) for node in nodes] == [0, 0]
    printed = (tmp_path / "said").read_text()
    assert printed.count("--learning_rate") >= 2 and "Installing" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "did you mean"]),  # every rank finds this mistake
        (["--dataset", "nowhere.csv"], ["nowhere.csv", "no such file"]),  # rank 0 finds this one and tells the others
        (["--learning_rate", "1e30", "--log_every", "20"], ["the loss is nan at step", "--not_finite skip"]),
    ],
)
def test_a_mistake_in_the_settings_ends_all_ranks_with_one_line(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    started = time.monotonic()
    done = launch("text_classification", "--quick", "--run_dir", tmp_path / "run", *arguments)
    assert done.returncode != 0
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in errors[0]
    assert time.monotonic() - started < 90  # seconds; most of them are two processes' imports on a busy machine


@pytest.mark.slow
def test_results_are_a_table_of_runs_that_are_not_run_twice() -> None:
    """The runs are in runs/results-quick of this checkout."""
    shutil.rmtree(ROOT / "runs" / "results-quick" / "recurrent_lm", ignore_errors=True)
    first = launch("results", "recurrent_lm", "--quick")
    assert first.returncode == 0 and "step 20/20" in first.stdout, first.stderr
    result = json.loads((ROOT / "runs" / "results-quick" / "recurrent_lm" / "result.json").read_text())
    scores, unigram = result["scores"].values()
    (row,) = [line for line in first.stdout.splitlines() if line.startswith("| [`recurrent_lm`]")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:6] == ["sotu", "perplexity", f"{scores['perplexity']:.3g}", f"unigram {unigram['perplexity']:.3g}"]
    second = launch("results", "recurrent_lm", "--quick")
    assert "has finished already" in second.stdout + second.stderr and row in second.stdout
    assert "did you mean 'recurrent_lm'" in launch("results", "recurent_lm").stderr
    assert "leave one of them out" in launch("results", "--quick", "--readme").stderr


@pytest.mark.slow
def test_the_plain_launcher_trains_and_leaves_nothing_behind(tmp_path: Path) -> None:
    shared_memory = set(Path("/dev/shm").glob("deepspeed*"))  # other programs' files may be there already
    arguments = [
        "--deepspeed_config",
        "ds_configs/text_classification/zero3.json",
        "--quick",
        "--run_dir",
        tmp_path / "run",
    ]
    done = deepspeed(2, "recipes/text_classification.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "macro_f1" in done.stdout and "majority class" in done.stdout
    assert len((done.stdout + done.stderr).splitlines()) <= 40
    assert len(read_losses(tmp_path / "run")) == 20
    assert set(Path("/dev/shm").glob("deepspeed*")) <= shared_memory
    assert not processes_of(tmp_path)


def command_lines() -> dict[int, bytes]:
    """Process id -> command line, of all processes but this one and its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            found[int(path.parent.name)] = path.read_bytes()
    return {process: line for process, line in found.items() if process not in (os.getpid(), os.getppid())}


def processes_of(run_dir: Path, *words: str) -> list[int]:
    """The ids of a run's processes whose command lines have these words."""
    return [
        process
        for process, line in command_lines().items()
        if all(word.encode() in line for word in (str(run_dir), *words))
    ]


LONG = ["causal_lm", "--quick", "--max_steps", 200, "--log_every", 1, "--samples", 0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed run of LONG."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_ranks(
        2,
        "recipe_worker",
        LONG[0],
        "--deepspeed_config",
        "ds_configs/causal_lm/zero2.json",
        *LONG[1:],
        "--run_dir",
        run,
    )
    return run


def start(run_dir: Path, *settings: object, steps: int) -> subprocess.Popen[str]:
    """Start LONG and return when it has done `steps` steps."""
    environment = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    command = [str(part) for part in (ROOT / "launch.sh", *LONG, "--run_dir", run_dir, *settings)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(read_losses(run_dir)) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def end(process: subprocess.Popen[str], run_dir: Path, seconds: float = 120) -> str:
    """Wait for the process to end. Returns what it printed. It must leave no process behind."""
    output, _ = process.communicate(timeout=seconds)
    assert not processes_of(run_dir)
    return output


def same_result(run_dir: Path, expected: Path) -> bool:
    weights = [
        [file.read_bytes() for file in sorted((run / "model").glob("*.safetensors"))] for run in (run_dir, expected)
    ]
    return bool(weights[0]) and weights[0] == weights[1] and read_losses(run_dir) == read_losses(expected)


@pytest.mark.slow
def test_what_is_stopped_is_saved_and_goes_on_as_if_nothing_had_been(tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    limited = launch(*LONG, "--run_dir", run, "--resume", "--time_limit", 0.01)
    assert (
        limited.returncode == 75
        and "stopped by the time limit after step" in limited.stderr
        and "there is no checkpoint" in limited.stdout
    )
    for numbers, to_all in (([signal.SIGINT], False), ([signal.SIGUSR1, signal.SIGTERM], True)):
        process = start(run, "--resume", steps=len(read_losses(run)) + 30)
        # Slurm signals all processes of a job at once.
        for number, reached in itertools.product(numbers, processes_of(run) if to_all else [process.pid]):
            os.kill(reached, number)
        output = end(process, run)
        assert (
            process.returncode == 75
            and f"saved; --run_dir {run} --resume goes on" in output
            and "Traceback" not in output
        )
        assert "resume   after step" in output
    assert launch(*LONG, "--run_dir", run, "--resume").returncode == 0
    assert same_result(run, uninterrupted)


@pytest.mark.slow
def test_a_killed_rank_is_restarted(tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "--restarts", 2, "--save_every", 10, steps=25)
    (rank_1,) = processes_of(run, "--local_rank=1")
    os.kill(rank_1, signal.SIGKILL)
    output = end(process, run)
    assert process.returncode == 0 and "restart  exit code" in output and "lost contact with another rank" in output
    assert "Traceback" not in output
    assert same_result(run, uninterrupted)


@pytest.mark.slow
def test_a_killed_launcher_is_no_success_and_leaves_no_rank(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "--max_steps", 100000, "--save_every", 10, steps=15)
    (launcher,) = processes_of(run, "lib.launch.start_ranks")
    os.kill(launcher, signal.SIGKILL)
    output = end(process, run)
    assert process.returncode not in (0, 2, 75) and "--resume goes on" in output


@pytest.mark.slow
def test_a_silent_rank_ends_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "--max_steps", 100000, "--rank_timeout", 0.1, "--stage", 3, steps=5)
    (rank_1,) = processes_of(run, "--local_rank=1")
    os.kill(rank_1, signal.SIGSTOP)
    stopped_at = time.monotonic()
    output = end(process, run)
    assert time.monotonic() - stopped_at < 6 + 60
    assert (
        process.returncode == 1
        and "rank 0 lost contact with another rank (Timed out)" in output
        and "Traceback" not in output
    )


@pytest.mark.slow
def test_a_copy_is_a_recipe(tmp_path: Path) -> None:
    """Copying three things is all it takes: launch.sh runs the copy, and the tests find it."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*_cache"))
    shutil.copy(tree / "recipes" / "causal_lm.py", tree / "recipes" / "mine.py")
    shutil.copy(tree / "recipes" / "causal_lm.yaml", tree / "recipes" / "mine.yaml")
    shutil.copytree(tree / "ds_configs" / "causal_lm", tree / "ds_configs" / "mine")
    done = launch("mine", "--quick", "--run_dir", tmp_path / "run", "--monitor", "tensorboard", cwd=tree)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["unigram"]["perplexity"] > 1
    assert list((tmp_path / "run" / "tensorboard").glob("*"))
    assert (tmp_path / "run" / "samples.txt").read_text().startswith("The state of our Union")
    collected = execute(
        [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=", "-q", "tests/contract/test_recipes.py"],
        cwd=tree,
    )
    assert "test_every_stage_trains_as_plain_torch_does[mine]" in collected.stdout
