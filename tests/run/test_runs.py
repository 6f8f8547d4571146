"""What a run must survive: a console that is gone, an overwrite that fails, clocks, file systems, hostile checkpoints;
and what launches it.

A run here has a model of a few weights and a plain optimizer in the place of DeepSpeed's engine, and takes
milliseconds.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import gc
import importlib
import json
import locale
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from datasets import Dataset
from safetensors.torch import load_file, save_file

from lib import errors
from lib.compare import compare, report
from lib.compare.results import Results
from lib.distributed import ranks, waits
from lib.distributed.export import export
from lib.errors import Stopped, UserError
from lib.launch import supervise
from lib.run import checkpoint_files, checkpoint_writing, cli, console
from lib.run import folder as folder_module
from lib.run.checkpoint_files import folder_of
from lib.run.checkpoint_writing import WrittenBeside
from lib.run.console import Console
from lib.run.folder import check_ranks_agree
from lib.run.run import Run
from lib.run.step_end import SIGNALS
from lib.settings import config as settings

RECIPE = "recipes/recurrent_lm.py"
ROWS = Dataset.from_dict({"number": range(100)})
DS_CONFIG = {"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


@pytest.fixture
def run_signals() -> Iterator[None]:
    """Leave this process's handlers of signals as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


pytestmark = pytest.mark.usefixtures("one_rank", "run_signals")


def settings_of(folder: Path, **changes: Any) -> Any:
    recipe = importlib.import_module("recipes.recurrent_lm")
    short = {"max_steps": "6", "log_every": "4", "eval_every": "null", "save_minutes": "null", "batch_size": "1"}
    return settings.load(
        recipe.Config,
        ROOT / "recipes" / "recurrent_lm.yaml",
        {"run_dir": str(folder), **short, **{k: str(v) for k, v in changes.items()}},
    )


class Training:
    """The parts of a recipe's main() up to the loop, and its loop."""

    def __init__(self, folder: Path, rows: int = 100, **changes: Any):
        self.cfg = settings_of(folder, **changes)
        self.run = Run(self.cfg, json.loads(json.dumps(DS_CONFIG)), RECIPE)
        self.run.plan(Dataset.from_dict({"number": range(rows)}))
        torch.manual_seed(0)
        module: Any = torch.nn.Linear(4, 3)
        module.config = {}
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        self.engine: Any = SimpleNamespace(
            module=module, optimizer=optimizer, basic_optimizer=optimizer, lr_scheduler=schedule, config=DS_CONFIG,
            was_step_applied=lambda: True, gradient_accumulation_steps=lambda: 1, get_global_grad_norm=lambda: None,
            monitor=SimpleNamespace(enabled=False), zero_optimization=lambda: True,
        )  # fmt: skip
        self.run.attach(self.engine, {"train": rows})
        self.checkpoints = self.run.checkpoints

    def begin(self) -> int:
        """What the loop does before its first step. Returns the number of steps done before."""
        self.run._begin()
        return self.run.resumed_at

    def steps(self) -> Iterator[int]:
        for step, _ in self.run.steps(ROWS, lambda rows: {}):
            yield step

    def train(
        self,
        in_step: Callable[[int], Any] = lambda _: None,
        evaluate: Callable[[int], float] = lambda step: float(step),
    ) -> None:
        for step in self.steps():
            loss = self.engine.module(torch.ones(4)).square().sum()
            loss.backward()
            self.engine.optimizer.step()
            self.engine.optimizer.zero_grad()
            self.engine.lr_scheduler.step()
            in_step(step)
            self.run.log_step(step, loss.detach(), torch.tensor(1))
            if self.run.evaluation_due(step):
                self.run.log_scores(step, "validation", {"score": evaluate(step)}, higher_is_better="score")

    def finish(self) -> None:
        self.run.finish({"score": 1.0}, "1 test row", {})


def trained(folder: Path, **changes: Any) -> Path:
    training = Training(folder, **changes)
    training.train()
    training.finish()
    return folder


def let_go() -> None:
    """Free the run folder of a run that was refused, as the end of its process does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    gc.collect()


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


# --- clocks ---------------------------------------------------------------------------------------


class Clock:
    """Takes the place of the module time where a run measures itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr("lib.run.run.time", self)
        monkeypatch.setattr("lib.run.metrics.time", self)

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def time(self) -> float:
        return 1e9 - self.now  # somebody sets the machine's clock back

    def takes(self, seconds: float, do: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            self.now += seconds
            return do(*arguments)

        return slow


@pytest.mark.parametrize("fails", [False, True])
def test_only_steps_count_as_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fails: bool
) -> None:
    """A step takes 1 s here, all else 1000: evaluations and saves that are not at a step that is logged, failed saves,
    a slow disk, slow deletion.
    """
    clock = Clock(monkeypatch)
    finish = (lambda _: "it is full") if fails else WrittenBeside.finish
    monkeypatch.setattr("lib.run.checkpoints.WrittenBeside", clock.takes(1000, WrittenBeside))
    monkeypatch.setattr(WrittenBeside, "finish", clock.takes(1000, finish))
    monkeypatch.setattr(checkpoint_files, "remove", clock.takes(1000, checkpoint_files.remove))
    training = Training(tmp_path / "run", max_steps=20, eval_every=3, save_every=5, log_every=4)
    training.train(clock.takes(1, lambda step: None), clock.takes(1000, lambda step: 1.0))
    assert [entry["step_seconds"] for entry in entries_of(tmp_path / "run") if "loss" in entry] == [1.0] * 20
    assert training.run.metrics.step_seconds == 20
    training.finish()
    seen = [line for line in capfd.readouterr().out.splitlines() if " left" in line]
    assert len(seen) >= 5
    for line in seen:
        step = int(line.split()[1].split("/")[0])
        assert f"1 tokens/s  0:{20 - step:02d} left" in line


