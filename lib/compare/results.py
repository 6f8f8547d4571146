"""The results of a comparison: one row for each config and number of ranks, read from the comparison's folder.

lib/compare/measure.py and the runs have left their files there. A row is a dictionary with a value for each of COLUMNS,
None where a column does not apply. results.csv has these rows, and every number in the report and on the terminal is a
value of a row.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.compare import theory
from lib.errors import UserError, display_path

Row = dict[str, Any]
# Relative differences of a loss up to this are rounding.
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 2e-3, "fp16": 2e-3}
BUBBLE_OFF = 0.05  # of a step; a bubble that is larger by more is noted
STATES_OFF, TRAFFIC_OFF = 0.01, 0.05  # a figure that differs from theory by a larger part is not described by theory
NOTED = 0.01  # differences from the paper that are larger than this part of the paper's figure are noted
# The step that lib/compare/measure.py inspects. By then the optimizer's states exist, and stage 3 knows the order in
# which the modules are used.
INSPECTED = 3
PHASES = ("forward", "backward", "waiting", "optimizer", "data", "other")  # the parts of a step's time
TRAFFIC = {
    "all_reduce": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "reduce": "reduce",
    "all_gather": "all-gather",
    "activations": "activations",
    "other_traffic": "other",
}
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
FLOP_UNITS = ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1, "FLOP/s"))


@dataclass(frozen=True)
class Column:
    name: str
    kind: str  # how a value is written: bytes, ms, s, count, flops, ratio, percent, small, passes, score, text
    about: str


COLUMNS = [
    Column("config", "text", "the DeepSpeed config"),
    Column("ranks", "count", "processes, one a device"),
    Column("failed", "text", "why there are no figures"),
    Column("stage", "count", "ZeRO stage"),
    Column("precision", "text", "of the forward and backward pass"),
    Column("parameters", "count", "of the whole model"),
    Column("micro_batch_size", "count", "rows that a rank computes at once"),
    Column("accumulation_steps", "count", "micro-batches an optimizer step"),
    Column("states_bytes", "bytes", "model states on a rank, device and host together"),
    Column("states_theory_bytes", "bytes", "the same, as this DeepSpeed config should have them"),
    Column("states_paper_bytes", "bytes", "the same, by the ZeRO paper"),
    Column("states_device_bytes", "bytes", "model states on a rank's device"),
    Column("states_host_bytes", "bytes", "model states that a rank keeps in host memory"),
    *(
        Column(f"{kind}_{place}bytes", "bytes", f"{what} on a rank{about}")
        for kind, what in (
            ("parameters", "parameters"),
            ("gradients", "gradients"),
            ("optimizer", "optimizer states and fp32 copies of the weights"),
        )
        for place, about in (
            ("device_", "'s device"),
            ("host_", ", in host memory"),
            ("theory_", ", as this config should have them"),
            ("paper_", ", by the paper"),
        )
    ),
    Column(
        "gathered_parameters_bytes", "bytes",
        "parameters on a rank at the end of the forward pass, those that stage 3 has gathered included",
    ),
    Column(
        "peak_device_bytes", "bytes",
        "most memory that the device's allocator gave out, from the start to the last step",
    ),
    Column("peak_host_bytes", "bytes", "most host memory of a rank's process in the timed steps, libraries included"),
    Column("step_ms", "ms", "an optimizer step, median"),
    Column("step_p10_ms", "ms", "an optimizer step, 10th percentile"),
    Column("step_p90_ms", "ms", "an optimizer step, 90th percentile"),
    Column("forward_ms", "ms", "forward pass and loss, mean a step"),
    Column("backward_ms", "ms", "backward pass, with the collectives that it waits for, mean a step"),
    Column("waiting_ms", "ms", "waiting for other stages of a pipeline, and sending to them, mean a step"),
    Column("optimizer_ms", "ms", "optimizer step, with its collectives, mean a step"),
    Column("data_ms", "ms", "waiting for the batch, mean a step"),
    Column("other_ms", "ms", "the rest of the loop, mean a step"),
    Column(
        "bubble", "percent",
        "part of the time from a pipeline's first forward to its last backward pass in which a stage computes neither,"
        " mean over stages",
    ),
    Column("bubble_theory", "percent", "the same, where all stages take equally long and sending takes no time"),
    Column(
        "step_ratio", "ratio",
        "step time over that of the first config on as many ranks: median over the same steps, mean of the rounds",
    ),
    Column("step_ratio_low", "ratio", "the same, of the round where it was lowest"),
    Column("step_ratio_high", "ratio", "the same, of the round where it was highest"),
    Column("tokens_per_second", "count", "over all ranks: tokens of the timed steps over their seconds"),
    Column("model_flops_per_second", "flops", "three times the forward pass's matrix operations, over all ranks"),
    Column("mfu", "percent", "model FLOP/s over the devices' peak"),
    *(
        Column(f"{name}_bytes", "bytes", f"sent by a rank in a step: {what}")
        for name, what in TRAFFIC.items()
    ),
    Column(
        "activations_theory_bytes", "bytes",
        "activations and their gradients, which ranks that share layers or rows send each other, as they should be",
    ),
    Column("traffic_bytes", "bytes", "sent by a rank in a step, as ring collectives"),
    Column("traffic_theory_bytes", "bytes", "the same, as this config should have it"),
    Column("traffic_paper_bytes", "bytes", "the same, by the ZeRO paper"),
    Column("traffic_passes", "passes", "without activations, in passes over the parameters: the paper has 2, 3"),
    Column("loss_first", "score", "training loss at the first step"),
    Column("loss_last", "score", "training loss at the last step"),
    Column(
        "loss_difference", "small",
        "largest relative difference of a step's loss from that of the first config on as many ranks",
    ),
    Column("loss_left_at_step", "count", "first step whose difference is more than rounding"),
    Column(
        "loss_difference_over_ranks", "small",
        "largest relative difference of a step's loss from that of the same config on the first number of ranks",
    ),
    Column("checkpoint_bytes", "bytes", "a checkpoint, of all ranks"),
    Column("checkpoint_seconds", "s", "for which training waits while it is saved"),
    Column("timed_steps", "count", "steps that were timed, over all rounds"),
    Column("states_share", "percent", "states of a rank over those of the first config on as many ranks"),
]  # fmt: skip


@dataclass
class Results:
    folder: Path
    spec: dict[str, Any]  # comparison.json
    rows: list[Row]
    losses: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # (config, ranks) -> the loss of each step
    # (a difference from the paper, such as "more traffic", and the reason) -> the configs that have it
    notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    on_gpu: bool = False
    device: str = ""
    model: str = ""

    @property
    def peak(self) -> str:
        """The column of the memory that must suffice: the device's peak; on a CPU that of a rank's process."""
        return "peak_device_bytes" if self.on_gpu else "peak_host_bytes"

    def good(self) -> list[Row]:
        return [row for row in self.rows if row["failed"] is None]

    def first_on_as_many_ranks(self, row: Row) -> Row:
        """The row of the first config on as many ranks, with which `row` is compared."""
        return next(other for other in self.good() if other["ranks"] == row["ranks"])

    def loss_differences(self, row: Row, other: Row) -> list[float]:
        """The relative difference of two rows' losses at each step."""
        pairs = zip(
            self.losses[row["config"], row["ranks"]], self.losses[other["config"], other["ranks"]], strict=False
        )
        return [relative(loss, reference) for loss, reference in pairs]

    def note(self, row: Row, what: str, why: str) -> None:
        configs = self.notes.setdefault((what, why), [])
        if row["config"] not in configs:
            configs.append(row["config"])

    def not_described(self, row: Row, what: str) -> None:
        self.note(
            row,
            f"other {what} than by theory",
            "this config does something that lib/compare/theory.py does not know; the measured figure is what counts",
        )

    def columns(self) -> list[Column]:
        """COLUMNS, and the recipe's own scores."""
        scores = sorted({name for row in self.rows for name in row if name.startswith("score_")})
        return COLUMNS + [
            Column(name, "score", f"{name.removeprefix('score_')} on the test rows after the last step")
            for name in scores
        ]


