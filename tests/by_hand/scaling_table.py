"""What a run needs on 8 to 1,024 ranks, by arithmetic: nobody here has so many. Prints the table of docs/machines.md.

    python tests/by_hand/scaling_table.py             # for transformers' default LlamaConfig, 6.7 billion parameters

tests/machines/test_scaling.py holds the formulas to what 1, 2 and 4 ranks do.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from lib.compare import theory
from lib.run import checkpoint_files

RANKS = (8, 64, 256, 1024)
RANKS_A_MACHINE = 8
# Of one of the messages that follow one another, with its sending, receiving and Python: what 2 processes that have a
# core each need for all of them, by their number. The least of nine runs of benchmark_agreement.py, for other work can
# only add; 2026-11-28, 2 CPU cores
MESSAGE_SECONDS, RING_SECONDS = 129e-6 / 1, 233e-6 / 2
NETWORK_SECONDS = (20e-6, 50e-6)  # what a network between machines adds to it: datacenter Ethernet, TCP
PERSISTENCE = 100_000  # elements; DeepSpeed's default of stage3_param_persistence_threshold
Piece = list[str | int]  # [parameter, first element, elements]
Shapes = dict[str, list[int]]


def traffic(stage: int, ranks: int, shapes: Shapes, element_bytes: int) -> float:
    """The bytes that a rank sends in a step without accumulation: lib/compare/theory.py, which has the sources.

    A ring over all ranks crosses from each machine to the next once: as many bytes leave each machine.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    whole, small = sum(sizes), sum(size for size in sizes if size <= PERSISTENCE and stage == 3)
    facts = {
        "stage": stage, "zero_ranks": ranks, "tensor_size": 1, "element_bytes": element_bytes, "accumulation_steps": 1,
        "parameters": whole, "trained": whole, "kept_whole": small, "in_modules": whole - small, "frozen_in_modules": 0,
    }  # fmt: skip
    return theory.traffic({"zero_optimization": {"stage": stage}}, facts).total


def messages(ranks: int) -> int:
    """How many messages of the agreement after each step follow one another: ranks.largest, which has the source."""
    return (ranks - 1).bit_length()


def messages_of_a_ring(ranks: int) -> int:
    """The same of gloo's own all-reduce: a reduce-scatter and an all-gather of ranks - 1 messages each (Patarasuk and
    Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations")."""
    return 2 * (ranks - 1)


def sockets(ranks: int) -> int:
    """What a rank has open for one gloo group, in which each rank is connected with each other one (gloo's
    Context::connectFullMesh). On GPUs there is one such group; all others are NCCL's."""
    return ranks - 1


