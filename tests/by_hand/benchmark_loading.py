"""What loading and exporting a large model take of each rank's memory, and their time. Run by hand, on Linux:

    python tests/by_hand/benchmark_loading.py /scratch --write                   # once: a Llama of 1.1e9 parameters
    deepspeed --num_accelerators 2 tests/by_hand/benchmark_loading.py /scratch --stage 3
    python tests/by_hand/benchmark_loading.py /scratch --offline                 # after it

The model is written in bf16 with random weights, in files of 1 GB, and trained in bf16. Prints the most memory that
each rank had during loading and during the export: `own`, which nobody else can have, and `files`, pages of files that
the system can take back at any time. No optimizer is made, which would need more memory than all that is measured.
Files are of 500 MB, so that a model of this size has several. --offline exports a checkpoint of the weights alone, in
two ranks' pieces.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SIZES = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip


def resident() -> dict[str, float]:
    """GB of this process's memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"own": int(lines["RssAnon"].split()[0]) / 1e6, "files": int(lines["RssFile"].split()[0]) / 1e6}


@contextlib.contextmanager
def watch(found: dict[str, float]) -> Iterator[None]:
    """Note the most that each kind of memory grows by, and the seconds."""
    before, started, done = resident(), time.monotonic(), threading.Event()
    found |= dict.fromkeys(before, 0.0)

    def look() -> None:
        while not done.wait(0.02):
            for kind, size in resident().items():
                found[kind] = max(found[kind], size - before[kind])

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        found["seconds"] = time.monotonic() - started


def say(what: str, found: dict[str, float]) -> None:
    print(
        f"{what:28} own {found['own']:5.2f} GB  files {found['files']:5.2f} GB  {found['seconds']:5.1f} s", flush=True
    )


def write_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, dtype="bfloat16"))
    model.save_pretrained(folder / "large", max_shard_size="1GB")
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")


def load_and_export(folder: Path, stage: int, checks_too: bool) -> None:
    from transformers import AutoModelForCausalLM

    from lib.distributed import export, ranks
    from lib.distributed.loading import load_model
    from lib.models import checks, hub

    ranks.init(timeout_minutes=10)
    name, ds_config = str(folder / "large"), {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    ds_config |= {"train_micro_batch_size_per_gpu": 1}

    def build() -> Any:
        model = hub.load_weights(AutoModelForCausalLM, name, hub.load_config(name, 0.0, False), False)
        if checks_too:
            checks.check_causal(model)
        return model

    figures: dict[str, dict[str, float]] = {"load": {}, "export": {}}
    with watch(figures["load"]):
        model = load_model(build, ds_config, seed=0)
    engine: Any = SimpleNamespace(module=model, config=ds_config)
    at: Any = sys.modules.get("lib.distributed.model_files", export)  # before there were such files: export
    at.SHARD_SIZE = "500MB"
    with watch(figures["export"]):
        export.export(engine, None, folder / "exported")
    if hasattr(export, "keep_form"):
        export.keep_form(engine, folder / "form")
    for rank, found in enumerate(ranks.gather_on_rank0(figures)):
        for what, kinds in found.items():
            say(f"stage {stage} rank {rank} {what}", kinds)


def write_checkpoint(folder: Path) -> None:
    """The weights of the model in two ranks' files, in fp32, with what a manifest says of them."""
    from safetensors.torch import load_file, save_file

    from lib.run import checkpoint_files

    manifest: dict[str, Any] = {"shapes": {}, "files": {}}
    (folder / "checkpoint").mkdir(exist_ok=True)
    for rank in (0, 1):
        halves: dict[str, torch.Tensor] = {}
        places: list[list[Any]] = []
        for file in (folder / "large").glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                manifest["shapes"][name], middle = list(tensor.shape), tensor.numel() // 2
                start = rank * middle
                half = tensor.flatten()[start : None if rank else middle].float()
                halves[f"fp32/{name}@{start}"], places = half, [*places, [name, start, half.numel()]]
        file = folder / "checkpoint" / f"rank-{rank:05d}-of-00002.safetensors"
        save_file(halves, file)
        facts = {"bytes": file.stat().st_size, "xxh3_128": checkpoint_files._checksum_of_file(file)}
        manifest["files"][file.name] = {**facts, "pieces": places}
    (folder / "checkpoint" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def export_offline(folder: Path) -> None:
    from lib.run import checkpoint_model

    # A process of its own, which leaves no memory to this one.
    maker = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder,))
    maker.start()
    maker.join()
    manifest = json.loads((folder / "checkpoint" / "manifest.json").read_text(encoding="utf-8"))
    found: dict[str, float] = {}
    with watch(found):
        checkpoint_model._write(folder / "form", folder / "checkpoint", manifest, folder / "offline")
    say("offline export", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch, with room for 20 GB")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--checks", action="store_true", help="with a check of the whole model, as recipes make it")
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()
    if options.write:
        write_model(options.folder)
    elif options.offline:
        export_offline(options.folder)
    else:
        load_and_export(options.folder, options.stage, options.checks)


if __name__ == "__main__":
    main()
