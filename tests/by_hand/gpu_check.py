"""All that only a GPU can tell, in one go and within the minutes given:

    ./launch.sh gpu_check                     on a machine with one or more GPUs; 8 minutes
    ./launch.sh gpu_check --minutes 20        so that more of it is run
    ./launch.sh gpu_check --only speed,torch  parts of it; --recipes causal_lm,sft: of the contract

  speed     causal_lm's loop beside a bare DeepSpeed loop on decoders of 1, 0.1 and 3 B parameters at 2,048 tokens:
            MFU, overhead, the attention's kernel, peak memory
  contract  every recipe in bf16 under each of its configs beside plain PyTorch; stages 2 and 3 at 4,096 tokens
  torch     the same decoders in a bare torch loop and in the HF Trainer
  memory    states beside theory, and the peak of the device's memory, under each config
  pause     for how long saving a checkpoint of the 1 B decoder stops training
  offload   as much of a 7 B decoder as host memory has room for, with the shipped zero3_offload

What is worth most runs first. A case that fails is reported with its reason and the others go on; what no time was left
for is reported as not run. On a CPU the same cases run at tiny sizes, and what is said of speed is not judged.

Exit codes: 0 all expectations held; 1 one did not, or a case failed; 75 those that were tested held, but the time ended
before all were; 2 a mistake, said in one line.
"""

import argparse
import csv
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import contract_cases
import psutil
from contract_cases import BATCH, BF16, ROOT

from lib.compare.compare import printed, versions, why_failed, write_json
from lib.compare.results import STATES_OFF, TOLERANCE, relative, written
from lib.distributed import network
from lib.errors import FAULT, INTERRUPTED, STOPPED, UserError, display_path, new_folder, run_command
from lib.launch import devices, supervise

# What is expected. The MFU is that of a decoder of 1 B in bf16 at 2,048 tokens on an H100 or H200.
LEAST_MFU, MOST_OVERHEAD, TOLERANCE_BF16 = 0.45, 1.05, TOLERANCE["bf16"]
TABLE = ("part", "what", "measured", "target", "verdict")
PARTS = ("speed", "contract", "torch", "memory", "pause", "offload")
LEAST_SECONDS = 20.0  # a process needs as long to import all it needs; with less left, no more are started
NO_TIME = {"not_run": "no time was left"}  # the result of a case that has none
START_SECONDS = 240.0  # the first process reads several GB of libraries, from a disk or over a network
FIRST = ("zero2", "zero3")  # the configs of the contract that run first


@dataclass
class Part:
    """Cases that share processes. share: of the time given, at first; what it leaves out runs in the end if it can."""

    name: str
    cases: list[str]
    share: float
    ranks: int | None = 1  # None: a process without DeepSpeed
    most_seconds: float = 90.0  # for a case


@dataclass
class Check:
    """An expectation, or a figure without one. held: whether it was met; None: not judged, or not run."""

    part: str
    what: str
    measured: str
    target: str = ""
    held: bool | None = None
    failed: bool = False
    not_run: bool = False

    @property
    def verdict(self) -> str:
        if self.failed or self.not_run:
            return "failed" if self.failed else "not run"
        return {True: "holds", False: "DOES NOT HOLD", None: ""}[self.held]


@dataclass
class Session:
    folder: Path
    on_gpu: bool
    ranks: int
    started: float
    seconds: float
    parts: list[Part]
    recipes: list[str]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)  # {case: what its process wrote, or why not}
    first_failures: dict[str, str] = field(default_factory=dict)  # of cases that have another chance

    @property
    def end(self) -> float:
        return self.started + self.seconds


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(options, parts, recipes). Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="./launch.sh gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", metavar="PARTS", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    known = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    parser.add_argument("--recipes", metavar="LIST", default=",".join(known), help="of the contract (default: all)")
    parser.add_argument(
        "--ranks", type=int, choices=[1, 2, 4], help="of the contract (default: as many as there are GPUs for)"
    )
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        raise UserError(f"--minutes is {options.minutes:g}; it must be more than 0")
    chosen = {"only": options.only.split(","), "recipes": options.recipes.split(",")}
    for name, all_of_them in (("only", list(PARTS)), ("recipes", known)):
        for value in chosen[name]:
            if value not in all_of_them:
                raise UserError(f"--{name} has {value!r}; there are: {' '.join(all_of_them)}")
    return options, chosen["only"], chosen["recipes"]