def pieces(stage: int, ranks: int, shapes: Shapes) -> Iterator[list[Piece]]:
    """The pieces of a checkpoint that each rank writes, rank after rank: zero_state.owned_pieces, which reads them from
    DeepSpeed (runtime/zero/stage_1_and_2.py, flatten_dense_tensors_aligned; partition_parameters.py, _partition_param).
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for rank in range(ranks):
        if stage in (1, 2):  # a rank has a range of each group, whose length DeepSpeed rounds up to an even one
            found: list[Piece] = []
            for is_vector in (False, True):  # the groups of optimizer.make_adamw: with and without weight decay
                names = [name for name, shape in shapes.items() if (len(shape) < 2) is is_vector]
                share = 2 * math.ceil(sum(sizes[name] for name in names) / (2 * ranks))
                offset = 0
                for name in names:
                    begin, end = max(offset, share * rank), min(offset + sizes[name], share * (rank + 1))
                    if begin < end:
                        found.append([name, begin - offset, end - begin])
                    offset += sizes[name]
            yield found
            continue
        found = []
        for name, size in sizes.items():  # stage 0: equal shares of each; stage 3: the last ones may be short
            share = math.ceil(size / ranks)
            begin = size * rank // ranks if stage == 0 else share * rank
            end = size * (rank + 1) // ranks if stage == 0 else min(size, share * (rank + 1))
            if begin < end:
                found.append([name, begin, end - begin])
        yield found


def manifest(stage: int, ranks: int, shapes: Shapes) -> dict[str, Any]:
    """That of a checkpoint, but for what does not grow: settings, versions, schedule (some kilobytes)."""
    files = {
        f"rank-{rank:05d}-of-{ranks:05d}.safetensors": {"pieces": found, "bytes": 10**9, "xxh3_128": "0" * 32}
        for rank, found in enumerate(pieces(stage, ranks, shapes))
    }
    return {"shapes": shapes, "files": files}


def seconds_to_read(found: dict[str, Any]) -> float:
    """How long rank 0 takes for a manifest, with all its checks: measured here and now."""
    nothing: dict[str, Any] = {"versions": {}, "settings": {}, "schedule": {}, "loss_scale": {}, "scalars": {}}
    numbers = {"step": 1, "samples": 1, "rows": 1, "skipped_steps": 0, "stage": 3, "format": 1, "seconds": 1.0}
    whole = found | nothing | numbers | {"recipe": "", "score": None, "kinds": [], "world_size": len(found["files"])}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / checkpoint_files.folder_of(1)
        folder.mkdir()
        text = json.dumps(whole | {"checksum": checkpoint_files.checksum_of(whole)})
        (folder / checkpoint_files.MANIFEST).write_text(text)
        started = time.perf_counter()
        checkpoint_files.read_manifest(folder)
        return time.perf_counter() - started


def python_files() -> int:
    """The files that a rank reads to start: modules, and libraries that are mapped."""
    modules = {str(getattr(module, "__file__", "") or "") for module in list(sys.modules.values())}
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len(modules | {line.split()[-1] for line in lines if ".so" in line})


def rows(shapes: Shapes) -> Iterator[list[str]]:
    parameters = sum(math.prod(shape) for shape in shapes.values())
    yield ["ranks", *(f"{ranks:,}" for ranks in RANKS)]
    yield ["machines", *(f"{ranks // RANKS_A_MACHINE:,}" for ranks in RANKS)]
    for stage in range(4):
        sent = [traffic(stage, ranks, shapes, 2) / 1e9 for ranks in RANKS]
        yield [f"GB that a rank sends in a step, stage {stage}", *(f"{each:.1f}" for each in sent)]
    ways = [("agreement after a step, ms", messages, MESSAGE_SECONDS)]
    ways += [("as gloo's ring, ms", messages_of_a_ring, RING_SECONDS)]
    for name, count, seconds in ways:
        ends = [[1e3 * count(ranks) * (seconds + more) for more in NETWORK_SECONDS] for ranks in RANKS]
        yield [name, *(f"{low:.1f} to {high:.1f}" for low, high in ends)]
    yield ["sockets of a rank for a gloo group", *(f"{sockets(ranks):,}" for ranks in RANKS)]
    yield ["files of a checkpoint", *(f"{ranks + 1:,}" for ranks in RANKS)]
    yield ["GB that a rank writes of it", *(f"{12 * parameters / ranks / 1e9:.2f}" for ranks in RANKS)]
    for names, stage in (("0 and 3", 3), ("1 and 2", 2)):
        found = [manifest(stage, ranks, shapes) for ranks in RANKS]
        yield [f"MB of its manifest, stages {names}", *(f"{len(json.dumps(each)) / 1e6:.2f}" for each in found)]
        yield ["seconds until rank 0 has read it, here", *(f"{seconds_to_read(each):.1f}" for each in found)]
    yield ["GB of weights read at the start, stages 0 to 2, one copy a machine"] + [
        f"{2 * parameters * ranks / RANKS_A_MACHINE / 1e9:,.0f}" for ranks in RANKS
    ]
    yield ["the same at stage 3, by rank 0 alone", *(f"{2 * parameters / 1e9:,.0f}" for _ in RANKS)]
    files = python_files()
    yield ["files of the environment that are opened at the start, thousands"] + [
        f"{files * ranks / 1e3:,.0f}" for ranks in RANKS
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for number, row in enumerate(rows(shapes)):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|---" * len(row) + "|")


if __name__ == "__main__":
    main()
