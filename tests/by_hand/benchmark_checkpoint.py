"""Saving and loading a checkpoint beside DeepSpeed's own, on the same engine. Run by hand:

    deepspeed --num_accelerators 2 tests/by_hand/benchmark_checkpoint.py --stage 2 --millions 100 --series 5

One launch, one engine, one model (a Llama of about so many million parameters, fp32). After one step, series of six
ways take turns: this project's, with checksums, until training goes on, and until it is on the disk; DeepSpeed's
save_checkpoint, and that one followed by os.sync; torch's distributed checkpoint (DCP) of the same pieces by
async_save, until training goes on, and until it is written, which does not flush either. With --universal, DeepSpeed's
checkpoint is then converted to a universal one, in a process of its own. Prints seconds (all ranks wait), bytes on the
disk, and the most memory that a rank needed beyond what it held before, warmed up: this project keeps the host memory
that it copies to, a checkpoint's size, which is shown apart.
"""

import argparse
import functools
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import deepspeed
from torch.distributed.checkpoint.state_dict_saver import async_save
from transformers import LlamaConfig, LlamaForCausalLM

from lib.distributed import ranks
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.repairs import repair_stage0
from lib.distributed.zero_state import WEIGHT, optimizer_state, owned_pieces
from lib.run import checkpoint_files, cli
from lib.run.checkpoint_writing import HostCopies, WrittenBeside

Figures = dict[str, list[float]]


def build(millions: float) -> LlamaForCausalLM:
    """Width 64 times the number of layers and heads, which is about that of models in use."""
    layers = 2
    while parameters(layers) < millions * 1e6:
        layers += 1
    return LlamaForCausalLM(LlamaConfig(**sizes(layers)))