def configs_of(recipe: str) -> list[str]:
    """The configs that are compared; none where a recipe trains a pipeline, which one device cannot."""
    names = [path.stem for path in sorted((ROOT / "ds_configs" / recipe).glob("zero*.json"))]
    return [name for name in names if "zero3" in names]


def contract_parts(folder: Path, recipes: list[str], ranks: int, on_gpu: bool) -> list[Part]:
    settings = f"{BF16},max_steps=20"

    def case(recipe: str, config: str) -> str:
        return "contract:" + contract_cases.case(folder, recipe, f"{config}_bf16", config, settings)

    def plain(recipe: str) -> str:
        return "contract:" + contract_cases.case(folder, recipe, "plain_bf16", "zero0", settings, BATCH)

    long = BF16.replace(f"={BATCH}", "=4") + (
        ",max_length=4096,hidden_size=512,intermediate_size=1408,num_layers=8,num_heads=8,max_rows=40,max_steps=10"
        if on_gpu
        else ",max_length=256,max_rows=2,max_steps=5"
    )
    long_cases = [
        "contract:" + contract_cases.case(folder, "causal_lm", f"long_{config}", config, f"{long},samples=0", 1)
        for config in FIRST
        if "causal_lm" in recipes
    ]
    trained = [recipe for recipe in recipes if configs_of(recipe)]
    plains = [plain(recipe) for recipe in trained]
    first = [case(recipe, config) for recipe in trained for config in FIRST]
    others = [case(recipe, config) for recipe in trained for config in configs_of(recipe) if config not in FIRST]
    if ranks == 1:  # one process for both, recipe by recipe
        first = [*plains, *first]
        first.sort(key=lambda case: trained.index(case.split(":")[1]))
        return [Part("contract", [*long_cases, *first], 0.3), Part("contract", others, 0.3)]
    return [
        Part("contract", plains, 0.15),
        Part("contract", [*long_cases, *first], 0.3, ranks),
        Part("contract", others, 0.3, ranks),
    ]


def plan(arguments: list[str]) -> Session:
    """Raises UserError."""
    started = time.monotonic()
    options, only, recipes = parse(arguments)
    found = devices.find()
    on_gpu = found.accelerator != "cpu"
    ranks = options.ranks or max(count for count in (1, 2, 4) if count <= max(1, len(found.ids)))
    found.launcher_options(ranks)  # raises UserError where there are fewer devices
    folder = new_folder("runs/gpu_check").resolve()
    contract = contract_parts(folder / "contract", recipes, ranks, on_gpu)
    memory = [f"memory:{name}" for name in ("zero2", "zero3", "zero0", "zero3_offload", "zero2_offload", "zero1")]
    parts = [
        Part("speed", ["speed:1B", "speed:0.1B", "speed:3B"], 0.4, most_seconds=150),
        *contract[:-1],
        Part("torch", ["torch:1B", "trainer:1B"], 0.2, ranks=None),
        Part("memory", memory, 0.2),
        contract[-1],
        Part("torch", ["torch:0.1B", "trainer:0.1B", "torch:3B", "trainer:3B"], 0.2, ranks=None),
        Part("pause", ["pause:1B"], 0.3, most_seconds=180),
        Part("offload", ["offload:7B"], 1.0, most_seconds=300),
    ]
    parts = [part for part in parts if part.name in only and part.cases]
    return Session(folder, on_gpu, ranks, started, 60 * options.minutes, parts, recipes)


