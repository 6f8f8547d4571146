"""From Enter to the first step: devices, the printed command, wrong words, help, and progress of what takes long."""

import base64
import importlib
import io
import json
import math
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SCRIPTS, execute, free_port, launch
from datasets import Dataset

from lib.errors import UserError
from lib.launch import devices, preflight, supervise
from lib.progress import Work, progress
from lib.run import signs
from lib.run.signs import Signs
from lib.settings import config

# --- devices --------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this machine look like one with GPUs, to this process and to programs that it starts.

    There is a fake nvidia-smi, and a fake torch of which only the version is read.
    """

    def make(gpus: int, driver: str = "580.65.06", cuda: str | None = "13.0") -> dict[str, str]:
        (tmp_path / "bin").mkdir(exist_ok=True)
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.write_text(
            "#!/bin/sh\n" + f"echo '{driver}, Disabled'\n" * gpus + "echo No devices were found\n" * (not gpus)
        )
        smi.chmod(0o755)
        (tmp_path / "torch").mkdir(exist_ok=True)
        (tmp_path / "torch" / "__init__.py").write_text(
            "class cuda:\n    is_available = staticmethod(lambda: False)\n    device_count = staticmethod(lambda: 8)\n"
        )
        version = (
            f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n"
            "hip: Optional[str] = None\nxpu: Optional[str] = None\n"
        )
        (tmp_path / "torch" / "version.py").write_text(version)
        changed = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(
            devices, "_torch_build", lambda: dict(re.findall(r"^(\w+).* = '(.*)'$", version, re.MULTILINE))
        )
        return changed

    devices.find.cache_clear()
    yield make
    devices.find.cache_clear()


def ids_of(options: list[str], gpus: int) -> list[int]:
    """The devices that DeepSpeed's own launcher takes with these options on a machine with so many GPUs."""
    from deepspeed.launcher import runner

    given = runner.parse_args([*options, "recipe.py"])
    assert not (given.include and given.num_gpus >= 0)  # the launcher refuses the two together
    pool = runner.fetch_hostfile(given.hostfile) or OrderedDict(localhost=gpus)
    active = runner.apply_num_nodes_and_gpus(
        runner.parse_inclusion_exclusion(pool, given.include, given.exclude), given.num_nodes, given.num_gpus
    )
    assert list(active) == ["localhost"]
    return list(active["localhost"])


@pytest.mark.parametrize(
    ("variable", "ranks", "ids"), [(None, 8, range(8)), (None, 3, range(3)), ("2,3", 2, [2, 3]), ("5, 2,7", 2, [2, 5])]
)
def test_the_launcher_takes_the_devices_that_were_chosen(
    machine: Any, monkeypatch: pytest.MonkeyPatch, variable: str | None, ranks: int, ids: list[int]
) -> None:
    machine(8)
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    found = devices.find()
    assert found.accelerator == "cuda" and found.default_ranks == (len(variable.split(",")) if variable else 8)
    assert ids_of(found.launcher_options(ranks), gpus=8) == list(ids)  # the launcher sorts them


def test_a_hostfile_on_the_machine_does_not_start_ranks_elsewhere(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(8)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("one slots=8\ntwo slots=8\n")
    monkeypatch.setattr(devices, "HOSTFILE", hostfile)
    monkeypatch.setattr("deepspeed.launcher.runner.DLTS_HOSTFILE", str(hostfile))
    assert ids_of(devices.find().launcher_options(2), gpus=8) == [0, 1]
    devices.find.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    assert ids_of(devices.find().launcher_options(1), gpus=8) == [6]
    for machines, notes in (("", 1), ("several", 0)):
        preflight.main(str(ROOT / "recipes" / "causal_lm.py"), "1", machines)
        assert capsys.readouterr().err.count(f"--hostfile {hostfile}") == notes


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("GPU-00000002-aaaa,GPU-00000003-aaaa", ["by number only (0 to 7", "no UUID"]),
        ("MIG-1234", ["by number only"]),
        ("2,9", ["CUDA_VISIBLE_DEVICES=2,9", "are 8 GPUs"]),
        ("2,2", ["each once"]),
        ("2", ["--ranks is 2, but there is 1 GPU in CUDA_VISIBLE_DEVICES=2"]),
    ],
)
def test_devices_that_the_launcher_cannot_carry_are_refused(
    machine: Any, monkeypatch: pytest.MonkeyPatch, variable: str, words: list[str]
) -> None:
    machine(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    with pytest.raises(UserError) as error:
        devices.find().launcher_options(2)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("driver", "cuda", "words"),
    [
        ("535.104.05", "13.0", ["are 8 GPUs", "driver 535.104.05", "CUDA 13.0, which needs driver 580 or newer"]),
        ("580.65.06", None, ["built without CUDA"]),
    ],
)
def test_gpus_that_torch_cannot_use_are_no_silent_run_on_the_cpu(
    machine: Any, driver: str, cuda: str | None, words: list[str]
) -> None:
    machine(8, driver, cuda)
    with pytest.raises(UserError) as error:
        devices.find()
    for word in [*words, "torch 2.13.0", "DS_ACCELERATOR=cpu"]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "hidden", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"DS_ACCELERATOR": "cpu"}]
)
def test_gpus_that_are_not_wanted_are_not_looked_at(
    machine: Any, monkeypatch: pytest.MonkeyPatch, hidden: dict[str, str]
) -> None:
    machine(8, "535.104.05")
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    assert devices.find() == devices.Devices("cpu") and os.environ["DS_ACCELERATOR"] == "cpu"
    assert ids_of(devices.find().launcher_options(2), gpus=1) == [0, 1]


