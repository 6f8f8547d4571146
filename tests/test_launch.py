"""launch.sh and the plain launcher, as a user calls them: real launches, errors, a copied recipe, what a run leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, deepspeed, execute, launch, read_losses


def test_help_and_dry_run() -> None:
    out = launch("--help").stdout
    assert "text_classification" in out and "causal_lm" in out
    dry = launch("causal_lm", "--stage", "3", "--ranks", "4", "--dry_run", "--max_steps", "3").stdout
    assert dry.splitlines()[-1].split("--quiet ")[1].startswith("--num_accelerators 4 --master_port ")
    assert dry.strip().endswith("recipes/causal_lm.py --deepspeed_config ds_configs/causal_lm/zero3.json --max_steps 3")
    assert "ds_configs/causal_lm/zero3_offload.json" in launch("causal_lm", "--ds_config", "zero3_offload", "--dry_run").stdout


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "did you mean"]),
        (["--batch_size", "15"], ["15", "nearest: 14 and 16"]),
        (["--precision", "fp16"], ["fp16", "cpu"]),
        (["--dataset", "nowhere.csv"], ["nowhere.csv", "no such file"]),
        (["--model", "nobody/nothing"], ["nobody/nothing", "hub"]),
        (["--max_length", "4096"], ["4096", "512"]),
        (["--learning_rate", "1e30", "--log_every", "20"], ["the loss is nan at step", "metrics.jsonl"]),
    ],
)
def test_a_mistake_in_the_settings_ends_all_ranks_with_one_line(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    started = time.monotonic()
    done = launch("text_classification", "--quick", "--run_dir", tmp_path / "run", *arguments)
    assert done.returncode != 0
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in errors[0]
    assert time.monotonic() - started < 90  # of which most is importing, twice, on a busy machine


@pytest.mark.slow
def test_the_plain_launcher_trains_and_leaves_nothing_behind(tmp_path: Path) -> None:
    shared_memory = set(Path("/dev/shm").iterdir())
    arguments = ["--deepspeed_config", "ds_configs/text_classification/zero3.json", "--quick", "--run_dir", tmp_path / "run"]
    done = deepspeed(2, "recipes/text_classification.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "macro_f1" in done.stdout and "majority class" in done.stdout
    assert len((done.stdout + done.stderr).splitlines()) <= 40
    assert len(read_losses(tmp_path / "run")) == 20
    assert set(Path("/dev/shm").iterdir()) <= shared_memory
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in command_lines())
    again = deepspeed(2, "recipes/text_classification.py", *arguments)
    assert again.returncode != 0 and "exists already" in again.stderr
    assert len(read_losses(tmp_path / "run")) == 20  # nothing was overwritten


def command_lines() -> list[Path]:
    own = {os.getpid(), os.getppid()}
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if int(path.parent.name) not in own and readable(path)]


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:  # it has ended
        return False
    return True


@pytest.mark.slow
def test_sigterm_to_launch_sh_ends_every_rank(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    command = [str(ROOT / "launch.sh"), "causal_lm", "--quick", "--max_steps", "100000", "--run_dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in command_lines())


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
    collected = execute([sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=", "-q", "tests/test_recipes.py"], cwd=tree)
    assert "[mine-zero3]" in collected.stdout