def run_all(session: Session) -> None:
    """First each part in its share of the time, then, in what is left, the cases that had none."""
    for in_shares in (True, False):
        for part in session.parts:
            share = part.share if in_shares else 1.0
            run_part(session, part, min(session.end, time.monotonic() + share * session.seconds))
            write_report(session, checks_of(session))  # what there is, should this process be ended


def run_part(session: Session, part: Part, deadline: float) -> None:
    """Run the cases of a part that have not been run, in as few processes as it takes."""
    to_do = [case for case in part.cases if case not in session.found]
    while to_do and deadline - time.monotonic() > LEAST_SECONDS and not supervise.stop_signals:
        ended = launch(session, part, to_do, deadline)
        session.found |= {case: result for case, result in ended.done.items() if not result.get("failed")}
        failed = next((case for case in to_do if ended.done.get(case, {}).get("failed")), ended.begun)
        if not ended.in_time:  # what it cut off has another chance in the end
            return
        if failed is None and not ended.done:  # it did not come as far as the first case
            session.found |= {case: {"failed": ended.why} for case in to_do}
        # A case that fails after others in the same process has another chance, in one of its own.
        elif failed is not None and (failed == to_do[0] or ended.too_long):
            why = ended.done.get(failed, {}).get("failed") or ended.why
            session.found[failed] = {"failed": session.first_failures.get(failed, why)}
            say(failed, session.found[failed])
        elif failed is not None:
            session.first_failures[failed] = ended.done.get(failed, {}).get("failed") or ended.why
        to_do = [case for case in to_do if case not in session.found]


class Ended(NamedTuple):
    """How a launch ended."""

    done: dict[str, dict[str, Any]]  # {case: what its process wrote}
    begun: str | None  # the case that began and did not end
    why: str
    in_time: bool  # before the deadline
    too_long: bool  # because the case that had begun took too long


def launch(session: Session, part: Part, cases: list[str], deadline: float) -> Ended:
    """Run cases one after the other in one launch, until the deadline at the latest."""
    number = len(list(session.folder.glob("launch-*"))) + 1
    folder = session.folder / f"launch-{number}-{part.name}"
    folder.mkdir()
    results = folder / "results.jsonl"
    environment = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests" / "contract", Path(__file__).parent]))}
    arguments = [str(Path(__file__).with_name("gpu_worker.py")), str(session.folder), str(results), *cases]
    found = devices.find()
    if part.ranks is None:
        command = [sys.executable, "-u", *arguments]
        environment |= {"CUDA_VISIBLE_DEVICES": str(found.ids[0])} if found.accelerator == "cuda" else {}
    else:
        options = ["--log_level", "critical", "--master_port", str(network.free_port())]
        command = [*supervise.START_RANKS, *options, *found.launcher_options(part.ranks), *arguments]
    said: set[str] = set()
    state: dict[str, Any] = {"begun": None, "since": time.monotonic(), "read": 0.0, "over": False}

    def look() -> dict[str, dict[str, Any]]:
        lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        done = {entry["case"]: entry for entry in entries if "begins" not in entry}
        begun = next((entry["case"] for entry in entries if entry["case"] not in done), None)
        if begun != state["begun"] or done.keys() - said:
            state.update(begun=begun, since=time.monotonic())
        for case in [case for case in done if case not in said]:
            said.add(case)
            if not done[case].get("failed"):
                say(case, done[case])
        return done

    def ended() -> bool:
        if state["over"] or time.monotonic() - state["read"] < 0.5:
            return bool(state["over"])
        state["read"] = time.monotonic()
        done = look()
        state["over"] = time.monotonic() > deadline or takes_too_long() or len(done) == len(cases)
        return bool(state["over"])

    def takes_too_long() -> bool:
        most = part.most_seconds if said or state["begun"] else START_SECONDS
        return time.monotonic() - state["since"] > most

    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        status = supervise.run_once(command, log, ended)
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    done = look()
    in_time = time.monotonic() <= deadline
    too_long = takes_too_long()
    if too_long:
        why = f"took more than {part.most_seconds if state['begun'] else START_SECONDS:.0f} s"
    else:
        why = why_failed(printed(folder), status)
    return Ended(done, state["begun"], why, in_time, too_long)


