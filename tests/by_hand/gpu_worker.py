"""What the processes of tests/by_hand/gpu_check.py do. Arguments: folder, file of results, case ...

Rank 0 appends two lines of JSON to the file for each case: {"case": ..., "begins": true} and, when it has ended,
{"case": ..., what was measured} or {"case": ..., "failed": the reason}. After a failure the process ends, as a device
may be unusable then; gpu_check.py starts another one for the cases that are left. On a CPU all sizes are tiny.
"""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract_worker
import deepspeed
import pytest
import torch
from benchmark_overhead import ROOT, Loops, load_settings, new_model, seconds_of
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments

from lib.compare import theory
from lib.compare.measure import Meter
from lib.compare.results import INSPECTED
from lib.distributed import memory, ranks
from lib.models import output_layer
from lib.run import cli
from lib.run.step_end import SIGNALS

ON_GPU = get_accelerator().device_name() != "cpu"
DEVICE = torch.device(get_accelerator().device_name(), 0)  # of processes that DeepSpeed has not given one
CONFIGS = ROOT / "ds_configs" / "causal_lm"
# Bytes of host memory for each parameter whose states are offloaded: 18, and what pinned memory is rounded up by.
HOST_BYTES_EACH = 22
HOST_BYTES_LEFT = 10e9  # for all else


@dataclasses.dataclass
class Size:
    """Of a decoder in the architecture of Llama, and of its steps."""

    width: int
    inner: int
    layers: int
    heads: int
    micro: int  # rows at once; halved where they do not fit
    rows: int  # a step
    checkpointing: bool = False
    tokens: int = 2048  # a row
    vocabulary: int = 32_768
    steps: int = 5  # of each series
    series: int = 3

    @property
    def parameters(self) -> int:
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner) + 2 * self.vocabulary * self.width


SIZES = {
    "0.1B": Size(768, 2048, 12, 12, micro=16, rows=32, steps=10),
    "0.3B": Size(1024, 2816, 20, 16, micro=4, rows=8),
    "1B": Size(2048, 5632, 18, 16, micro=4, rows=16),
    "3B": Size(3072, 8192, 24, 24, micro=4, rows=8, checkpointing=True, steps=3, series=2),
    "7B": Size(4096, 11008, 32, 32, micro=1, rows=4, checkpointing=True, steps=2, series=1),
}
TINY: dict[str, Any] = {
    "width": 64, "inner": 128, "layers": 2, "heads": 2, "micro": 2, "rows": 4, "tokens": 64, "vocabulary": 512,
    "steps": 4, "series": 2,
}  # fmt: skip


def size_of(name: str) -> Size:
    return SIZES[name] if ON_GPU else dataclasses.replace(SIZES[name], **TINY)


def settings_of(size: Size, run_dir: Path) -> Any:
    # A run that had no memory left keeps its folder locked.
    return load_settings(
        run_dir / str(size.micro), precision="bf16", hidden_size=str(size.width), intermediate_size=str(size.inner),
        num_layers=str(size.layers), num_heads=str(size.heads), vocab_size=str(size.vocabulary),
        max_length=str(size.tokens), batch_size=str(size.rows), tie_embeddings="false", samples="0",
        max_steps="1000", learning_rate="1e-4", log_every="10", overwrite="true",
    )  # fmt: skip


def build_on_device(cfg: Any) -> torch.nn.Module:
    """The decoder at random; a device draws billions of numbers in the seconds for which a CPU needs minutes."""
    with torch.device(get_accelerator().current_device_name()):
        return new_model(cfg)


def write_config(folder: Path, name: str, size: Size) -> Path:
    """A shipped DeepSpeed JSON with this size's micro-batch and activation checkpointing."""
    ds_config = json.loads((CONFIGS / f"{name}.json").read_text()) | {"train_micro_batch_size_per_gpu": size.micro}
    if size.checkpointing:
        ds_config["activation_checkpointing"] = {}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(ds_config))
    return path