def test_what_follows_an_evaluation_counts_as_no_step_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that a recipe generates where an evaluation is due, say, whether or not it logs scores."""
    clock = Clock(monkeypatch)
    training = Training(tmp_path / "run", max_steps=6, eval_every=2, log_every=3)
    for step in training.steps():
        clock.now += 1
        training.run.log_step(step, torch.tensor(1.0), torch.tensor(1))
        if training.run.evaluation_due(step):
            clock.now += 1000
    assert [entry["step_seconds"] for entry in entries_of(tmp_path / "run")] == [1.0] * 6
    training.run.close()


def test_waits_are_kept_of_steps_alone(tmp_path: Path) -> None:
    """A long evaluation or generation at stage 3 may have a million collectives, and nothing asks for their waits."""

    def is_kept() -> bool:
        ranks.all_sum(torch.zeros(1))
        return waits.take() > 0

    training = Training(tmp_path / "run", max_steps=4, eval_every=2, save_every=1, log_every=100)
    assert not is_kept()
    for step in training.steps():
        assert is_kept()
        training.run.log_step(step, torch.tensor(1.0), torch.tensor(1))
        if training.run.evaluation_due(step):
            assert not is_kept()
            training.run.log_scores(step, "validation", {"score": 1.0})
            assert not is_kept()
    assert not is_kept()
    training.run.log_scores(4, "test", {"score": 1.0})
    assert not is_kept()
    training.run.close()


def test_seconds_and_the_time_limit_do_not_go_by_the_wall_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    training = Training(tmp_path / "run", time_limit=1)
    clock.now += 50
    assert training.run.metrics.seconds() == 50
    monkeypatch.setattr("lib.run.checkpoints.time", clock)
    with pytest.raises(Stopped, match="stopped by the time limit after step 2/6: saved"):
        training.train(clock.takes(5, lambda step: None))


# --- a run that overwrites another ----------------------------------------------------------------


def test_an_overwrite_that_does_not_begin_leaves_the_old_run(tmp_path: Path) -> None:
    old = contents(trained(tmp_path / "run", save_every=3))
    # It has its data, model and engine, and ends before the first step.
    training = Training(tmp_path / "run", overwrite=True, max_steps=4)
    print("what a library says")
    assert contents(tmp_path / "run") == old
    training.run.close()
    again = settings_of(tmp_path / "run", overwrite=True, dataset="typo.csv")
    Run(again, json.loads(json.dumps(DS_CONFIG)), RECIPE).close()
    assert contents(tmp_path / "run") == old
    with pytest.raises(UserError, match="exists already"):
        Training(tmp_path / "run")


def test_an_overwrite_that_begins_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    trained(run, save_every=3)
    for folder in (run / "model" / "inner", run / "tensorboard", elsewhere):
        folder.mkdir(parents=True)
        (folder / "old").touch()
    (run / "link").symlink_to(elsewhere)
    (run / "model" / "link").symlink_to(elsewhere)
    (run / "tensorboard" / "latest").symlink_to("old")
    training = Training(run, overwrite=True, max_steps=2, log_every=1)
    print("of the new run")
    (run / "tensorboard" / "new").touch()  # a monitor's, made with the engine
    (run / "tensorboard" / "latest").unlink()
    (run / "tensorboard" / "latest").symlink_to("new")
    training.train()
    training.finish()
    assert set(contents(run)) == {
        "config.yaml",
        "ds_config.json",
        "versions.json",
        "metrics.jsonl",
        "result.json",
        "log.txt",
        "model_form/config.json",
        "model_form/plan.json",
        "tensorboard/new",
        "tensorboard/latest",
    }
    assert (elsewhere / "old").exists() and not (run / "link").is_symlink() and not (run / "model").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 2 and len(entries_of(run)) == 2
    assert (run / "log.txt").read_text() == "of the new run\n"


def test_what_was_before_training_is_computed_once(tmp_path: Path) -> None:
    def kept(training: Training, name: str, value: Any) -> Any:
        return training.run.kept(name, lambda: value)

    first = Training(tmp_path / "run", save_every=2, max_steps=2)
    assert kept(first, "scores on 3 rows", {"loss": 0.1}) == {"loss": 0.1}
    first.train()
    first.run.close()
    again = Training(tmp_path / "run", resume=True, max_steps=4)
    assert kept(again, "scores on 3 rows", {"loss": 9.0}) == {"loss": 0.1}
    assert kept(again, "scores on 4 rows", {"loss": 8.0}) == {"loss": 8.0}
    again.train()
    again.run.close()
    anew = Training(tmp_path / "run", overwrite=True)
    assert kept(anew, "scores on 3 rows", {"loss": 7.0}) == {"loss": 7.0}
    anew.run.close()


def test_a_run_goes_on_beside_the_same_frozen_weights_only(tmp_path: Path) -> None:
    def training(changed: float, **settings: Any) -> Training:
        """With weights that no checkpoint holds."""
        made = Training(tmp_path / "run", **settings)
        made.engine.module.base = torch.nn.Parameter(torch.tensor([1.0, changed]), requires_grad=False)
        return made

    first = training(2.0, save_every=2, max_steps=2)
    first.train()
    first.run.close()
    other = training(2.5, resume=True, max_steps=4)
    with pytest.raises(UserError, match="was trained beside other frozen weights than the model has now"):
        other.begin()
    other.run.close()
    assert training(2.0, resume=True, max_steps=4).begin() == 2


def test_room_that_the_old_run_takes_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(bytes(1000))
    # A checkpoint of these weights takes 180 bytes.
    monkeypatch.setattr("lib.run.checkpoints.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    Training(tmp_path / "run", overwrite=True, save_every=3).run.close()
    with pytest.raises(UserError, match="a checkpoint takes about"):
        Training(tmp_path / "other", save_every=3)


@pytest.mark.parametrize("began", [False, True])
def test_a_restart_resumes_only_what_began(tmp_path: Path, began: bool) -> None:
    """Else --overwrite --restarts would go on with the old run, and call it finished."""
    run = trained(tmp_path / "run")
    recipe = tmp_path / "recipe.py"
    begin = (
        f"shutil.copy('{run}/config.yaml', '{run}/new'); os.replace('{run}/new', '{run}/config.yaml')"
        if began
        else "pass"
    )
    recipe.write_text(
        f"import os, shutil, sys\nprint(*sys.argv[1:], file=open('{tmp_path}/said', 'a'))\n{begin}\nsys.exit(1)\n"
    )
    status = supervise.run_until_it_ends(
        "deepspeed", ["--num_accelerators", "1", str(recipe), "--overwrite", "--run_dir", str(run)], str(run), 1, False
    )
    first, second = (tmp_path / "said").read_text().splitlines()
    assert status == 1 and first.endswith(f"--overwrite --run_dir {run}")
    assert second.endswith("--resume true --overwrite false" if began else f"--overwrite --run_dir {run}")


# --- a console that is gone -----------------------------------------------------------------------


@contextlib.contextmanager
def lost_console(kind: str) -> Iterator[Callable[[], None]]:
    """Descriptors 1 and 2 of this process are one that, from the call of what this yields on, takes no more writing."""
    kept = os.dup(1), os.dup(2)
    reader, writer = (
        os.openpty()
        if kind == "terminal"
        else os.pipe()
        if kind == "pipe"
        else (os.open("/dev/null", os.O_RDONLY), os.open("/dev/full", os.O_WRONLY))
    )
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    os.close(writer)
    try:
        yield lambda: os.close(reader)
    finally:
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


@pytest.mark.parametrize("kind", ["terminal", "pipe", "full disk"])
def test_a_run_goes_on_without_its_console(tmp_path: Path, kind: str) -> None:
    with lost_console(kind) as lose:
        training = Training(tmp_path / "run", save_every=2, eval_every=2, log_every=1)
        training.train(lambda step: lose() if step == 1 else None)
        training.finish()
    assert len([entry for entry in entries_of(tmp_path / "run") if "loss" in entry]) == 6
    assert json.loads((tmp_path / "run" / "result.json").read_text())["finished"]


@pytest.mark.parametrize("kind", ["terminal", "pipe", "full disk"])
def test_a_run_that_is_asked_to_stop_as_its_terminal_closes_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And says so by its exit code, through the recipes' own way out."""
    codes: list[int] = []
    monkeypatch.setattr(cli, "leave", codes.append)
    monkeypatch.setattr(cli, "parse", lambda *_: (None, None))
    monkeypatch.setattr("lib.run.cli.load_ds_config", lambda *_: None)

    def close(lose: Callable[[], None], step: int) -> None:
        if step == 3:
            lose()
            os.kill(os.getpid(), signal.SIGHUP)

    with lost_console(kind) as lose:

        def main(*_: Any) -> None:
            Training(tmp_path / "run", log_every=1).train(lambda step: close(lose, step))

        cli.cli(main, object)
    assert codes[0] == errors.STOPPED
    assert [folder.name for folder, _ in checkpoint_files.list_complete(tmp_path / "run" / "checkpoints")] == [
        folder_of(3)
    ]
    assert ranks.asked_to_stop.is_set()