def say(case: str, result: dict[str, Any]) -> None:
    seconds = f"{result['seconds']:.0f} s" if "seconds" in result else ""
    more = result.get("failed") or result.get("not_run") or ""
    figures = [
        f"{label} {written(result[name], kind)}"
        for name, label, kind in (
            ("mfu", "MFU", "percent"), ("overhead", "overhead", "ratio"), ("step_seconds", "a step", "s"),
            ("peak_device_bytes", "peak", "bytes"),
        )
        if result.get(name) is not None
    ]  # fmt: skip
    more = f"FAILED: {more}" if "failed" in result else f"not run: {more}" if more else ""
    print("  ".join(filter(None, [short(case), seconds, *figures, more])), flush=True)


def short(case: str) -> str:
    """contract:causal_lm:zero2_bf16:...: "contract causal_lm zero2_bf16"."""
    return " ".join(case.split(":")[:3])


# What was found, beside what is expected


def checks_of(session: Session) -> list[Check]:
    checks: list[Check] = []
    for part in dict.fromkeys(part.name for part in session.parts):
        cases = [case for other in session.parts if other.name == part for case in other.cases]
        absent = {case: check for case in cases if (check := not_there(session, case))}
        checks += [*absent.values(), *JUDGES[part](session, [case for case in cases if case not in absent])]
    return checks


def not_there(session: Session, case: str) -> Check | None:
    """The check of a case that has no figures."""
    result, (part, what) = session.found.get(case, NO_TIME), short(case).split(" ", 1)
    for kind in ("failed", "not_run"):
        if kind in result:
            return Check(part, what, result[kind], failed=kind == "failed", not_run=kind == "not_run")
    return None


def judge_speed(session: Session, cases: list[str]) -> Iterable[Check]:
    for case in cases:
        found, name = session.found[case], case.split(":")[1]
        if found["mfu"] is not None:
            has_target = name == "1B" and any(kind in found["device"] for kind in ("H100", "H200"))
            target, held = (f"at least {LEAST_MFU:.0%}", found["mfu"] >= LEAST_MFU) if has_target else ("", None)
            yield Check("speed", f"{name}: MFU", written(found["mfu"], "percent"), target, held)
        on_gpu = (f"at most {MOST_OVERHEAD}", found["overhead"] <= MOST_OVERHEAD)
        # Of a small model, the recipe's losses in fp32, in pieces, are a larger part of a step than its loop.
        target, held = on_gpu if session.on_gpu and name != "0.1B" else ("", None)
        yield Check("speed", f"{name}: recipe over bare loop", written(found["overhead"], "ratio"), target, held)
        figures = {
            "parameters": ("parameters", "count"),
            "rows at once": ("micro_batch", "count"),
            "step of the recipe": ("recipe_seconds", "s"),
            "step of a bare DeepSpeed loop": ("bare_seconds", "s"),
            "tokens a second": ("tokens_per_second", "count"),
            "model FLOP/s": ("model_flops_per_second", "flops"),
            "attention's kernel": ("attention", "text"),
            "peak of the device's memory": ("peak_device_bytes", "bytes"),
            "states on the device": ("states_device_bytes", "bytes"),
        }
        for what, (key, kind) in figures.items():
            if found[key] is not None:
                yield Check("speed", f"{name}: {what}", written(found[key], kind))


def judge_pause(session: Session, cases: list[str]) -> Iterable[Check]:
    for case in cases:
        figures = {
            "step without saving": ("step_seconds", "s"),
            "training waits for a checkpoint": ("pause_seconds", "s"),
            "from the last step to the end, with a checkpoint on the disk": ("until_on_disk_seconds", "s"),
            "two checkpoints": ("checkpoint_bytes", "bytes"),
        }
        for what, (key, kind) in figures.items():
            yield Check("pause", f"{case.split(':')[1]}: {what}", written(session.found[case][key], kind))
    for line in saved_lines(session):
        yield Check("pause", "the run says", line)