def free_memory() -> None:
    """Forget what was built before, and the peak of the device's memory."""
    for number in SIGNALS:  # a run's handler holds its engine
        signal.signal(number, signal.SIG_DFL)
    gc.collect()
    if ON_GPU:
        get_accelerator().empty_cache()
        get_accelerator().reset_peak_memory_stats()


def with_smaller_micro_batches(measure: Callable[[Size], dict[str, Any]], size: Size) -> dict[str, Any]:
    """What `measure` finds, with as many rows at once as fit into the device's memory."""
    while True:
        try:
            return measure(size) | {"micro_batch": size.micro}
        except Exception as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or memory.is_out_of_memory(error)
            if not out_of_memory or size.micro == 1:
                raise
        print(f"out of memory with {size.micro} rows at once", flush=True)
        size = dataclasses.replace(size, micro=size.micro // 2)
        free_memory()


@contextlib.contextmanager
def metered(folder: Path) -> Any:
    """(the meter of lib/compare/measure.py, what takes the place of deepspeed.initialize)."""
    meter, real = Meter(folder, INSPECTED + 2, goes_on=True), comm.get_msg_size_from_args
    comm.get_msg_size_from_args = meter.sent.message_size(real)
    try:
        yield meter.initialize(deepspeed.initialize)
    finally:
        comm.get_msg_size_from_args = real


def measured_by_meter(folder: Path, loops: Loops) -> dict[str, Any]:
    """The recipe's loop under the meter: states beside theory, operations, peak memory."""
    free_memory()  # the whole model was drawn on the device, which is no part of training
    loops.recipe(INSPECTED + 2)
    found = json.loads((folder / "rank-0.json").read_text())
    expected = theory.states(loops.ds_config, found["facts"])
    held = {place: sum(kind[place] for kind in found["held"].values()) for place in ("device", "host")}
    return {
        "parameters": found["facts"]["whole_parameters"],
        "device": found["facts"]["device"],
        "device_bytes": found["facts"]["device_bytes"],
        "flops_a_step": 3 * found["forward_flops"],
        "states_device_bytes": held["device"],
        "states_host_bytes": held["host"],
        "states_theory_bytes": sum(kind.total for kind in expected.values()),
        "peak_device_bytes": found["peak_device_bytes"],
        "peak_host_bytes": found["peak_host_bytes"],
        "metered_step_seconds": statistics.median(sum(step.values()) for step in found["seconds"][INSPECTED:]),
    }


def attention_kernel(loop: Callable[[int], None]) -> str:
    """Which of torch's kernels the attention took in a step: "flash", "efficient", "cudnn", "math", or what it is."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        loop(1)
    begin = "aten::_scaled_dot_product_"
    names = {event.key.removeprefix(begin) for event in found.key_averages() if event.key.startswith(begin)}
    forward = sorted(name for name in names if "backward" not in name)
    short = {"flash_attention": "flash", "efficient_attention": "efficient", "cudnn_attention": "cudnn",
             "attention_math": "math", "flash_attention_for_cpu": "flash (CPU)"}  # fmt: skip
    return ", ".join(short.get(name, name) for name in forward) or "none of torch's"


def speed(folder: Path, name: str) -> dict[str, Any]:
    """causal_lm's loop and a bare DeepSpeed loop, in turns, on one engine at stage 2."""
    return with_smaller_micro_batches(lambda size: speed_of(folder, name, size), size_of(name))


def speed_of(folder: Path, name: str, size: Size) -> dict[str, Any]:
    with metered(folder) as initialize:
        cfg = settings_of(size, folder / "run")
        loops = Loops(cfg, write_config(folder, "zero2", size), build_on_device, initialize)
        found = measured_by_meter(folder, loops)
    loops.bare(2)  # warms up
    seconds: dict[str, list[float]] = {"bare": [], "recipe": []}
    for _ in range(size.series):
        for loop in (loops.bare, loops.recipe):
            seconds[loop.__name__].append(seconds_of(loop, size.steps))
    recipe_seconds = statistics.median(seconds["recipe"])
    peak = theory.peak_flops(found["device"], "bf16")
    found |= {
        "attention": attention_kernel(loops.recipe),
        "recipe_seconds": recipe_seconds,
        "bare_seconds": statistics.median(seconds["bare"]),
        "overhead": statistics.median(r / b for r, b in zip(seconds["recipe"], seconds["bare"], strict=True)),
        "series": seconds,
        "tokens_per_second": size.rows * size.tokens / recipe_seconds,
        "model_flops_per_second": found["flops_a_step"] / recipe_seconds,
        "mfu": found["flops_a_step"] / recipe_seconds / peak if peak else None,
    }
    loops.run.close()
    loops.engine.destroy()
    return found


def pause(folder: Path, name: str) -> dict[str, Any]:
    """For how long training waits for a checkpoint: by how much longer the step after it takes to end.

    Two are saved in 6 steps, the second one at the end, when the run waits until it is on the disk.
    """
    size = size_of(name)
    room, needed = shutil.disk_usage(folder).free, 30 * size.parameters  # two of 12 bytes a parameter, and some
    if room < needed:
        return {"not_run": f"the disk has {room / 1e9:.0f} GB free, and two checkpoints want {needed / 1e9:.0f}"}
    loops = Loops(settings_of(size, folder / "run"), write_config(folder, "zero2", size), build_on_device)
    run, real, times = loops.run, loops.run.log_step, []
    loops.recipe(2)  # warms up
    step_seconds = seconds_of(loops.recipe, 3)

    def log_step(*arguments: Any, **options: Any) -> None:
        get_accelerator().synchronize()
        times.append(time.perf_counter())
        real(*arguments, **options)

    run.log_step, run.cfg.save_every = log_step, 3  # type: ignore[method-assign]
    loops.recipe(6)
    at_end = time.perf_counter()
    files = [path for path in (run.folder / "checkpoints").rglob("*") if path.is_file()]
    run.close()
    loops.engine.destroy()
    return {
        "step_seconds": step_seconds,
        "pause_seconds": max(0.0, times[3] - times[2] - step_seconds),
        "until_on_disk_seconds": at_end - times[5],
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
    }


def peak_memory(folder: Path, config: str) -> dict[str, Any]:
    """States, and the peak of the device's memory, under one of the shipped configs."""
    left_over = get_accelerator().memory_allocated() if ON_GPU else 0
    with metered(folder) as initialize:
        size = size_of("0.3B")
        loops = Loops(
            settings_of(size, folder / "run"), write_config(folder, config, size), build_on_device, initialize
        )
        found = measured_by_meter(folder, loops) | {"left_over_bytes": left_over}
    loops.run.close()
    loops.engine.destroy()
    return found


def offload(folder: Path, name: str) -> dict[str, Any]:
    """As many layers of a 7 B decoder as host memory has room for the states of, with the shipped zero3_offload."""
    size, room = size_of(name), memory.free_host_memory() - HOST_BYTES_LEFT
    whole = size.layers
    while ON_GPU and size.layers and HOST_BYTES_EACH * size.parameters > room:
        size = dataclasses.replace(size, layers=size.layers - 1)
    if ON_GPU and size.parameters < 1e9:
        return {"not_run": f"there are {room / 1e9:.0f} GB of host memory, and 7 B want {22 * 7:.0f}"}
    with metered(folder) as initialize:
        cfg = settings_of(size, folder / "run")
        loops = Loops(cfg, write_config(folder, "zero3_offload", size), build_on_device, initialize)
        found = measured_by_meter(folder, loops)
    metrics = (loops.run.folder / "metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, metrics) if "loss" in entry]
    loops.run.close()
    tokens = size.rows * size.tokens / found["metered_step_seconds"]
    return found | {"layers": size.layers, "of_layers": whole, "losses": losses, "tokens_per_second": tokens}


# Without DeepSpeed, in a process of its own: fp32 weights under torch.autocast, as the HF Trainer has them too.


def rows_of(size: Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size.vocabulary, (4 * size.rows, size.tokens), generator=generator)


def model_on_device(size: Size, folder: Path) -> Any:
    with DEVICE:
        model: Any = new_model(settings_of(size, folder / "run")).to(DEVICE)
    if size.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def plain_torch(folder: Path, name: str) -> dict[str, Any]:
    """A bare loop of torch alone."""

    def measure(size: Size) -> dict[str, Any]:
        model = model_on_device(size, folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        rows = rows_of(size).to(DEVICE)

        def train(steps: int) -> float:
            get_accelerator().synchronize()
            started = time.perf_counter()
            for step in range(steps):
                first = step % 4 * size.rows
                for part in torch.split(rows[first : first + size.rows], size.micro):
                    with torch.autocast(DEVICE.type, torch.bfloat16):
                        loss = model(input_ids=part, labels=part, use_cache=False).loss
                    (loss * len(part) / size.rows).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            get_accelerator().synchronize()
            return (time.perf_counter() - started) / steps

        train(2)
        return {"step_seconds": statistics.median(train(size.steps) for _ in range(size.series))}

    return with_smaller_micro_batches(measure, size_of(name))


def hf_trainer(folder: Path, name: str) -> dict[str, Any]:
    """The HF Trainer, without DeepSpeed."""

    def measure(size: Size) -> dict[str, Any]:
        warm, steps = 2, size.steps * size.series
        marks: list[float] = []

        class Clock(TrainerCallback):  # type: ignore[misc]  # the library has no types
            def on_step_end(self, *_: Any, **__: Any) -> None:
                if len(marks) in (warm - 1, warm + steps - 1):
                    get_accelerator().synchronize()
                marks.append(time.perf_counter())

        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"), per_device_train_batch_size=size.micro, bf16=True, use_cpu=not ON_GPU,
            gradient_accumulation_steps=size.rows // size.micro, max_steps=warm + steps, learning_rate=1e-4,
            weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="constant", optim="adamw_torch_fused",
            logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True,
            gradient_checkpointing=size.checkpointing,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in rows_of(size)]
        trainer = Trainer(model_on_device(size, folder), arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.model.config.use_cache = False
        trainer.train()
        return {"step_seconds": (marks[-1] - marks[warm - 1]) / steps}

    return with_smaller_micro_batches(measure, size_of(name))


def contract(folder: Path, case: str) -> dict[str, Any]:
    recipe, name = case.split(":")[:2]
    if ranks.rank() == 0:  # of a try before
        shutil.rmtree(folder.parents[1] / "contract" / recipe / f"{name}-{ranks.world_size()}", ignore_errors=True)
    torch.distributed.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "LOGITS_AT_ONCE", 32 * 600)  # so that the loss of a micro-batch is in pieces
        contract_worker.run_case(folder.parents[1] / "contract", case)
    return {}


KINDS = {
    "speed": speed, "contract": contract, "torch": plain_torch, "trainer": hf_trainer, "memory": peak_memory,
    "pause": pause, "offload": offload,
}  # fmt: skip


def write(results: Path, **line: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main(where: str, results: str, *cases: str) -> None:
    alone = cases[0].split(":")[0] in ("torch", "trainer")
    if not alone:
        ranks.init(timeout_minutes=10)
    errors = os.fdopen(os.dup(2), "w", buffering=1)  # a run that fails has not given it back
    for case in cases:
        kind, _, rest = case.partition(":")
        folder = Path(where) / "work" / "-".join(case.split(":")[:3])
        free_memory()
        if alone or ranks.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a try before
            folder.mkdir(parents=True)
        if not alone:
            torch.distributed.barrier()
        write(Path(results), case=case, begins=True)
        started = time.monotonic()
        try:
            found = KINDS[kind](folder, rest)
        except BaseException as error:
            traceback.print_exc(file=errors)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            write(Path(results), case=case, failed=why, seconds=time.monotonic() - started)
            cli.leave(1)
        shutil.rmtree(folder, ignore_errors=True)
        write(Path(results), case=case, **found, seconds=time.monotonic() - started)
    cli.leave(0)


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")))