def test_no_gpus_is_the_cpu(machine: Any) -> None:
    machine(0)
    assert devices.find() == devices.Devices("cpu") and devices.find().default_ranks == 2


def test_the_users_accelerator_stays(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is asked for the devices. A made-up answer stands in for a machine with another accelerator."""
    machine(0)
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    monkeypatch.setenv("ZE_AFFINITY_MASK", "1,3")
    monkeypatch.setattr(devices, "_ask", lambda _: ["xpu", 4, "ZE_AFFINITY_MASK"])
    assert (
        devices.find() == devices.Devices("xpu", (1, 3), "ZE_AFFINITY_MASK=1,3")
        and os.environ["DS_ACCELERATOR"] == "xpu"
    )


def test_launch_and_comparison_carry_the_devices(machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = machine(8)
    environment = (
        {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
        | changed
        | {"CUDA_VISIBLE_DEVICES": "2,3"}
    )
    environment["PATH"] = f"{tmp_path / 'bin'}:{SCRIPTS}:{os.environ['PATH']}"
    command = [str(ROOT / "launch.sh"), "causal_lm", "--dry_run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert " --include localhost:2,3 recipes/causal_lm.py " in done.stdout
    started = shlex.split(done.stdout)
    assert ids_of(started[1 : started.index("recipes/causal_lm.py")], gpus=8) == [2, 3]

    from lib.compare import compare

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    commands: list[list[str]] = []

    def run_once(command: list[str], *_: Any) -> int:
        commands.append(command)
        return 1

    monkeypatch.setattr(supervise, "run_once", run_once)
    spec = {"steps": 4, "repeat_steps": 4, "settings": [], "fields": [], "recipe": "causal_lm"}
    compare.run_one(tmp_path / "comparison" / "runs" / "one", spec, 1, 2, "zero2")
    assert (
        commands[0][commands[0].index("--include") + 1] == "localhost:2,3"
        and commands[0][: len(supervise.START_RANKS)] == supervise.START_RANKS
    )


# --- the ranks of the printed command -----------------------------------------


@pytest.mark.slow
def test_ranks_start_as_deepspeed_starts_them(tmp_path: Path) -> None:
    """launch.sh prints a `deepspeed` command and starts the ranks itself, with the same environment and arguments."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, sys\nopen(f'{sys.argv[2]}-{os.environ[\"RANK\"]}', 'w')"
        ".write(json.dumps([sys.argv[1:2] + sys.argv[3:], sys.stdout.write_through, dict(os.environ)]))"
    )
    world = base64.urlsafe_b64encode(json.dumps({"node0": [0, 1], "node1": [0, 1]}).encode()).decode()
    on_one = ["--master_port", 29511, "--num_accelerators", 2]
    on_two = [f"--world_info={world}", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29511"]
    per_machine = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    cases: list[tuple[int, list[Any], list[Any]]] = [
        (0, on_one, [SCRIPTS / "deepspeed"]),
        (2, on_two, per_machine),
    ]
    for first_rank, options, theirs in cases:
        found = []
        programs: dict[str, list[Any]] = {"deepspeed": theirs, "ours": supervise.START_RANKS}
        for name, program in programs.items():
            done = execute([*program, "--log_level", "critical", *options, script, tmp_path / name, "--max_steps", "3"])
            assert done.returncode == 0, done.stderr
            written = [tmp_path / f"{name}-{first_rank + rank}" for rank in range(2)]
            found.append([json.loads(file.read_text()) for file in written])
        compare_ranks(found)


def compare_ranks(found: list[list[Any]]) -> None:
    """found: of DeepSpeed's launcher and of ours, what each of its two ranks was given."""
    for rank in range(2):
        (arguments, *_, environment), (our_arguments, *_, our_environment) = found[0][rank], found[1][rank]
        # These may differ: DeepSpeed's launcher and its imports set them, and the ranks do not need them.
        may_differ = {name for name in environment if name.startswith(("PYTORCH_", "TORCH", "KMP", "DS_"))} | {
            "_",
            "TRITON_CACHE_DIR",
        }
        assert arguments == our_arguments and found[0][rank][1] == found[1][rank][1]
        assert {k: v for k, v in environment.items() if k not in may_differ} == {
            k: v for k, v in our_environment.items() if k not in may_differ
        }


@pytest.mark.parametrize(("code", "status"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 247), ("pass", 0)])
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, code: str, status: int) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {code}\nelif {status}:\n    time.sleep(60)\n"
    )
    started = time.monotonic()
    done = execute([*supervise.START_RANKS, "--master_port", free_port(), "--num_accelerators", 2, script])
    assert done.returncode == status and time.monotonic() - started < 50