def read_spec(folder: Path) -> dict[str, Any]:
    """The comparison.json that lib/compare/compare.py wrote: what is compared. Raises UserError without a valid one."""
    try:
        return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{display_path(folder)} is not the folder of a comparison: it has no comparison.json that can be read"
        ) from None


def collect(folder: Path) -> Results:
    """The results in a comparison's folder, which may be incomplete. Raises UserError if a file is broken."""
    spec = read_spec(folder)
    results = Results(folder, spec, [])
    timings: dict[tuple[str, int], dict[tuple[int, int], float]] = {}
    for ranks in spec["ranks"]:
        for config in spec["configs"]:
            try:
                row, losses, seconds = _row(folder, spec, config, ranks, results=results)
            except (OSError, ValueError, KeyError, IndexError) as error:
                raise UserError(
                    f"{display_path(folder)}: what {config} on {ranks} ranks left is not whole"
                    f" ({type(error).__name__}: {error}); delete {config}-{ranks}ranks/ in it and --resume"
                ) from None
            if row is not None:
                results.rows.append(row)
                results.losses[config, ranks] = losses
                timings[config, ranks] = seconds
    _compare_with_first(results, timings)
    return results


def case_folder(folder: Path, config: str, ranks: int, round_number: int) -> Path:
    return folder / f"{config}-{ranks}ranks" / f"round{round_number}"


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """How a run ended: {"failed": the reason or None, ...}; None where the run has not ended."""
    try:
        return json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def missing_runs(folder: Path, spec: dict[str, Any]) -> int:
    """How many runs of a comparison have not ended. A config that failed in the first round is not run again."""
    missing = 0
    for config in spec["configs"]:
        for ranks in spec["ranks"]:
            outcomes = [
                read_outcome(case_folder(folder, config, ranks, number)) for number in range(1, spec["rounds"] + 1)
            ]
            if outcomes[0] is None or not outcomes[0]["failed"]:
                missing += sum(outcome is None or bool(outcome["failed"]) for outcome in outcomes)
    return missing