def sizes(layers: int) -> dict[str, Any]:
    width = 64 * layers
    return {
        "vocab_size": 8192, "hidden_size": width, "intermediate_size": width * 8 // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": layers, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip


def parameters(layers: int) -> int:
    width = 64 * layers
    return 8192 * width + layers * (4 * width * width + 3 * width * (width * 8 // 3 // 8 * 8))


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def measure(do: Callable[[], Any]) -> tuple[float, float]:
    """(seconds until all ranks have done it, bytes of memory that this rank needed for it beyond those it held)"""

    def memory(key: str) -> int:
        return next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(key)
        )

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    held = memory("VmRSS:")
    torch.distributed.barrier()
    started = time.perf_counter()
    do()
    torch.distributed.barrier()
    seconds = time.perf_counter() - started
    peak = ranks.largest([float(memory("VmHWM:") - held)])[0]
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--series", type=int, default=5)
    parser.add_argument("--universal", action="store_true", help="convert DeepSpeed's checkpoint too")
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    ranks.init(timeout_minutes=30)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": options.stage},
    }
    model = load_model(lambda: build(options.millions), ds_config, seed=0)
    cfg = SimpleNamespace(
        learning_rate=1e-3,
        weight_decay=0.01,
        adam_betas=[0.9, 0.999],
        adam_eps=1e-8,
        lr_schedule="constant",
        warmup_steps=0,
    )
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, 1)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    repair_stage0(engine)
    tokens = torch.arange(32)[None] + ranks.rank()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    dcp_group = torch.distributed.new_group(backend="gloo")
    folder = Path(ranks.on_rank0(lambda: tempfile.mkdtemp(prefix="benchmark-")))
    ours, theirs = folder / "ours", folder / "theirs"
    dcp = folder / "dcp"
    loading: dict[str, Figures] = {name: {"seconds": [], "memory": []} for name in ("this project", "DeepSpeed")}
    sizes_on_disk: dict[str, int] = {}

    numbers = dict.fromkeys(("samples", "rows", "skipped_steps", "stage", "seconds"), 0)
    facts: dict[str, Any] = {
        "recipe": "benchmark",
        "step": 1,
        "score": None,
        **numbers,
        **{name: {} for name in ("schedule", "loss_scale", "settings", "versions")},
    }

    copies, later = HostCopies(), list[Callable[[], Any]]()

    def save_ours() -> None:
        beside = WrittenBeside(ours, engine, facts, copies)
        later.append(beside.finish)

    def save_ours_and_finish() -> None:
        assert WrittenBeside(ours, engine, facts, copies).finish() is None

    def save_theirs() -> None:
        engine.save_checkpoint(str(theirs), tag="x")

    def save_theirs_and_sync() -> None:
        save_theirs()
        os.sync()

    def save_dcp() -> None:
        kinds = [WEIGHT, *optimizer_state(engine)[0]]
        tensors = {
            f"{kind}/{piece.name}@{piece.start}": piece.view(kind, engine.basic_optimizer)
            for piece in owned_pieces(engine)
            for kind in kinds
        }
        writing: Any = async_save(tensors, checkpoint_id=dcp, process_group=dcp_group)
        later.append(writing.result)

    def save_dcp_and_finish() -> None:
        save_dcp()
        later.pop()()

    ways: dict[str, tuple[Path, Callable[[], None]]] = {
        "this project, pause": (ours, save_ours),
        "this project, on disk": (ours, save_ours_and_finish),
        "DeepSpeed": (theirs, save_theirs),
        "DeepSpeed, os.sync": (theirs, save_theirs_and_sync),
        "DCP async, pause": (dcp, save_dcp),
        "DCP async, written": (dcp, save_dcp_and_finish),
    }
    saving: dict[str, Figures] = {name: {"seconds": [], "memory": []} for name in ways}

    def load_ours() -> None:
        _, manifest, _ = checkpoint_files.find_newest(ours)  # which reads every byte once, to check it
        checkpoint_files.read(ours / checkpoint_files.folder_of(1), manifest, engine)

    def load_theirs() -> None:
        path, _ = engine.load_checkpoint(str(theirs), tag="x")
        assert path is not None

    def note(figures: Figures, do: Callable[[], Any], counted: bool) -> None:
        seconds, memory = measure(do)
        if counted:
            figures["seconds"].append(seconds)
            figures["memory"].append(memory)

    for series in range(-1, options.series):  # the first one warms up
        for name, (where, do) in ways.items():
            ranks.on_rank0(functools.partial(remove, where))
            note(saving[name], do, series >= 0)
            while later:
                later.pop()()
            sizes_on_disk[name] = ranks.on_rank0(functools.partial(bytes_of, where))
        for name, do in (("this project", load_ours), ("DeepSpeed", load_theirs)):
            note(loading[name], do, series >= 0)
    if ranks.rank() == 0:
        count = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
        print(
            f"\nstage {options.stage}, {ranks.world_size()} ranks, {count / 1e6:.1f} M parameters, fp32; "
            f"medians of {options.series} series"
        )
        print(f"{'':<28}{'seconds':>9}{'GB':>8}{'GB memory':>11}   series, seconds")
        for title, table in (("save", saving), ("load", loading)):
            for name, figures in table.items():
                size = f"{sizes_on_disk[name] / 1e9:.2f}" if title == "save" else ""
                print(
                    f"{title} {name:<23}{statistics.median(figures['seconds']):>9.2f}{size:>8}"
                    f"{max(figures['memory']) / 1e9:>11.2f}   "
                    + " ".join(f"{value:.2f}" for value in figures["seconds"])
                )
        print(f"host memory that this project keeps: {copies.nbytes / 1e9:.2f} GB a rank")
        if options.universal:
            convert(theirs / "x", folder / "universal", options.stage)
        shutil.rmtree(folder)
    torch.distributed.barrier()
    cli.leave(0)


def convert(source: Path, target: Path, stage: int) -> None:
    """DeepSpeed's conversion to a universal checkpoint, which is what it can load on another number of ranks."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(source),
        "--output_folder",
        str(target),
    ]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"] + (
        [] if stage == 3 else ["--inject_missing_state"]
    )
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"ds_to_universal             {time.perf_counter() - started:>9.2f}{bytes_of(target) / 1e9:>8.2f}"
        f"{peak / 1e9:>11.2f}   (the memory of its largest process)"
    )


if __name__ == "__main__":
    main()