@pytest.mark.slow
def test_a_rank_that_has_stopped_as_asked_lets_the_others_finish(tmp_path: Path) -> None:
    """The monitor of rank 0 may still be uploading."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '0':\n    time.sleep(3)\n    open('done', 'w')\nsys.exit(75)\n"
    )
    command = [*supervise.START_RANKS, "--master_port", free_port(), "--num_accelerators", 2, script]
    assert execute(command, cwd=tmp_path).returncode == 75 and (tmp_path / "done").exists()


# --- wrong words and help -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["txt_classification"], ["did you mean 'text_classification'", "recipes: causal_lm"]),
        (["comapre", "causal_lm"], ["did you mean 'compare'"]),
        (["causal_lm", "--dryrun"], ["'--dryrun'; did you mean '--dry_run'"]),
        (["causal_lm", "--learning_rat", "1"], ["did you mean '--learning_rate'"]),
        (["causal_lm", "--max_steps"], ["--max_steps: expected one argument"]),
        (["causal_lm", "--ranks", "0"], ["--ranks is 0"]),
        (["compare", "causal_lm", "--stage", "0"], ["unknown argument '--stage'; did you mean '--stages'"]),
    ],
)
def test_a_wrong_word_is_answered_at_once(arguments: list[str], words: list[str]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    for word in words:
        assert word in done.stderr


@pytest.mark.slow
def test_help_is_read_from_the_source_as_the_recipe_would_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    causal_lm: Any = importlib.import_module("recipes.causal_lm")
    path = ROOT / "recipes" / "causal_lm.py"
    with pytest.raises(SystemExit):
        config.parse(causal_lm.Config, str(path), ["--help"])
    expected = capsys.readouterr().out
    preflight.main(str(path), "--help")
    assert capsys.readouterr().out == expected and "whether a run that is there already is deleted" in expected
    done = launch("causal_lm", "--help")
    assert done.stdout == expected and not done.stderr


def test_preflight_imports_nothing_large() -> None:
    code = (
        "import sys; from lib.launch import preflight;"
        " print([name for name in ('torch', 'deepspeed', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# --- signs of life --------------------------------------------------------------------------------


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "SILENCE", 0.1)


def spoken(what: Callable[[Any], object], phase: Any = None) -> list[str]:
    """The lines that are printed while `what` runs, on a console that is no terminal."""
    console = io.StringIO()
    with Signs(console) as watch:
        watch.phase = phase
        what(watch)
    return console.getvalue().splitlines()


def test_what_takes_long_says_what_it_is_and_how_long_it_will_take(short_silence: None) -> None:
    def work(_: Signs) -> None:
        with progress("outer"), progress("evaluating", total=1000) as advance:
            for _batch in range(10):
                time.sleep(0.08)
                advance(100)

    started = time.monotonic()
    lines = spoken(work)
    # Signs come after 0.1, 0.3 and 0.7 seconds: each silence is twice as long as the one before.
    assert 2 <= len(lines) <= 2 + math.log2((time.monotonic() - started) / 0.1)
    assert all(re.fullmatch(r"evaluating: \d+ of 1,000 rows, 0:0\d so far(, 0:0\d left)?", line) for line in lines)


@pytest.mark.slow
def test_what_is_fast_says_nothing_and_a_phase_speaks_for_what_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "SILENCE", 0.4)

    def quick(watch: Signs) -> None:
        for number in range(8):  # prints so often that the console is never silent for long
            watch.print(f"step {number}")
            with progress("quick"):
                time.sleep(0.08)

    assert spoken(quick) == [f"step {number}" for number in range(8)]
    assert spoken(lambda _: time.sleep(0.7), Work("starting"))[0].startswith("starting: 0:0")
    assert spoken(lambda _: time.sleep(0.7)) == []


def test_on_a_terminal_a_bar_moves_and_goes_away(short_silence: None) -> None:
    terminal, process_side = pty.openpty()
    with os.fdopen(process_side, "w") as console, Signs(console) as watch, progress("evaluating", total=100) as advance:
        advance(50)
        time.sleep(0.3)
        watch.print("step 1")
    seen = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "evaluating:  50%|" in seen and "\r\033[Kstep 1\r\n" in seen


@pytest.mark.slow
def test_work_is_counted_by_what_everything_passes_through(one_rank: None, short_silence: None) -> None:
    """The console tells of slow tokenization, batches and baselines, without a line for it in the recipe."""
    from lib.data import batches, rows
    from lib.distributed import ranks
    from lib.scores import baselines, inference

    splits = {"train": Dataset.from_dict({"text": [str(time.time_ns() + number) for number in range(40)]})}

    def tokenize(columns: dict[str, list[str]]) -> dict[str, list[int]]:
        time.sleep(1)
        return {"length": [len(text) for text in columns["text"]]}

    assert re.match("preparing the rows: 0 of 40 rows", spoken(lambda _: rows.map_rows(splits, tokenize))[0])

    class Engine:
        device = ranks.device()
        eval = train = staticmethod(lambda: None)

    def answer(batch: batches.Batch) -> torch.Tensor:
        time.sleep(0.1)
        return batch["length"]

    collate = lambda columns: {"length": torch.tensor([len(text) for text in columns["text"]])}  # noqa: E731
    lines = spoken(lambda _: inference.for_each_row(Engine(), splits["train"], collate, 4, answer=answer))
    assert any(re.fullmatch(r"evaluating: [1-9]\d* of 40 rows, 0:0\d so far, 0:0\d left", line) for line in lines)
    texts, labels = [f"word{number} and more" for number in range(3000)], [number % 2 for number in range(3000)]
    assert spoken(lambda _: [baselines.tfidf_logistic_regression(texts, labels, texts, labels) for _ in range(10)])[
        0
    ].startswith("TF-IDF")


def test_a_run_shows_what_its_rank_0_does_and_the_other_ranks_nothing(
    one_rank: None,
    short_silence: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from lib.distributed import ranks
    from lib.run.output import Output
    from lib.run.run import Run

    recipe: Any = importlib.import_module("recipes.causal_lm")
    cfg = config.load(
        recipe.Config,
        ROOT / "recipes" / "causal_lm.yaml",
        {"run_dir": str(tmp_path / "run"), "max_steps": "3"},
        quick=True,
    )
    threads = threading.active_count()
    ds_config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    run = Run(cfg, {"zero_optimization": {"stage": 2}, **ds_config}, "recipes/causal_lm.py")
    assert threading.active_count() == threads + 1
    time.sleep(0.2)
    with progress("loading the rows"):
        time.sleep(0.2)
    run.plan(Dataset.from_dict({"number": range(100)}))
    run.output.begin_steps(0, 3)
    run.metrics.restart_clock()
    run.metrics.note_step(1, loss=torch.zeros(()), tokens=torch.ones(()), learning_rate=0.1, grad_norm=None)
    time.sleep(0.6)
    run.close()
    assert threading.active_count() == threads
    printed = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("step ")]
    assert printed[0].startswith("starting: 0:0") and any(line.startswith("loading the rows: 0:0") for line in printed)
    assert any(line.startswith("training: 1 of 3 steps") for line in printed)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    output = Output(tmp_path / "log.txt")
    assert threading.active_count() == threads and output.signs is None
    output.close()