def _row(
    folder: Path, spec: dict[str, Any], config: str, ranks: int, *, results: Results
) -> tuple[Row | None, list[float], dict[tuple[int, int], float]]:
    """(row, losses, {(round, step): seconds}) of a config on a number of ranks; no row if the first run has not ended.

    Also fills in the device, the model and the notes of `results`.
    """
    runs = [(number, case_folder(folder, config, ranks, number)) for number in range(1, spec["rounds"] + 1)]
    outcomes = [read_outcome(run) for _, run in runs]
    if outcomes[0] is None:
        return None, [], {}
    row: Row = {column.name: None for column in COLUMNS} | {
        "config": config,
        "ranks": ranks,
        "precision": spec["precision"],
    }
    if outcomes[0]["failed"]:
        return row | {"failed": outcomes[0]["failed"]}, [], {}
    measured = [json.loads((runs[0][1] / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    measured = [_with_what_is_new(rank) for rank in measured]
    facts = measured[0]["facts"]
    results.on_gpu, results.device, results.model = facts["device_bytes"] is not None, facts["device"], facts["model"]
    row |= {name: facts[name] for name in ("stage", "micro_batch_size", "accumulation_steps")}
    row["parameters"] = facts["whole_parameters"]
    ds_config = json.loads((runs[0][1] / "ds_config.json").read_text(encoding="utf-8"))  # each "auto" is filled in
    _add_states(row, ds_config, measured, results)
    _add_traffic(row, ds_config, measured, results)

    metrics = [json.loads(line) for line in (runs[0][1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [entry for entry in metrics if "loss" in entry]
    losses = [math.nan if entry["loss"] is None else entry["loss"] for entry in steps]
    tokens = {entry["step"]: entry["tokens"] for entry in steps}
    row |= {"loss_first": losses[0], "loss_last": losses[-1]}
    row |= {f"score_{name}": value for name, value in measured[0].get("scores", {}).items()}
    row |= {name: measured[0].get(name) for name in ("checkpoint_bytes", "checkpoint_seconds")}
    row["peak_host_bytes"] = max(rank["peak_host_bytes"] for rank in measured)
    if results.on_gpu:
        row["peak_device_bytes"] = max(rank["peak_device_bytes"] for rank in measured)

    _add_bubble(row, measured, results)
    phases: dict[tuple[int, int], dict[str, float]] = {}  # (round, step) -> {phase: seconds}, for the timed steps
    for (number, run), outcome in zip(runs, outcomes, strict=True):
        if outcome is not None and not outcome["failed"]:
            seconds = _with_what_is_new(json.loads((run / "rank-0.json").read_text(encoding="utf-8")))["seconds"]
            phases |= {(number, step): seconds[step - 1] for step in range(INSPECTED + 1, len(seconds) + 1)}
    totals = {round_and_step: sum(phase_seconds.values()) for round_and_step, phase_seconds in phases.items()}
    row["timed_steps"] = len(totals)
    row["step_p10_ms"], row["step_ms"], row["step_p90_ms"] = (
        1000 * float(value) for value in np.quantile(list(totals.values()), (0.1, 0.5, 0.9))
    )
    row |= {f"{phase}_ms": 1000 * statistics.fmean(split[phase] for split in phases.values()) for phase in PHASES}
    row["tokens_per_second"] = sum(tokens[step] for _, step in totals) / sum(totals.values())
    flops_per_token = 3 * sum(rank["forward_flops"] for rank in measured) / max(1, tokens[INSPECTED])
    row["model_flops_per_second"] = flops_per_token * row["tokens_per_second"]
    peak = theory.peak_flops(facts["device"], row["precision"])
    row["mfu"] = row["model_flops_per_second"] / (peak * ranks) if peak else None
    return row, losses, totals


def _add_bubble(row: Row, measured: list[dict[str, Any]], results: Results) -> None:
    """Add the part of the time in which stages of a pipeline are idle: measured, and (p - 1) / (m + p - 1) of p stages
    and m micro-batches (Huang et al. 2019, "GPipe", section 2)."""
    stages = measured[0]["facts"]["pipeline_size"]
    if stages == 1:
        return
    parts = []
    for step in range(INSPECTED, len(measured[0]["seconds"])):
        computing = [rank["seconds"][step]["forward"] + rank["seconds"][step]["backward"] for rank in measured]
        # From the first stage's first forward pass to its last backward pass; other stages end earlier.
        whole = max(
            seconds + rank["seconds"][step]["waiting"] for seconds, rank in zip(computing, measured, strict=True)
        )
        parts.append(1 - statistics.fmean(computing) / whole)
    row["bubble"] = statistics.median(parts)
    row["bubble_theory"] = (stages - 1) / (row["accumulation_steps"] + stages - 1)
    if row["bubble"] > row["bubble_theory"] + BUBBLE_OFF:
        why = (
            "stages take different times, as the last one has the output layer and the loss, and sending takes time too"
        )
        results.note(row, "a larger bubble", why)


def mean_facts(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of a rank; in a pipeline, whose stages differ, those of the mean rank."""
    facts = dict(measured[0]["facts"])
    if facts["pipeline_size"] > 1:
        for name in ("parameters", "trained", "in_modules", "copied", "passed_on"):
            facts[name] = statistics.fmean(rank["facts"][name] for rank in measured)
    return facts


def _with_what_is_new(measured: dict[str, Any]) -> dict[str, Any]:
    """What a rank measured, completed where that was before there were other forms of parallelism."""
    facts = {"pipeline_size": 1, **measured["facts"]}
    seconds = [{"waiting": 0.0, **phases} for phases in measured["seconds"]]
    measured = measured | {"facts": facts, "seconds": seconds}
    if "zero_ranks" in facts:
        return measured
    sizes = {"zero_ranks": facts["world_size"], "tensor_size": 1, "sequence_size": 1}
    whole = {"whole_parameters": facts["parameters"], "whole_trained": facts["trained"]}
    facts = {**facts, **sizes, **whole, "attention_outputs": 0, "exchanged": 0}
    return measured | {
        "facts": facts,
        "logged": {str(facts["world_size"]): measured["logged"]},
        "logged_activations": {},
    }


def _add_states(row: Row, ds_config: dict[str, Any], measured: list[dict[str, Any]], results: Results) -> None:
    """Add the model states of the rank that has the most."""
    rank = max(measured, key=lambda rank: sum(sum(places.values()) for places in rank["held"].values()))
    expected = theory.states(ds_config, rank["facts"])
    for kind in theory.KINDS:
        row[f"{kind}_device_bytes"], row[f"{kind}_host_bytes"] = (
            rank["held"][kind]["device"],
            rank["held"][kind]["host"],
        )
        row[f"{kind}_theory_bytes"], row[f"{kind}_paper_bytes"] = expected[kind].total, expected[kind].paper
    for place in ("device", "host", "theory", "paper"):
        row[f"states_{place}_bytes"] = sum(row[f"{kind}_{place}_bytes"] for kind in theory.KINDS)
    row["states_bytes"] = row["states_device_bytes"] + row["states_host_bytes"]
    row["gathered_parameters_bytes"] = sum(rank["gathered_parameters"].values())
    for kind in theory.KINDS:
        for amount, why in expected[kind].differences:
            if abs(amount) > NOTED * row["states_paper_bytes"]:
                results.note(
                    row,
                    f"{'more' if amount > 0 else 'less'} memory for"
                    f" {'optimizer states' if kind == 'optimizer' else kind}",
                    why,
                )
    if abs(row["states_bytes"] - row["states_theory_bytes"]) > STATES_OFF * row["states_theory_bytes"]:
        results.not_described(row, "memory")


def _add_traffic(row: Row, ds_config: dict[str, Any], measured: list[dict[str, Any]], results: Results) -> None:
    """Add what a rank sends in the inspected step, the mean over ranks."""
    facts = mean_facts(measured)
    ranks = facts["zero_ranks"]
    sent = [theory.wire_bytes(rank["logged"]) for rank in measured]
    activations = [sum(theory.wire_bytes(rank["logged_activations"]).values()) for rank in measured]
    kinds = {
        "all_reduce": "all_reduce",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter": "reduce_scatter",
        "reduce": "reduce",
    }
    kinds |= {"all_gather_into_tensor": "all_gather", "all_gather": "all_gather"}
    row |= {f"{kind}_bytes": 0.0 for kind in TRAFFIC}
    for sent_by_rank in sent:
        for op, value in sent_by_rank.items():
            row[f"{kinds.get(op, 'other_traffic')}_bytes"] += value / len(sent)
    row["activations_bytes"] = statistics.fmean(activations)
    expected, shared = theory.traffic(ds_config, facts), theory.activation_traffic(facts)
    row["traffic_bytes"] = sum(row[f"{kind}_bytes"] for kind in TRAFFIC)
    row["activations_theory_bytes"] = shared.total
    row["traffic_theory_bytes"], row["traffic_paper_bytes"] = (
        expected.total + shared.total,
        expected.paper + shared.paper,
    )
    if ranks > 1:
        one_pass = facts["element_bytes"] * facts["parameters"] * (ranks - 1) / ranks
        row["traffic_passes"] = (row["traffic_bytes"] - row["activations_bytes"]) / one_pass
    for amount, why in expected.differences + shared.differences:
        if abs(amount) > NOTED * row["traffic_paper_bytes"]:
            results.note(row, f"{'more' if amount > 0 else 'less'} traffic", why)
    if abs(row["traffic_bytes"] - row["traffic_theory_bytes"]) > TRAFFIC_OFF * row["traffic_theory_bytes"]:
        results.not_described(row, "traffic")


def _compare_with_first(results: Results, timings: dict[tuple[str, int], dict[tuple[int, int], float]]) -> None:
    """Compare each row with the first config on as many ranks.

    Its losses are also compared with those of the same config on the first number of ranks.
    timings: {(config, ranks): {(round, step): seconds}}.
    """
    tolerance = TOLERANCE[results.spec["precision"]]
    for row in results.good():
        key = (row["config"], row["ranks"])
        first = results.first_on_as_many_ranks(row)
        on_first_ranks = next(other for other in results.good() if other["config"] == row["config"])
        differences = results.loss_differences(row, first)
        row["loss_difference"] = max(differences)
        row["loss_left_at_step"] = next(
            (step for step, value in enumerate(differences, 1) if not value <= tolerance), None
        )
        row["loss_difference_over_ranks"] = (
            max(results.loss_differences(row, on_first_ranks)) if len(results.spec["ranks"]) > 1 else None
        )
        base = timings[first["config"], first["ranks"]]
        ratios: dict[int, list[float]] = {}  # round -> ratio of each step; all rounds count alike
        for round_and_step, seconds in timings[key].items():
            if round_and_step in base:
                ratios.setdefault(round_and_step[0], []).append(seconds / base[round_and_step])
        medians = [statistics.median(values) for values in ratios.values()]
        row |= {
            "step_ratio": statistics.fmean(medians),
            "step_ratio_low": min(medians),
            "step_ratio_high": max(medians),
        }
        row["states_share"] = row["states_bytes"] / first["states_bytes"]


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|; 0 where both are not finite."""
    if not math.isfinite(value) or not math.isfinite(reference):
        return 0.0 if math.isfinite(value) == math.isfinite(reference) else math.inf
    return abs(value - reference) / max(abs(reference), 1e-12)


def case_name(row: Row, results: Results) -> str:
    """The name of a row: its config, with the number of ranks where the comparison has several."""
    return row["config"] if len(results.spec["ranks"]) == 1 else f"{row['config']} on {row['ranks']}"


def written(value: Any, kind: str) -> str:
    """A value as the report and the terminal write it. Its unit is part of the text, or of the column's heading."""
    if value is None:
        return "-"
    if kind == "text":
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if kind in ("bytes", "flops"):
        units = BYTE_UNITS if kind == "bytes" else FLOP_UNITS
        size, unit = next((pair for pair in units if value >= 0.9995 * pair[0]), units[-1])
        return f"{value:.0f} {unit}" if size == 1 else f"{_three_digits(value / size)} {unit}"
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "percent":
        return f"{100 * value:.1f} %"
    if kind == "ms":
        return f"{_three_digits(value)} ms"
    if kind == "s":
        return f"{value:.2f} s"
    if kind == "small":
        return "0" if value == 0 else f"{value:.0e}"
    return f"{value:.4f}" if kind == "score" else f"{value:.2f}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