def saved_lines(session: Session) -> list[str]:
    """What the run said of its checkpoints."""
    logs = sorted(session.folder.glob("launch-*-pause/log.txt"))
    lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [" ".join(line.split()) for line in lines if line.startswith("step ") and "saved" in line]


def losses_of(run: Path) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of a run's steps; NaN for one that is not finite."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    losses, norms = (
        [math.nan if step[name] is None else step[name] for step in steps] for name in ("loss", "grad_norm")
    )
    return losses, norms


def judge_contract(session: Session, cases: list[str]) -> Iterable[Check]:
    """Losses beside those of plain PyTorch; of long rows, those of stage 3 beside stage 2."""
    runs: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for case in cases:
        recipe, name = case.split(":")[1:3]
        ranks = 1 if name.startswith("plain") else session.ranks
        runs[recipe, name] = losses_of(session.folder / "contract" / recipe / f"{name}-{ranks}")
    length = 4096 if session.on_gpu else 256
    for (recipe, name), (losses, norms) in runs.items():
        reference = "long_zero2" if name.startswith("long") else "plain_bf16"
        if name == reference:
            continue
        beside = f"{name} beside plain PyTorch"
        if name == "long_zero3":
            beside = f"{length:,} tokens, stage 3 beside stage 2"
        if (recipe, reference) not in runs:
            yield Check("contract", f"{recipe}: {beside}", f"{reference} has no losses", not_run=True)
            continue
        expected, expected_norms = runs[recipe, reference]
        largest = max(relative(*pair) for pair in zip(losses, expected, strict=True))
        of_norms = max(relative(*pair) for pair in zip(norms, expected_norms, strict=True))
        measured = f"{largest:.1e} (norms {of_norms:.1e})"
        held = all(map(math.isfinite, losses)) and largest <= TOLERANCE_BF16
        yield Check("contract", f"{recipe}: {beside}", measured, f"at most {TOLERANCE_BF16:g}", held)
    pipelines = [recipe for recipe in session.recipes if not configs_of(recipe)]
    for recipe in pipelines:
        yield Check("contract", recipe, "trains a pipeline, which has no loop of plain PyTorch", not_run=True)


def judge_torch(session: Session, cases: list[str]) -> Iterable[Check]:
    for case in cases:
        kind, name = case.split(":")
        what = f"{name}: step of {'a bare torch loop' if kind == 'torch' else 'the HF Trainer'}"
        found, recipe = session.found[case], session.found.get(f"speed:{name}", {})
        measured = f"{written(1000 * found['step_seconds'], 'ms')}, {found['micro_batch']} rows at once"
        if "recipe_seconds" in recipe:
            measured += f"; {written(found['step_seconds'] / recipe['recipe_seconds'], 'ratio')} times the recipe's"
        yield Check("torch", what, measured)


def judge_memory(session: Session, cases: list[str]) -> Iterable[Check]:
    for case in cases:
        found, name = session.found[case], case.split(":")[1]
        states, theory = found["states_device_bytes"] + found["states_host_bytes"], found["states_theory_bytes"]
        yield Check(
            "memory", f"{name}: states, by theory {written(theory, 'bytes')}", written(states, "bytes"),
            f"within {STATES_OFF:.0%}", relative(states, theory) <= STATES_OFF,
        )  # fmt: skip
        if found["peak_device_bytes"] is not None:
            peak, held = found["peak_device_bytes"] - found["left_over_bytes"], found["states_device_bytes"]
            measured = f"{written(peak, 'bytes')}, of which states {written(held, 'bytes')}"
            yield Check("memory", f"{name}: peak of the device's memory", measured)