def test_under_nohup_a_terminal_that_closes_stops_nothing(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    training = Training(tmp_path / "run")
    training.train(lambda step: os.kill(os.getpid(), signal.SIGHUP))
    training.finish()


@pytest.mark.parametrize("asked", [False, True])
def test_a_rank_whose_launcher_is_gone_still_saves_where_it_was_asked_to_stop(
    monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """With the plain launcher, Ctrl-C and a terminal that closes end the launcher at once."""
    slept, codes = list[float](), list[int]()
    asked_to_stop = threading.Event()
    monkeypatch.setattr(ranks, "asked_to_stop", asked_to_stop)
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(ranks, "_timeout_seconds", [77.0])
    monkeypatch.setattr("lib.distributed.ranks.time.sleep", slept.append)
    monkeypatch.setattr("lib.distributed.ranks.os._exit", codes.append)
    monkeypatch.setenv("SUPERVISED_BY", str(2**31 - 1))  # it has gone
    if asked:
        asked_to_stop.set()
    ranks._leave_with_the_launcher()
    assert (77.0 in slept) == asked and codes == [1]  # other threads sleep too


def test_the_supervisor_survives_its_console(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"import sys\nprint('launched', file=open('{tmp_path}/said', 'a'))\nsys.exit(7)\n")
    launcher = ["deepspeed", "--num_accelerators", "1", str(recipe), "--run_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "lib.launch.supervise", "x-zero2", "x.yaml", "2", "", "--", *launcher]
    with Path("/dev/full").open("w") as full:
        at_once = os.environ | {"PYTHONUNBUFFERED": "1"}
        assert subprocess.run(command, stdout=full, stderr=full, env=at_once, check=False).returncode == 7
    assert (tmp_path / "said").read_text() == "launched\n" * 3


def test_a_log_and_a_monitor_without_room_do_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", closefd=False))  # as where pytest captures nothing

    def no_room(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    training = Training(tmp_path / "run", log_every=1)
    training.run.metrics.monitor = SimpleNamespace(write_events=no_room)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    training.train(lambda step: print("said by a library", flush=True))
    training.finish()
    os.close(full)
    assert "the monitor misses events until step 6: No space left on device" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("of_locale", "seen"),
    [("ISO-8859-1", b"\xfc ??\n"), ("UTF-8", "ü 日本\n".encode()), ("ANSI_X3.4-1968", "ü 日本\n".encode())],
)
def test_signs_that_the_console_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, of_locale: str, seen: bytes
) -> None:
    monkeypatch.setattr(locale, "getencoding", lambda: of_locale)
    reader, writer = os.pipe()
    print("ü 日本", file=Console(writer), flush=True)
    os.close(writer)
    assert os.read(reader, 100) == seen
    os.close(reader)
    assert console.Console(1).write("a\udcff") == 2  # as of a path that is no text


# --- ranks ----------------------------------------------------------------------------------------


class Other:
    """Another rank, busy for so many rounds of what ranks tell each other; this one is rank 1 of 2, or rank 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, busy: int):
        self.busy, self.told = busy, list[float]()
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        monkeypatch.setattr(ranks, "largest", self.largest)
        monkeypatch.setattr(ranks, "_timeout_seconds", [0.2])
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_, **__: None)
        monkeypatch.setattr(ranks, "first_problem", lambda problem: problem)

    def largest(self, values: list[float]) -> list[float]:
        self.told.append(values[0])
        self.busy -= 1
        return [max(values[0], float(self.busy > 0))]


def test_ranks_that_work_tell_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Other(monkeypatch, rank=1, busy=2)
    assert ranks.rank0_first(lambda: time.sleep(0.3) or "mine")() == "mine"  # type: ignore[func-returns-value]
    assert other.told[:2] == [0, 0], "this one waits for rank 0"
    assert sum(other.told[2:]) >= 2 and other.told[-1] == 0, "then rank 0 waits for this one"


def test_an_export_tells_the_others_that_it_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Other(monkeypatch, rank=0, busy=0)
    module: Any = torch.nn.Linear(2, 2)
    module.config = {}
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda _: time.sleep(0.3))
    engine: Any = SimpleNamespace(module=module, config=DS_CONFIG)
    monkeypatch.setattr(ranks, "gather_on_rank0", lambda value: [value])
    export(engine, tokenizer, tmp_path / "model")
    assert sum(other.told) >= 2 and load_file(tmp_path / "model" / "model.safetensors")["weight"].shape == (2, 2)


def test_a_rank_that_is_lost_meanwhile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Other(monkeypatch, rank=1, busy=0)

    def lost(_: list[float]) -> list[float]:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ranks, "largest", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        ranks.together(lambda: None)


def test_every_rank_has_the_same_settings(tmp_path: Path) -> None:
    run = Run(settings_of(tmp_path / "run"), json.loads(json.dumps(DS_CONFIG)), RECIPE)
    token = (tmp_path / "run" / ".lock").read_text()
    facts = run._run_folder._facts()
    check_ranks_agree(run.folder, token, facts, facts)
    with pytest.raises(UserError, match=r"rank 0: max_steps is 6, on rank 0 7; all machines need the same"):
        check_ranks_agree(run.folder, token, facts, facts | {"max_steps": 7})
    with pytest.raises(UserError, match="must be on a disk that all machines share"):
        check_ranks_agree(run.folder, "other", facts, facts)
    run.close()


@pytest.mark.parametrize(("own", "of_rank_0"), [(5.0, False), (-5.0, True)])
def test_rank_0_decides_which_checkpoint_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: float, of_rank_0: bool
) -> None:
    """A rank whose score differs in the last digit would save alone, and wait for ever."""
    training = Training(tmp_path / "run", keep_best=True, eval_every=1)
    saved, told = list[int](), list[list[float]]()

    def save(step: int) -> None:
        saved.append(step)

    def largest(values: list[float]) -> list[float]:
        told.append(values)
        return [0.0, 0.0, float(of_rank_0), 0.0]

    monkeypatch.setattr(training.checkpoints, "save", save)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "largest", largest)
    training.checkpoints._best_score = 0.0
    training.checkpoints.note_score(1, own)
    training.run._end_step(1, [])
    assert saved == [1] * of_rank_0 and told == [[0.0, 0.0, 0.0, 0.0]]
    monkeypatch.undo()
    training.run.close()


# --- checkpoints ----------------------------------------------------------------------------------


class SlowDisk:
    """Nothing is written before it is `free`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.free = threading.Event()
        real = checkpoint_writing.write_safetensors

        def write(file: Path, tensors: Any) -> tuple[int, str]:
            assert self.free.wait(60)
            return real(file, tensors)

        monkeypatch.setattr(checkpoint_writing, "write_safetensors", write)


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    training = Training(tmp_path / "run", max_steps=8, save_every=2, keep_checkpoints=9)
    weights: dict[int, torch.Tensor] = {}
    seen: dict[int, list[str]] = {}

    def in_step(step: int) -> None:
        weights[step] = training.engine.module.weight.detach().clone().reshape(-1)
        seen[step] = sorted(path.name for path in training.checkpoints.folder.iterdir()) if step > 2 else []
        if step == 4:  # the next save waits for this one
            disk.free.set()

    training.train(in_step)
    assert seen[3] == seen[4] == [f".writing-{folder_of(2)}"]
    folders = sorted(path.name for path in training.checkpoints.folder.iterdir())
    assert folders == [folder_of(step) for step in (2, 4, 6, 8)]
    for step in (2, 4, 6, 8):
        file = training.checkpoints.folder / folder_of(step) / "rank-00000-of-00001.safetensors"
        assert torch.equal(load_file(file)["fp32/weight@0"], weights[step])
    training.run.close()


def test_without_memory_for_a_copy_training_waits_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    disk = SlowDisk(monkeypatch)
    threading.Timer(1, disk.free.set).start()
    training = Training(tmp_path / "run", max_steps=2, save_every=1)
    busy: list[bool] = []
    training.train(lambda step: busy.append(training.checkpoints.is_writing()))
    assert busy == [False, False]
    training.run.close()


def test_an_error_while_a_checkpoint_is_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: Path, tensors: Any) -> tuple[int, str]:
        raise ZeroDivisionError("a fault of this project")

    monkeypatch.setattr(checkpoint_writing, "write_safetensors", fails)
    training = Training(tmp_path / "run", save_every=2)
    with pytest.raises(ZeroDivisionError, match="a fault of this project"):
        training.train()
    assert not list(training.checkpoints.folder.glob("step-*"))
    training.run.close()


def test_saving_too_often_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run_of(name: str, pause: float) -> list[str]:
        clock = Clock(monkeypatch)
        monkeypatch.setattr("lib.run.checkpoints.time", clock)
        monkeypatch.setattr("lib.run.checkpoints.WrittenBeside", clock.takes(pause, WrittenBeside))
        training = Training(tmp_path / name, max_steps=12, save_every=3)
        training.train(clock.takes(10, lambda step: None))
        training.run.close()
        return [line for line in capfd.readouterr().out.splitlines() if "note: training has waited" in line]

    assert run_of("seldom", 1.4) == []
    assert run_of("often", 2.0) == [
        "note: training has waited for checkpoints 6% of its time; save less often (--save_every, --save_minutes)"
    ]


def test_the_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{dtype}-{'x'.join(map(str, shape))}": (100 * torch.rand(shape)).to(dtype)
        for dtype in checkpoint_writing.DTYPES
        for shape in ((), (0,), (3,), (5, 7))
    }
    tensors["not contiguous"] = torch.rand(4, 6).T
    file = tmp_path / "file.safetensors"
    size, checksum = checkpoint_writing.write_safetensors(file, tensors)
    assert (size, checksum) == (file.stat().st_size, checkpoint_files._checksum_of_file(file))
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_checkpoint_that_cannot_be_deleted_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rename = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if target.name.startswith(".deleting") and path.name == folder_of(1):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stuck)
    trained(tmp_path / "run", save_every=1, keep_checkpoints=1)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [folder_of(1), folder_of(6)]
    warnings = [line for line in capfd.readouterr().out.splitlines() if "warning" in line]
    assert (
        len(warnings) == 1
        and f"{folder_of(1)} cannot be deleted: Device or resource busy; training goes on" in warnings[0]
    )


