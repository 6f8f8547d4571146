"""The lines that say what is about to run."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from lib.distributed import mesh, ranks
from lib.distributed.expert_parallel import is_shared
from lib.distributed.pipeline import model_of, shapes_of_all_stages
from lib.distributed.zero_state import layout
from lib.errors import display_path
from lib.settings.ds_config import offload_device, stage_of


def header_lines(run: Any, rows: dict[str, int], notes: Sequence[str]) -> list[str]:
    """run: a lib.run.run.Run with its engine. rows: their number by split."""
    cfg, ds_config, model, splits = run.cfg, run.ds_config, model_of(run.engine), run.splits
    sizes = {parameter: _size(parameter) for parameter in model.parameters()}
    total = sum(sizes.values())
    trained = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    if mesh.pipeline_size() > 1:  # here is one stage, and all of it is trained
        total = trained = sum(math.prod(shape) for shape in shapes_of_all_stages(run.engine).values())
    of_them = f", {trained / 1e6:.1f} M of them trained" if trained < total else ""
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    world_size = ranks.world_size()
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    name = torch.cuda.get_device_name() if accelerator.device_name() == "cuda" else accelerator.device_name(0)
    device = f"CPU, {torch.get_num_threads()} threads a rank" if on_cpu else name
    micro, accumulation = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    lines = {
        "model": f"{type(model).__name__}, {total / 1e6:.1f} M parameters{of_them}",
        "data": f"{cfg.dataset}: {counts}",
        **(splits.header if splits is not None else {}),
        "device": f"{_ranks(world_size)} x {device}",
        "memory": f"ZeRO stage {stage_of(ds_config)}{_offloaded(ds_config)}{_shared(accumulation)}, {cfg.precision}",
        "batch": f"{cfg.batch_size} = {micro} rows x {accumulation} accumulation steps x "
        f"{_ranks(mesh.data_parallel_size(), world_size // mesh.data_parallel_size())}; "
        f"{run.total_steps} steps",
        "run": display_path(run.folder),
    }
    if run.checkpoint is not None:
        path, manifest = run.checkpoint
        writers = f"written at ZeRO stage {manifest['stage']} by {_ranks(manifest['world_size'])}"
        lines["resume"] = f"after step {manifest['step']} of {path.name}, {writers}"
    if cfg.precision == "fp32" and not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False):
        notes = [*notes, "fp32 is slow on a GPU: --precision bf16, or tf32, takes a fraction of the time"]
    return [f"{name:<9}{text}" for name, text in lines.items()] + [
        f"note     {note}" for note in [*run.notes, *(splits.notes if splits is not None else []), *notes]
    ]


def _ranks(count: int, sharing: int = 1) -> str:
    """sharing: how many ranks have the same rows."""
    kind = "data-parallel rank" if sharing > 1 else "rank"
    return f"{count} {kind}{'s' if count > 1 else ''}"


def _size(parameter: torch.nn.Parameter) -> int:
    """Of the whole parameter, wherever its parts are."""
    shared = layout(parameter)
    size = math.prod(shared.shape) if shared is not None else int(getattr(parameter, "ds_numel", parameter.numel()))
    return size * mesh.expert_size() if is_shared(parameter) else size


def _shared(micro_batches: int) -> str:
    if mesh.tensor_size() > 1:
        return f", layers shared by {mesh.tensor_size()} ranks (tensor parallel)"
    if mesh.sequence_size() > 1:
        return f", rows shared by {mesh.sequence_size()} ranks (sequence parallel)"
    if mesh.pipeline_size() > 1:
        idle = (mesh.pipeline_size() - 1) / (micro_batches + mesh.pipeline_size() - 1)
        return f", {mesh.pipeline_size()} stages of a pipeline, each idle for {idle:.1%} of a step (the bubble)"
    if mesh.expert_size() > 1:
        return f", experts shared by {mesh.expert_size()} ranks (expert parallel)"
    return ""


def _offloaded(ds_config: dict[str, Any]) -> str:
    names = {"optimizer": "optimizer", "param": "parameters"}
    found = [name for what, name in names.items() if offload_device(ds_config, what) != "none"]
    return f", offloaded: {', '.join(found)}" if found else ""
