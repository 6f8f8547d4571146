"""./launch.sh compare: measurements against theory, and the command as a user runs it, up to the page in a browser."""

import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, CONFIGS, ROOT, SCRIPTS, execute, run_ranks
from measure_worker import SLOW, WIDE

from lib.compare import compare, theory
from lib.compare.findings import plain, sentences
from lib.compare.measure import Meter
from lib.compare.results import INSPECTED, collect, mean_facts, written
from lib.errors import UserError

# Theory


def facts(**changes: Any) -> dict[str, Any]:
    """The facts of a model of 7.5e9 parameters on 64 ranks in bf16, where DeepSpeed does not depart from the paper."""
    count = 7_500_000_000
    defaults = {
        "parameters": count,
        "trained": count,
        "kept_whole": 0,
        "in_modules": count,
        "frozen_in_modules": 0,
        "touching_share": None,
        "element_bytes": 2,
        "zero_ranks": 64,
        "tensor_size": 1,
        "accumulation_steps": 1,
    }
    found = defaults | changes
    return {"whole_parameters": found["parameters"], "whole_trained": found["trained"]} | found


def zero(stage: int, **knobs: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **knobs}}


@pytest.mark.parametrize("stage, gigabytes", [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_papers_table(stage: int, gigabytes: float) -> None:
    """ZeRO paper, figure 1."""
    expected = theory.states(zero(stage), facts(stage=stage, accumulation_steps=2))
    assert sum(part.paper for part in expected.values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert sum(part.total for part in expected.values()) / 1e9 == pytest.approx(gigabytes, abs=0.05), (
        "DeepSpeed in bf16 is as the paper has it"
    )


@pytest.mark.parametrize(
    "stage, accumulation, knobs, passes",
    [
        (0, 1, {}, 2), (1, 1, {}, 3), (2, 1, {}, 3), (3, 1, {}, 2), (1, 4, {}, 3), (2, 4, {}, 9), (3, 4, {}, 8),
        (2, 1, {"use_multi_rank_bucket_allreduce": False, "reduce_scatter": False}, 3),
        (3, 1, {"stage3_max_reuse_distance": 1_000_000}, 2.5),
        (3, 1, {"stage3_max_live_parameters": 0}, 2),
        (1, 1, {"use_multi_rank_bucket_allreduce": False}, 2),
        (2, 1, {"use_multi_rank_bucket_allreduce": False}, 2),
        (3, 1, dict.fromkeys(theory.PAPER_STAGE3, 0), 3),
    ],
)  # fmt: skip
def test_traffic_is_that_of_deepspeeds_defaults(
    stage: int, accumulation: int, knobs: dict[str, Any], passes: int
) -> None:
    """Passes over the parameters, as measured with DeepSpeed 0.19.8 on a model under 1e9 parameters."""
    count = 1_000_000
    small_model = facts(stage=stage, accumulation_steps=accumulation, parameters=count, trained=count, in_modules=count)
    expected = theory.traffic(zero(stage, **knobs), small_model)
    one_pass = 2 * count * 63 / 64
    assert expected.total / one_pass == pytest.approx(passes)
    assert expected.paper / one_pass == pytest.approx(3 if stage == 3 else 2)


def test_what_is_frozen_is_gathered_for_the_forward_pass_only() -> None:
    """Half of the model is frozen. All of it is gathered for the forward pass, and half for the backward pass.

    The gradients of half are reduced.
    """
    sizes = {"parameters": 1_000_000, "trained": 500_000, "in_modules": 1_000_000, "frozen_in_modules": 500_000}
    expected = theory.traffic(
        zero(3, **dict.fromkeys(theory.PAPER_STAGE3, 0)), facts(stage=3, accumulation_steps=1, **sizes)
    )
    assert expected.total / (2 * 1_000_000 * 63 / 64) == pytest.approx(1 + 0.5 + 0.5)


def test_wire_bytes_are_those_of_ring_collectives() -> None:
    logged = {
        "all_reduce": {"400": 2},
        "all_gather_into_tensor": {"100": 1},
        "reduce_scatter_tensor": {"400": 1},
        "barrier": {"0": 1},
    }
    assert theory.wire_bytes({"4": logged, "2": {"all_reduce": {"10": 1}}}) == {
        "all_reduce": 1210,
        "all_gather_into_tensor": 300,
        "reduce_scatter_tensor": 300,
    }


# Measured against theory

BATCH = 8
CASES = {  # number of ranks -> (preset, accumulation steps, precision), for all configs
    1: [("default", 1, "fp32")],
    2: [("default", 1, "bf16"), ("paper", 2, "bf16")],
    4: [("paper", 1, "fp32")],
}
if ALL:
    CASES[1] += [("default", 2, "bf16")]
    CASES[2] += [("default", 1, "fp32"), ("paper", 1, "fp32")]
    CASES[4] = [("default", 2, "fp32"), ("paper", 1, "bf16")]
WITH_ADAPTER = ("zero0", "zero2", "zero3")
EVERY_CASE = [(ranks, config, *case) for ranks, cases in CASES.items() for case in cases for config in CONFIGS]
# Configs under which ranks share layers, rows or experts, or have layers of their own, by the number of ranks.
SHARING = {
    2: ("tp2_zero1", "tp2_zero3", "sp2_zero1", "sp2_zero3", "ep2_zero2", "pp2_zero0"),
    4: ("tp2_zero0", "tp2_zero3", "sp2_zero3", "ep2_zero2", "ep2_zero3", "pp2_zero1"),
}
if not ALL:
    del SHARING[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a subfolder <config>_<preset>_<accumulation>_<precision>-<ranks> for each case."""
    folder = tmp_path_factory.mktemp("measured")
    for ranks, cases in CASES.items():
        arguments = []
        for preset, accumulation, precision in cases:
            for config in CONFIGS:
                ds_config = json.loads((ROOT / "ds_configs" / "causal_lm" / f"{config}.json").read_text())
                ds_config["train_micro_batch_size_per_gpu"] = BATCH // ranks // accumulation
                name = f"{config}_{preset}_{accumulation}_{precision}"
                path = folder / f"{name}-{ranks}.json"
                path.write_text(json.dumps(theory.with_paper_preset(ds_config) if preset == "paper" else ds_config))
                tied = accumulation > 1  # stage 3 treats a parameter that two modules share in another way
                arguments.append(f"{name}:{path}:{WIDE},tie_embeddings={tied},batch_size={BATCH},precision={precision}")
        if ranks == 1:
            arguments.append(arguments[0].replace("zero0_", "slow_", 1))
        if ranks == 2:
            settings = f"lora_rank=4,scored_rows=2,batch_size={BATCH},precision=bf16"
            arguments += [f"lora_{config}:{folder / config}_paper_2_bf16-2.json:{settings}" for config in WITH_ADAPTER]
        run_ranks(ranks, "measure_worker", folder, *arguments)
    return folder


def ranks_of(measured: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((measured / f"{name}-{ranks}" / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, config, preset, accumulation, precision", EVERY_CASE)
def test_states_and_traffic_are_what_theory_says(
    measured: Path, ranks: int, config: str, preset: str, accumulation: int, precision: str
) -> None:
    name = f"{config}_{preset}_{accumulation}_{precision}"
    ds_config = json.loads((measured / f"{name}-{ranks}.json").read_text())
    sent = 0.0
    for rank in ranks_of(measured, name, ranks):
        expected = theory.states(ds_config, rank["facts"])
        measured_bytes = {kind: sum(places.values()) for kind, places in rank["held"].items()}
        assert {kind: measured_bytes[kind] for kind in theory.KINDS} == {
            kind: pytest.approx(expected[kind].total, rel=0.01) for kind in theory.KINDS
        }
        sent += sum(theory.wire_bytes(rank["logged"]).values()) / ranks
        offloaded = {kind for kind, places in rank["held"].items() if places["host"]}
        assert offloaded == ({"gradients", "optimizer"} if "offload" in config else set()) | (
            {"parameters"} if config == "zero3_offload" else set()
        )
    traffic = theory.traffic(ds_config, rank["facts"])
    assert sent == pytest.approx(traffic.total, rel=0.05, abs=1e-9)
    if ranks > 1 and preset == "paper" and accumulation == 1:
        assert sent == pytest.approx(traffic.paper, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("config", WITH_ADAPTER)
def test_frozen_weights_cost_neither_gradients_nor_optimizer_states(measured: Path, config: str) -> None:
    """Of a model like SmolLM2 with an adapter, in bf16: 2 bytes of gradients and 12 of states for what is trained."""
    ds_config = json.loads((measured / f"{config}_paper_2_bf16-2.json").read_text())
    for rank in ranks_of(measured, f"lora_{config}", 2):
        held = {kind: sum(places.values()) for kind, places in rank["held"].items()}
        trained, whole, stage = (rank["facts"][name] for name in ("trained", "parameters", "stage"))
        assert trained < whole / 20
        assert held["gradients"] <= 2 * 1.1 * trained and held["optimizer"] <= 12 * 1.1 * trained
        assert held["parameters"] == pytest.approx(2 * whole / (2 if stage == 3 else 1), rel=0.05)
        expected = theory.states(ds_config, rank["facts"])
        assert {kind: held[kind] for kind in theory.KINDS} == {
            kind: pytest.approx(expected[kind].total, rel=0.05) for kind in theory.KINDS
        }


@pytest.fixture(scope="module", params=SHARING)
def sharing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder as that of `measured`, of the configs of SHARING. DeepSpeed keeps its tensor-parallel groups until a
    process ends, so these have launches of their own."""
    folder, ranks = tmp_path_factory.mktemp("sharing"), request.param
    for form, more in (("tp2", ""), ("sp2", ""), ("ep2", ",architecture=mixtral,num_experts=4"), ("pp2", "")):
        arguments = []
        for config in (config for config in SHARING[ranks] if config.startswith(form)):
            source = "pipeline_lm/zero1" if form == "pp2" else f"causal_lm/{form}_zero3"
            ds_config = json.loads((ROOT / "ds_configs" / f"{source}.json").read_text())
            ds_config["zero_optimization"]["stage"] = int(config[-1])
            ds_config["train_micro_batch_size_per_gpu"] = 2
            path = folder / f"{config}-{ranks}.json"
            path.write_text(json.dumps(ds_config))
            arguments.append(f"{config}:{path}:{WIDE},batch_size={BATCH},num_heads=4{more}")
        run_ranks(ranks, "measure_worker", folder, *arguments)
    return folder, ranks


@pytest.mark.slow
def test_of_what_ranks_share_too(sharing: tuple[Path, int]) -> None:
    folder, ranks = sharing
    for config in SHARING[ranks]:
        ds_config = json.loads((folder / f"{config}-{ranks}.json").read_text())
        sent = {"logged": 0.0, "logged_activations": 0.0}
        by_rank = ranks_of(folder, config, ranks)
        for rank in by_rank:
            expected = theory.states(ds_config, rank["facts"])
            assert {kind: sum(rank["held"][kind].values()) for kind in theory.KINDS} == {
                kind: pytest.approx(expected[kind].total, rel=0.01) for kind in theory.KINDS
            }, config
            for name in sent:
                sent[name] += sum(theory.wire_bytes(rank[name]).values()) / ranks
        facts = mean_facts(by_rank)
        activations = theory.activation_traffic(facts)
        assert sent["logged"] == pytest.approx(theory.traffic(ds_config, facts).total, rel=0.05), config
        assert sent["logged_activations"] == pytest.approx(activations.total, rel=0.01) and activations.total > 0
        # By the papers: tokens x width x 4 bytes, four times in each of 2 layers and twice for the vocabulary; or eight
        # times in each layer, of half of the tokens. With two ranks, an all-reduce sends all of it, an all-to-all half.
        all_of_it = BATCH * 64 / (ranks / 2) * 384 * 4
        # Or four times in each layer, of half of the tokens, each for two experts. Or once, to the other stage.
        times = {"tp2": 4 * 2 + 2, "sp2": 8 * 2 / 2 / 2, "ep2": 4 * 2 / 2, "pp2": 1}[config[:3]]
        assert activations.paper == pytest.approx(times * all_of_it)


@pytest.mark.slow
def test_time_and_operations_are_counted(measured: Path) -> None:
    fast, slow = (ranks_of(measured, f"{name}_default_1_fp32", 1)[0] for name in ("zero0", "slow"))
    for phase, seconds in SLOW.items():
        longer = statistics.median(step[phase] for step in slow["seconds"][1:]) - statistics.median(
            step[phase] for step in fast["seconds"][1:]
        )
        assert longer == pytest.approx(seconds, abs=0.04), phase
    # A token costs a multiplication and an addition for each weight of each matrix but the embeddings, and, in each
    # layer, for each number of the keys and values of the tokens that it attends to.
    width, layers, length, tokens = 384, 2, 64, BATCH * 64
    matrices = fast["facts"]["parameters"] - 300 * width - (2 * layers + 1) * width
    assert fast["forward_flops"] == 2 * tokens * (matrices + layers * 2 * length * width)
    assert fast["peak_host_bytes"] > 100e6


def test_a_pass_that_is_done_again_counts_once(tmp_path: Path) -> None:
    """With accumulation, semantic_search runs all micro-batches without gradients, then each again with gradients."""
    meter, layer, rows = Meter(tmp_path, INSPECTED + 2, goes_on=False), torch.nn.Linear(3, 5), torch.ones(7, 3)
    meter.step = INSPECTED
    forward = meter.forward(layer, layer.forward)
    with torch.no_grad():
        forward(rows)
    assert meter.flops == 0
    forward(rows)
    assert meter.flops == 2 * 7 * 3 * 5
    offsets = torch.tensor([4, 4, 7], dtype=torch.int32)  # 4 rows for the first of three experts, none for the second
    experts = meter.forward(layer, lambda rows: torch.nn.functional.grouped_mm(rows, torch.ones(3, 8, 4), offs=offsets))
    experts(torch.ones(7, 8, requires_grad=True))
    assert meter.flops == 2 * 7 * 3 * 5 + 2 * 7 * 8 * 4  # an expert that has no rows costs nothing


# The command

COMMAND = [
    "text_classification",
    "--quick",
    "--ranks",
    "2",
    "--steps",
    "8",
    "--ds_configs",
    "good.json,coarse.json,greedy.json",
]


def run_compare(folder: Path, *arguments: Any, expect: int = 0) -> str:
    done = execute([ROOT / "launch.sh", "compare", *arguments], cwd=folder, PATH=f"{SCRIPTS}:/usr/bin:/bin")
    assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def only_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("compare-*")
    return found


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder in which it ran, what it printed) of a comparison that was stopped once and resumed.

    It has a config that runs, one with smaller micro-batches, and one that asks for more memory than the machine has.
    """
    folder = tmp_path_factory.mktemp("comparison")
    good = json.loads((ROOT / "ds_configs" / "text_classification" / "zero2.json").read_text())
    (folder / "good.json").write_text(json.dumps(good))
    (folder / "coarse.json").write_text(json.dumps(zero(1) | {"train_micro_batch_size_per_gpu": 2}))
    (folder / "greedy.json").write_text(
        json.dumps(zero(3, reduce_bucket_size=10**13) | {"train_micro_batch_size_per_gpu": "auto"})
    )
    command = [str(ROOT / "launch.sh"), "compare", *COMMAND]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[1/6]") and " in all" in line:  # the run's last line, not a sign that it goes on
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130, rest
    assert "--resume goes on" in rest
    first = only_folder(folder) / "good-2ranks" / "round1" / "rank-0.json"
    before = first.stat().st_mtime_ns
    printed = run_compare(folder, *COMMAND, "--resume")
    assert first.stat().st_mtime_ns == before, "what had ended was run again"
    return folder, printed


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder in which it ran, what it printed) of a comparison of one config on 1 and 2 ranks."""
    folder = tmp_path_factory.mktemp("scaling")
    return folder, run_compare(
        folder,
        "causal_lm",
        "--quick",
        "--ranks",
        "1,2",
        "--steps",
        "6",
        "--rounds",
        "1",
        "--stages",
        "2",
        "--preset",
        "paper",
    )


@pytest.mark.slow
def test_a_config_that_fails_is_a_row_with_its_reason(comparison: tuple[Path, str]) -> None:
    folder, printed = comparison
    rows = {row["config"]: row for row in collect(only_folder(folder)).rows}
    assert list(rows) == ["good", "coarse", "greedy"]
    assert "memory" in rows["greedy"]["failed"]
    assert f"greedy: failed: {rows['greedy']['failed']}" in printed
    for config in ("good", "coarse"):
        assert rows[config]["failed"] is None
        assert rows[config]["timed_steps"] == 5 + 5
        assert rows[config]["checkpoint_bytes"] > 12 * rows[config]["parameters"]
    assert not list(only_folder(folder).glob("**/*.safetensors")), "models and checkpoints stay on the disk"


@pytest.mark.slow
def test_losses_that_leave_the_path_are_an_alarm(comparison: tuple[Path, str]) -> None:
    """No accepted DeepSpeed JSON changes the losses, so the test changes a run's recorded losses and reports again."""
    folder, printed = comparison
    assert "left the path" not in printed
    other = folder / "left"
    shutil.copytree(only_folder(folder), other)
    metrics = other / "coarse-2ranks" / "round1" / "metrics.jsonl"
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    for entry in entries:
        if "loss" in entry and entry["step"] >= 5:
            entry["loss"] *= 1 + 1e-4
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    printed = run_compare(folder, other)
    good, coarse = collect(other).good()
    page = (other / "report.html").read_text()
    assert coarse["loss_left_at_step"] == 5 and "coarse left the path of the losses at step 5" in printed
    assert 'class="card alarm">coarse left the path' in page
    assert good["loss_left_at_step"] is None and "good left the path" not in page


@pytest.mark.slow
def test_a_config_is_compared_on_several_ranks(scaling: tuple[Path, str]) -> None:
    folder, printed = scaling
    one, two = collect(only_folder(folder)).good()
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["loss_difference_over_ranks"] == 0 < two["loss_difference_over_ranks"] < 1e-5
    assert two["loss_left_at_step"] is None and two["step_ratio"] == 1
    assert two["traffic_passes"] == pytest.approx(2, rel=0.05), "the preset was not applied"
    assert "zero2 on " in printed


@pytest.mark.slow
def test_an_older_comparison_is_laid_beside_and_listed(comparison: tuple[Path, str]) -> None:
    folder, _ = comparison
    new = only_folder(folder)
    old = folder / "elsewhere"
    shutil.copytree(new, old)
    spec = json.loads((old / "comparison.json").read_text())
    spec["versions"]["torch"] = "1.0"
    (old / "comparison.json").write_text(json.dumps(spec))
    for path in old.glob("coarse-2ranks/round*/rank-0.json"):
        measured = json.loads(path.read_text())
        measured["seconds"] = [{phase: 2 * seconds for phase, seconds in step.items()} for step in measured["seconds"]]
        path.write_text(json.dumps(measured))
    printed = run_compare(folder, new, "--with", old)
    assert re.search(r"torch: 1\.0 -> 2\.", printed)
    with (new / "with.csv").open() as file:
        ratios = {(row["config"], row["ranks"], row["column"]): row["ratio"] for row in csv.DictReader(file)}
    assert float(ratios["coarse", "2", "step_ms"]) == pytest.approx(0.5)
    assert float(ratios["good", "2", "step_ms"]) == pytest.approx(1)
    page = (new / "report.html").read_text()
    assert "Beside elsewhere" in page
    on_page = re.findall(r'data-with="good:2:step_ms:(\w+)">([^<]+)<', page)
    with (new / "with.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["config"] == "good" and row["column"] == "step_ms")
    assert on_page == [
        ("old", written(float(row["old"]), "ms")),
        ("new", written(float(row["new"]), "ms")),
        ("ratio", written(float(row["ratio"]), "ratio")),
    ]
    listed = run_compare(folder, "--list")
    assert f"runs/{new.name}" in listed and "good, coarse, greedy; ranks 2" in listed and "still to do" not in listed


@pytest.mark.slow
@pytest.mark.parametrize("which", ["comparison", "scaling"])
@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_the_page_in_a_browser(request: pytest.FixtureRequest, which: str, width: int, scheme: Any) -> None:
    """The page has no script error, loads nothing, does not scroll sideways, and draws charts in the scheme's colors.

    Every number on it is that of results.csv.
    """
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        assert "CI" not in os.environ, ".ci/run installs Chromium"
        pytest.skip("there is no Chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    folder = only_folder(request.getfixturevalue(which)[0])
    results = collect(folder)
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            viewport={"width": width, "height": 844}, color_scheme=scheme
        )
        problems: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda asked: requests.append(asked.url))
        page.goto((folder / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        charts = page.evaluate("""[...document.querySelectorAll('figure')].map(figure => {
            const box = figure.querySelector('svg').getBoundingClientRect();
            const heights = [...figure.querySelectorAll('text')].map(text => text.getBoundingClientRect().height);
            const smallest = Math.min(...heights.filter(height => height > 0));
            return [figure.id, box.width, box.height, figure.querySelectorAll('path').length, smallest];
        })""")
        assert page.evaluate(
            "[...document.querySelectorAll('data')].every(data => data.dataset.row || data.dataset.with)"
        )
        shown = page.evaluate(
            "[...document.querySelectorAll('data[data-row]')]"
            ".map(data => [data.dataset.row, data.dataset.column, data.textContent])"
        )
        in_charts = page.evaluate(
            "[...document.querySelectorAll('svg g[id*=\":\"]')].map(group => [group.id, group.textContent.trim()])"
        )
        ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert problems == []
    assert requests == [(folder / "report.html").as_uri()]
    assert {name for name, *_ in charts} == {
        f"chart-{name}"
        for name in ["memory", "speed", "step_time", "losses", "traffic", *(["scaling"] if which == "scaling" else [])]
    }
    for name, chart_width, height, paths, smallest in charts:
        assert chart_width > 250 and height > 100 and paths > 10, name
        assert smallest > 7, f"{name} has text that cannot be read"
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) == (scheme == "dark")

    with (folder / "results.csv").open() as file:
        cells = {f"{row['config']}:{row['ranks']}": row for row in csv.DictReader(file)}
    kinds = {column.name: column.kind for column in results.columns()}

    def in_csv(row: str, column: str) -> str:
        value: Any = cells[row][column]
        return written(value if kinds[column] == "text" else float(value), kinds[column])

    assert len(shown) > 100
    for row, column, text in shown:
        assert text == in_csv(row, column), (row, column)
    assert len(in_charts) == 6  # memory, traffic and step time, each for two rows
    for name, text in in_charts:
        _, config, ranks, column = name.split(":")
        assert text == in_csv(f"{config}:{ranks}", column), name


@pytest.mark.slow
def test_sentences_and_files_are_there(comparison: tuple[Path, str]) -> None:
    folder, printed = comparison
    results = collect(only_folder(folder))
    three = [plain(sentence, results) for sentence in sentences(results)]
    assert len(three) == 3 and all(sentence in printed for sentence in three)
    assert three[0].startswith(("Take good", "Take coarse")) and "greedy failed." in three[1]
    markdown = (only_folder(folder) / "report.md").read_text()
    for name in re.findall(r"\((charts/\w+\.png)\)", markdown):
        assert (only_folder(folder) / name).stat().st_size > 10_000
        assert (only_folder(folder) / name).with_suffix(".svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "name a recipe"),
        (["causal_ml"], "did you mean 'causal_lm'?"),
        (["causal_lm", "--stages", "4"], "zero4.json"),
        (["causal_lm", "--stages", "0,0"], "same name"),
        (["causal_lm", "--stages", "0", "--ds_configs", "x.json"], "give one of them"),
        (["causal_lm", "--ranks", "2,2"], "each once"),
        (["causal_lm", "--steps", "3"], "at least 5"),
        (["causal_lm", "--resume"], "leave --resume out"),
        (["causal_lm", "--with", "nowhere"], "has no comparison.json"),
        # slow: it imports the recipe
        pytest.param(["causal_lm", "--max_steps", "9"], "use --steps", marks=pytest.mark.slow),
        (["causal_lm", "--rounds", "0"], "at least"),
        (["causal_lm", "--ds_configs", "elsewhere/zero2.json"], "there is no elsewhere/zero2.json"),
        # slow: it imports the recipe
        pytest.param(["causal_lm", "--deepspeed_config", "x.json"], "--ds_configs", marks=pytest.mark.slow),
        (["--learning_rate", "1e-4", "causal_lm"], "the recipe comes first"),
        (["causal_lm", "--learning_rat", "9"], "did you mean '--learning_rate'?"),
        # slow: it imports the recipe
        pytest.param(["causal_lm", "--ranks", "3"], "3 does not divide it", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(says)) as problem:
        compare.main(arguments)
    assert "\n" not in str(problem.value)
    assert not list(tmp_path.glob("runs/*")), "a comparison was begun"


def test_numbers_are_written_alike() -> None:
    cases = {
        "bytes": (318_028_144, "318 MB"),
        "count": (1337.6, "1,338"),
        "ms": (24.84, "24.8 ms"),
        "small": (8.3e-7, "8e-07"),
        "percent": (0.4312, "43.1 %"),
        "ratio": (1.3, "1.30"),
    }
    assert {kind: written(value, kind) for kind, (value, _) in cases.items()} == {
        kind: text for kind, (_, text) in cases.items()
    }
    assert (
        written(999_960_000, "bytes") == "1.00 GB"
        and written(None, "bytes") == "-"
        and written(math.inf, "small") == "not finite"
    )