def test_a_resume_that_is_refused_renames_nothing(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", save_every=3, keep_checkpoints=9)
    (run / "checkpoints" / folder_of(6) / "rank-00000-of-00001.safetensors").write_bytes(b"damaged")
    before = contents(run)
    for changes in ({"max_steps": 8, "seed": 3}, {"max_steps": 8, "rows": 99}, {"max_steps": 2}):
        with pytest.raises(UserError):
            Training(run, resume=True, **changes).begin()
        let_go()
        assert {name: data for name, data in contents(run).items() if name != "log.txt"} == {
            name: data for name, data in before.items() if name != "log.txt"
        }
    training = Training(run, resume=True, max_steps=8)
    assert f"{folder_of(6)} is damaged" in training.run.notes[0]
    assert training.begin() == 3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"damaged-{folder_of(6)}", folder_of(3)]
    training.run.close()


def test_a_run_of_which_a_power_cut_left_empty_files_is_no_finished_one(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", save_every=3)
    for name, text in (("config.yaml", ""), ("result.json", '{"finished": true}'), ("result.json", "")):
        (run / name).write_text(text)
        training = Training(run, resume=True)
        assert training.begin() == 6
        training.run.close()


def hostile(manifest: dict[str, Any]) -> dict[str, Any]:
    """Manifests that somebody made, with a checksum that fits: {what is wrong: what differs}."""
    (name, facts), shapes = next(iter(manifest["files"].items())), manifest["shapes"]
    good = facts["pieces"]

    def of(pieces: Any) -> dict[str, Any]:
        return {"files": {name: facts | {"pieces": pieces}}}

    found: dict[str, Any] = {
        f"the file {other}": {"files": {other: facts}}
        for other in (f"../../{name}", f"/{name}", f"x/{name}", f"{name}\n", "rank-x-of-1.safetensors", "")
    }
    faulty: list[Any] = [
        [],
        good[:1],
        [["weight", 0, 12]],
        [["weight", -1, 13], ["bias", 0, 3]],
        [[]],
        [7],
        [["weight", 0]],
    ]
    found |= {f"pieces {pieces}": of(pieces) for pieces in faulty}
    found |= {
        "a gap": of([["weight", 0, 4], ["weight", 5, 7], ["bias", 0, 3]]),
        "beyond its end": of([["weight", 0, 12], ["bias", 0, 9]]),
        "words for numbers": of([["weight", "0", "12"], ["bias", 0, 3]]),
        "huge": of([["weight", 0, 2**70], ["bias", 0, 3]]),
        "unknown": of([["elsewhere", 0, 12], ["bias", 0, 3]]),
        "no files": {"files": {}},
        "a list of files": {"files": [name]},
        "a size that is none": {"files": {name: facts | {"bytes": "180"}}},
        "a negative shape": {"shapes": shapes | {"bias": [-3, -1]}},
        "a shape of words": {"shapes": shapes | {"bias": ["3"]}},
        "a kind that is a path": {"kinds": ["../x"]},
        "another step": {"step": 5},
        "a step of words": {"step": "6"},
        "a score of words": {"score": "<b>"},
        "a scalar of words": {"scalars": {"step": "x"}},
        "settings that are none": {"settings": [1]},
        "a schedule that is none": {"schedule": "x"},
        "a scale of words": {"loss_scale": {"cur_scale": "x"}},
        "a format of words": {"format": "1"},
        "a fingerprint that is none": {"data": 7},
    }
    return found


def forge(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / checkpoint_files.MANIFEST
    manifest = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(manifest | {"checksum": checkpoint_files.checksum_of(manifest)}))


def test_a_hostile_manifest_is_a_damaged_one(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", save_every=3, keep_checkpoints=9)
    last = run / "checkpoints" / folder_of(6)
    file = "rank-00000-of-00001.safetensors"
    shutil.copy(last / file, run / file)  # where ../../ leads: the guard must not depend on what is there
    original = (last / checkpoint_files.MANIFEST).read_text()
    for what, changes in hostile(json.loads(original)).items():
        forge(last, changes)
        folder, _, notes = checkpoint_files.find_newest(run / "checkpoints")
        assert folder is not None and folder.name == folder_of(3), what
        assert len(notes) == 1 and "\n" not in notes[0] and len(notes[0]) < 400, what
        (last / checkpoint_files.MANIFEST).write_text(original)
    missing = [name for name in json.loads(original) if name not in ("format", "checksum", "data", "sample", "frozen")]
    for name in missing:
        manifest = {key: value for key, value in json.loads(original).items() if key != name}
        (last / checkpoint_files.MANIFEST).write_text(
            json.dumps(manifest | {"checksum": checkpoint_files.checksum_of(manifest)})
        )
        for complete in (checkpoint_files.list_complete, checkpoint_files.scores_of):
            assert [folder.name for folder, _ in complete(run / "checkpoints")] == [folder_of(3)], name
    (last / checkpoint_files.MANIFEST).write_text("[" * 100_000)
    assert "RecursionError" in checkpoint_files.find_newest(run / "checkpoints")[2][0]
    (last / checkpoint_files.MANIFEST).write_text(original)
    assert checkpoint_files.find_newest(run / "checkpoints")[0] == last


@pytest.mark.parametrize("fault", ["shorter", "one number", "attributes"])
def test_what_a_hostile_checkpoint_holds_goes_nowhere_else(tmp_path: Path, fault: str) -> None:
    run = trained(tmp_path / "run", save_every=3)
    last = run / "checkpoints" / folder_of(6)
    file = last / "rank-00000-of-00001.safetensors"
    tensors = load_file(file)
    if fault == "attributes":
        forge(last, {"loss_scale": {"step": 0.0, "cur_scale": 8.0, "last_overflow_iter": None}})  # as bf16 has it
    else:
        tensors["fp32/weight@0"] = tensors["fp32/weight@0"][
            : 5 if fault == "shorter" else 1
        ].clone()  # copy_ would repeat the one number
        save_file(tensors, file)
        manifest = json.loads((last / checkpoint_files.MANIFEST).read_text())
        (facts,) = manifest["files"].values()
        forge(
            last,
            {
                "files": {
                    file.name: facts
                    | {"bytes": file.stat().st_size, "xxh3_128": checkpoint_files._checksum_of_file(file)}
                }
            },
        )
    training = Training(run, resume=True, max_steps=8)
    training.engine.optimizer.loss_scaler = scaler = SimpleNamespace(step=7, cur_scale=1.0)
    if fault == "attributes":
        assert training.begin() == 6 and (scaler.step, scaler.cur_scale) == (7, 8.0)
    else:
        with pytest.raises(UserError, match="cannot be read"):
            training.begin()
    training.run.close()


# --- run folders ----------------------------------------------------------------------------------


def test_where_there_are_no_locks_a_run_folder_is_still_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    claim = tmp_path / "run" / folder_module.IN_USE
    training = Training(tmp_path / "run")
    with pytest.raises(
        UserError, match=rf"in use by another run.*{os.getpid()}.*if that process has ended, delete the file"
    ):
        Training(tmp_path / "run", overwrite=True)
    training.train()
    training.finish()
    assert claim.exists()  # until this process ends, for its exit functions may still be writing there
    # Of a process that had this one's number before.
    claim.write_text(json.dumps({"host": os.uname().nodename, "process": os.getpid(), "started": 1.0}))
    trained(tmp_path / "run", overwrite=True)
    claim.write_text(json.dumps({"host": "elsewhere", "process": 1, "started": 1.0}))
    with pytest.raises(UserError, match="elsewhere"):
        Training(tmp_path / "run", overwrite=True)
    claim.unlink()


def test_a_claim_goes_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", lambda do, **options: at_exit.append(functools.partial(do, **options)))
    folder_module.claim(tmp_path / "claim")
    assert (tmp_path / "claim").exists()
    at_exit[0]()
    assert not (tmp_path / "claim").exists()


def test_a_checkpoint_from_before_a_setting_was_one_goes_on(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", save_every=3)
    last = run / "checkpoints" / folder_of(6)
    written = json.loads((last / checkpoint_files.MANIFEST).read_text())["settings"]
    forge(last, {"settings": {name: value for name, value in written.items() if not name.startswith("adam_")}})
    resumed = Run(settings_of(run, resume="true", max_steps="12"), json.loads(json.dumps(DS_CONFIG)), RECIPE)
    resumed.close()
    assert resumed.checkpoint is not None and resumed.checkpoint[0] == last


def test_two_runs_in_the_same_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import os, sys, pathlib\nprint(sys.argv[-1], file=open('said', 'a'))\n"
        "'EMPTY' in os.environ or pathlib.Path(sys.argv[-1], 'log.txt').touch()\nsys.exit(2)\n"
    )
    yaml_path, launcher = (
        str(ROOT / RECIPE).replace(".py", ".yaml"),
        ["deepspeed", "--num_accelerators", "1", str(recipe)],
    )
    command = [sys.executable, "-m", "lib.launch.supervise", "x-zero2", yaml_path, "0", "", "--", *launcher]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [2, 2]
    folders = (tmp_path / "said").read_text().split()
    assert len(set(folders)) == 2 and all((tmp_path / folder / "log.txt").exists() for folder in folders)
    # A mistake that is found before there is a run.
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=os.environ | {"EMPTY": "1"})
    assert sorted(f"runs/{path.name}" for path in Path("runs").iterdir()) == sorted(folders)
    # Without launch.sh.
    plain = [Run(settings_of(tmp_path, run_dir="null"), json.loads(json.dumps(DS_CONFIG)), RECIPE) for _ in range(2)]
    assert plain[0].folder != plain[1].folder and plain[0].folder.name.startswith("recurrent_lm-zero0-")
    for run in plain:
        run.close()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = importlib.import_module("recipes.causal_lm")
    text = (ROOT / "recipes" / "causal_lm.yaml").read_text().replace("model: null", "model: ~/model")
    (tmp_path / "mine.yaml").write_text(
        text.replace("dataset: sotu", "dataset: ~/rows").replace(
            'prompt: "The state of our Union"', "prompt: ~/bin holds"
        )
    )
    cfg, json_path = settings.parse(
        recipe.Config, str(recipe.__file__), ["--config=~/mine.yaml", "--run_dir=~/run", "--deepspeed_config=~/x.json"]
    )
    assert (cfg.model, cfg.dataset, cfg.run_dir, str(json_path)) == tuple(
        f"{tmp_path}/{name}" for name in ("model", "rows", "run", "x.json")
    )
    assert cfg.prompt == "~/bin holds"
    (tmp_path / "mine.yaml").write_text("run_dir: ~/there\n" + text)
    assert supervise.resolve(["--config=~/mine.yaml"], "x.yaml") == (f"{tmp_path}/there", False)
    assert supervise.resolve(["--config=~/mine.yaml", "--run_dir=~/run"], "x.yaml") == (f"{tmp_path}/run", False)
    options, _ = compare.parse(["causal_lm", "--ds_configs=~/x.json"])
    (tmp_path / "x.json").touch()
    assert compare.config_files(options) == {"x": tmp_path / "x.json"}
    dry = [str(ROOT / "launch.sh"), "causal_lm", "--ds_config=~/x.json", "--dry_run"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert (
        f"--deepspeed_config {tmp_path}/x.json"
        in subprocess.run(dry, capture_output=True, text=True, env=environment, check=True).stdout
    )


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["no", "0", "off", "F", "n", "false", "False", "yes", "1", "on", "t", "Y", "true"])
def test_the_supervisor_reads_resume_as_the_recipe_does(answer: str) -> None:
    expected = settings.check_value(answer, bool, "--resume", text=True)
    assert supervise.resolve(["--resume", answer, "--run_dir", "x"], "x.yaml") == ("x", expected)
    assert supervise.resolve([f"--resume={answer}"], str(ROOT / RECIPE).replace(".py", ".yaml"))[1] == expected


def test_a_process_that_cannot_be_killed_is_left_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "UNKILLABLE_SECONDS", 0.1)
    monkeypatch.setattr(supervise, "session_of", lambda _: [SimpleNamespace(pid=123, kill=lambda: None)])
    assert supervise.run_once(["true"]) == 0
    assert "process 123 was killed and does not end" in capfd.readouterr().err