def judge_offload(session: Session, cases: list[str]) -> Iterable[Check]:
    for case in cases:
        found = session.found[case]
        name = f"{found['parameters'] / 1e9:.1f} B, {found['layers']} of {found['of_layers']} layers"
        whole = found["states_theory_bytes"]
        finite = bool(found["losses"]) and all(loss is not None for loss in found["losses"])
        losses = ", ".join(written(loss, "score") for loss in found["losses"])
        yield Check("offload", f"{name}: losses", losses, "finite", finite)
        yield Check("offload", f"{name}: tokens a second", written(found["tokens_per_second"], "count"))
        if found["peak_device_bytes"] is not None:
            peak = found["peak_device_bytes"]
            held = peak < whole
            yield Check("offload", f"{name}: peak of the device's memory", written(peak, "bytes"),
                        f"less than the states, {written(whole, 'bytes')}", held)  # fmt: skip


JUDGES = {
    "speed": judge_speed, "contract": judge_contract, "torch": judge_torch, "memory": judge_memory,
    "pause": judge_pause, "offload": judge_offload,
}  # fmt: skip


def write_report(session: Session, checks: list[Check]) -> str:
    """Write results.json, checks.csv and report.md. Returns the summary, some lines."""
    verdicts = Counter(check.verdict for check in checks if check.verdict)
    device = next((found["device"] for found in session.found.values() if "device" in found), "unknown device")
    memory, seconds = psutil.virtual_memory().total, time.monotonic() - session.started
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M"), "device": device, "ranks": session.ranks, "on_gpu": session.on_gpu,
        "minutes": session.seconds / 60, "versions": versions(), "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory, "seconds": seconds, "verdicts": verdicts,
    }  # fmt: skip
    rows = [{name: getattr(check, name) for name in TABLE} for check in checks]
    write_json(session.folder / "results.json", {"about": about, "checks": rows, "cases": session.found})
    with (session.folder / "checks.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, TABLE)
        table.writeheader()
        table.writerows(rows)
    where = f"{device}, {about['cores']} CPU cores, {written(memory, 'bytes')} of host memory"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    summary = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    lines = ["# GPU check", "", f"{about['date']}; {where}; {packages}; {seconds:.0f} s: {summary}.", ""]
    if not session.on_gpu:
        lines += ["On a CPU: tiny sizes, and what is said of speed is not judged.", ""]
    missed = [check for check in checks if check.verdict not in ("", "holds")]
    for title, some in (("What did not hold, failed, or was not run", missed), ("All", checks)):
        if some:
            lines += [f"## {title}", "", f"| {' | '.join(TABLE)} |", f"|{' --- |' * len(TABLE)}"]
            cells = [[getattr(check, name).replace("|", "/") for name in TABLE] for check in some]
            lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
    (session.folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    said = []
    for check in checks:
        target = f" ({check.target})" if check.target else ""
        said.append(f"{check.part:<9} {check.what:<52} {check.measured}{target}  {check.verdict}".rstrip())
    files = f"{display_path(session.folder)}: report.md, checks.csv, results.json, a log of each launch"
    return "\n".join([*said, "", f"{where}: {summary}; {seconds:.0f} s", files])


def main(arguments: list[str]) -> int:
    session = plan(arguments)
    count = sum(len(part.cases) for part in session.parts)
    where = f"{session.ranks} GPU{'s' if session.ranks > 1 else ''}" if session.on_gpu else "the CPU, at tiny sizes"
    print(f"{display_path(session.folder)}: {count} cases on {where}, {session.seconds / 60:g} minutes", flush=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as launch.sh does
    run_all(session)
    checks = checks_of(session)
    print("\n" + write_report(session, checks))
    for no_longer_needed in ("work", "contract/*/*/model", "contract/*/*/checkpoints"):
        for path in session.folder.glob(no_longer_needed):
            shutil.rmtree(path, ignore_errors=True)
    if supervise.stop_signals:
        return INTERRUPTED
    if any(check.failed or check.held is False for check in checks):
        return FAULT
    results = [session.found.get(case, NO_TIME) for part in session.parts for case in part.cases]
    return STOPPED if any("not_run" in result for result in results) else 0


if __name__ == "__main__":
    run_command(main)