@pytest.mark.parametrize(("last", "code"), [("pass", 0), ("time.sleep(600)", 3)])
def test_exit_functions_run_whatever_the_end_is_but_not_for_ever(last: str, code: int) -> None:
    text = "import atexit, time; from lib.run import cli; cli.EXIT_SECONDS = 1"
    text += f"; atexit.register(lambda: {last.replace('pass', 'None')})"
    text += f"; atexit.register(print, 'uploaded'); cli.leave({code})"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code and done.stdout == "uploaded\n"


# --- the page of a comparison ---------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(f"{tag} {name}" for name, _ in attributes)]


def test_no_string_from_outside_is_part_of_the_page(tmp_path: Path) -> None:
    """Names of configs, scores, settings, versions, devices and errors could hold tags, quotes or cells of a table."""
    evil = r"""<i id='x' onclick="y">|`*&amp;$\x$"""
    spec = {
        "recipe": evil, "configs": {evil: {}, "b": {}, "failed": {}}, "ranks": [1, 2], "rounds": 1, "steps": 8,
        "repeat_steps": 8, "preset": evil,
        "settings": [evil], "cores": 2, "memory_bytes": 1e9, "created": evil,
        "versions": {"torch": evil}, "commit": evil, "code": evil, "command": evil,
        "precision": "fp32",
    }  # fmt: skip
    results = Results(tmp_path / "new", spec, [], device=evil, model=evil)
    score = f"score_{evil}"
    numbers: dict[str, Any] = {column.name: 1.0 for column in results.columns() if column.kind != "text"} | {
        score: 1.0,
        "loss_left_at_step": 3,
    }
    for config in (evil, "b"):
        for ranks_of_it in (1, 2):
            results.rows.append({**numbers, "config": config, "ranks": ranks_of_it, "failed": None, "precision": evil})
            results.losses[config, ranks_of_it] = [1.0, 0.5]
    results.rows.append({**dict.fromkeys(numbers), "config": "failed", "ranks": 1, "failed": evil})
    results.notes[evil, evil] = [evil]
    other = Results(
        tmp_path / f"old{evil.replace('/', '')}",
        spec | {"commit": "older", "configs": {evil: {"x": 1}}},
        results.rows,
        results.losses,
    )
    page = report.as_html(results, other)
    tags = set(Tags(page).found)
    assert evil not in page and "i" not in tags and not any("onclick" in tag for tag in tags)
    markdown = report.as_markdown(results, other).replace("\\<", "").replace("\\|", "")
    assert "<" not in markdown
    tables = [
        [line.count("|") for line in lines.splitlines() if line.startswith("|")] for lines in markdown.split("\n\n")
    ]
    assert [len(set(table)) for table in tables if table] == [1, 1], "a string made a cell of its own"
