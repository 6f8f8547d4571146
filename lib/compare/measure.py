"""Run a recipe and measure it from outside, without a line in the recipe. lib/compare/compare.py starts the ranks:

    deepspeed --module lib.compare.measure FOLDER STEPS all|times recipes/x.py settings ...

deepspeed.initialize is wrapped, so that the engine's forward, backward and step record the times at which they begin
and end. In the step INSPECTED the tensors and the floating-point operations are counted and the collectives are logged;
this step and the steps before it are not timed. Each rank writes FOLDER/rank-<rank>.json. With "all" the run goes on to
its checkpoint and its test; with "times" it ends after STEPS steps.
"""

import contextlib
import functools
import inspect
import itertools
import json
import math
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, VocabParallelEmbedding
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lib.compare.results import INSPECTED, PHASES
from lib.data import batches
from lib.distributed import mesh, ranks
from lib.distributed.expert_parallel import is_shared
from lib.distributed.pipeline import model_of, shapes_of_all_stages
from lib.distributed.zero_state import held_bytes, layout
from lib.errors import Stopped
from lib.run import checkpoint_files, checkpoints, run
from lib.run.cli import leave
from lib.settings.ds_config import stage_of


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The floating-point operations of an attention, from the shapes of its inputs."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch gives it no types


def experts_flops(rows: Any, matrices: Any, *_: Any, **__: Any) -> int:
    """Those of a mixture's experts, from the shapes [tokens x experts of each, width] and [experts, width, ...]."""
    return int(2 * math.prod(rows) * matrices[2])


# torch 2.13 does not count the operations of these kernels by itself.
NOT_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._grouped_mm: experts_flops,
}

# Instructions of a pipeline's schedule, and the phases that they are; in all others a stage waits for its neighbours.
PIPELINE_PHASES = {
    schedule.LoadMicroBatch: "data",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.ReduceGrads: "optimizer",
    schedule.ReduceTiedGrads: "optimizer",
    schedule.OptimizerStep: "optimizer",
}


class Timeline:
    """When each phase of each step began: by the device's clock where it has events, which are queued and not waited
    for.

    marks: (the phase that begins, the time), of the current step. steps: the marks of each step; the last mark ends it.
    """

    def __init__(self) -> None:
        self.on_device = get_accelerator().device_name() != "cpu"
        self.marks: list[tuple[str, Any]] = []
        self.steps: list[list[tuple[str, Any]]] = []

    def mark(self, phase: str) -> None:
        if self.on_device:
            now = get_accelerator().Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def end_step(self) -> None:
        self.steps.append(self.marks)
        self.marks = [self.marks[-1]]  # the end of a step is the beginning of the next

    def restart(self) -> None:
        """Leave what was done until now out of the current step."""
        self.marks = []
        self.mark("other")

    def seconds(self) -> list[dict[str, float]]:
        """{phase: seconds} of each step. It waits for the device."""
        get_accelerator().synchronize()
        found = []
        for marks in self.steps:
            phases = dict.fromkeys(PHASES, 0.0)
            for (phase, start), (_, end) in itertools.pairwise(marks):
                phases[phase] += start.elapsed_time(end) / 1000 if self.on_device else end - start
            found.append(phases)
        return found


def restart_host_peak() -> None:
    with contextlib.suppress(OSError):  # where the kernel refuses, the peak is counted from the start of the process
        Path("/proc/self/clear_refs").write_text("5")


def host_peak() -> int:
    """The most host memory that this process has held since restart_host_peak, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


class Record:
    """What one rank has measured, and its file rank-<rank>.json."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.result: dict[str, Any] = {}

    def write(self) -> None:
        temporary = self.folder / f".rank-{ranks.rank()}.json"
        temporary.write_text(json.dumps(self.result), encoding="utf-8")
        temporary.replace(self.folder / f"rank-{ranks.rank()}.json")

    def end(self) -> NoReturn:
        """All is measured: end the run."""
        self.write()
        dist.barrier()
        (self.folder / f"ended-{ranks.rank()}").touch()  # tells lib/compare/compare.py not to wait any longer
        raise Stopped("measured", 0)

    # Each of these methods takes a function and returns a wrapper, which replaces that function.

    def save(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def timed_save(run_checkpoints: Any, step: int) -> None:
            dist.barrier()
            started = time.perf_counter()
            real(run_checkpoints, step)
            seconds = time.perf_counter() - started
            if run_checkpoints.finish():
                self.result["checkpoint_seconds"] = seconds
                files = (run_checkpoints.folder / checkpoint_files.folder_of(step)).rglob("*")
                self.result["checkpoint_bytes"] = sum(path.stat().st_size for path in files if path.is_file())
                self.write()

        return timed_save

    def log_scores(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def note_scores(measured_run: Any, step: int, split: str, scores: dict[str, float], **best: str) -> None:
            real(measured_run, step, split, scores, **best)
            if split == "test":  # all is measured now; the baselines that follow are the same for every config
                self.result["scores"] = scores
                self.end()

        return note_scores


class Sent:
    """What this rank sends others in the inspected step: collectives as DeepSpeed logs them, and what theory needs."""

    def __init__(self) -> None:
        self.counts = False  # whether the inspected step is under way
        # {"logged" | "logged_activations": {ranks of the group: {collective: {bytes of its argument: calls}}}}
        self.logged: dict[str, dict[int, dict[str, Counter[int]]]] = {"logged": {}, "logged_activations": {}}
        # Elements that go through the layers that ranks share.
        self.elements = Counter(
            dict.fromkeys(
                ("summed_outputs", "summed_gradients", "attention_outputs", "exchanged", "routed", "passed_on"), 0
            )
        )

    def begin(self) -> None:
        self.counts = True
        comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)

    def end(self) -> None:
        self.counts = False
        comm.configure(enabled=False)

    def message_size(self, real: Callable[..., int]) -> Callable[..., int]:
        """DeepSpeed calls it for each collective while these are logged, with all that the collective gets."""

        @functools.wraps(real)
        def note_collective(function: Any, *arguments: Any, **options: Any) -> int:
            size, name = real(function, *arguments, **options), function.__name__
            group = inspect.signature(function).bind_partial(*arguments, **options).arguments.get("group")
            log = self.logged["logged_activations" if is_of_activations(name, group) else "logged"]
            log.setdefault(dist.get_world_size(group), {}).setdefault(name, Counter())[size] += 1
            return size

        return note_collective

    def count(self, name: str, elements: int) -> None:
        if self.counts:
            self.elements[name] += elements

    def count_gradient(self, tensor: torch.Tensor, name: str, copies: int = 1) -> None:
        if self.counts and tensor.requires_grad:
            tensor.register_hook(  # type: ignore[no-untyped-call]  # torch gives it no types
                lambda gradient: self.count(name, copies * gradient.numel())
            )

    def watch(self, model: torch.nn.Module) -> None:
        """Count what goes through the layers that the ranks of a group share."""
        for module in model.modules():
            if isinstance(module, LinearAllreduce | VocabParallelEmbedding):
                module.register_forward_hook(lambda _, inputs, output: self.count("summed_outputs", output.numel()))
            elif isinstance(module, AutoEPMoELayer):
                module.register_forward_hook(
                    lambda layer, inputs, _: self.count("routed", layer.top_k * inputs[0].numel())
                )
            elif isinstance(module, LinearLayer):
                module.register_forward_pre_hook(lambda _, inputs: self.count_gradient(inputs[0], "summed_gradients"))

    def watch_stage(self, stage: torch.nn.Module) -> None:
        """Count what a stage of a pipeline passes on: hidden states to the next one, their gradients to the one
        before."""
        is_first, is_last = (mesh.pipeline_stage() == at for at in (0, mesh.pipeline_size() - 1))
        stage.register_forward_hook(
            lambda _, inputs, output: self.count(
                "passed_on", (0 if is_last else output.numel()) + (0 if is_first else inputs[0].numel())
            )
        )

    def attention(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def counted(attention: Any, module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
            output, weights = real(attention, module, query, key, value, *rest, **options)
            copies = max(1, attention.kv_replication_factor)
            for tensor, times in ((query, 1), (key, copies), (value, copies), (output, 1)):
                self.count("exchanged", times * tensor.numel())
                self.count_gradient(tensor, "exchanged", times)
            self.count("attention_outputs", output.numel())
            return output, weights

        return counted


def is_of_activations(collective: str, group: dist.ProcessGroup | None) -> bool:
    """Whether ranks that share layers or rows send each other activations by it, or their gradients.

    ZeRO's groups may have the same ranks, but then it uses other collectives.
    """
    if mesh.pipeline_size() > 1:
        return collective in ("send", "recv")
    if mesh.sequence_size() > 1 or mesh.expert_size() > 1:
        return collective.startswith("all_to_all")
    if mesh.tensor_size() == 1 or group is None or collective != "all_reduce":
        return False
    return dist.get_process_group_ranks(group) == dist.get_process_group_ranks(mesh.tensor_group())


class Meter:
    """What one rank measures of the steps of one run."""

    def __init__(self, folder: Path, steps: int, goes_on: bool):
        self.folder, self.last_step, self.goes_on = folder, steps, goes_on
        self.timeline, self.record = Timeline(), Record(folder)
        self.step = 1
        self.held: dict[str, dict[str, int]] = {}  # {kind: {place: bytes}}: the most of each kind in the inspected step
        self.sent = Sent()
        self.flops = 0  # floating-point operations of the inspected step's forward passes on this rank

    # Each of these methods takes a function and returns a wrapper, which replaces that function.

    def initialize(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def initialize_and_watch(*arguments: Any, **options: Any) -> Any:
            everything = real(*arguments, **options)
            engine = everything[0]
            engine.allreduce_gradients = self.allreduce_gradients(engine, engine.allreduce_gradients)
            if mesh.pipeline_size() > 1:
                Schedule(self, engine)
                return everything
            engine.forward = self.forward(engine, engine.forward)
            engine.backward = self.backward(engine, engine.backward)
            engine.step = self.engine_step(engine, engine.step)
            self.sent.watch(engine.module)
            return everything

        return initialize_and_watch

    def forward(self, engine: Any, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def timed_forward(*arguments: Any, **options: Any) -> Any:
            if not engine.training or self.step > self.last_step:
                return real(*arguments, **options)
            if self.step == INSPECTED and not self.sent.counts:
                self.sent.begin()
            self.timeline.mark("forward")  # this phase includes the loss, for it lasts until backward begins
            return self.counted(real, *arguments, **options)

        return timed_forward

    def counted(self, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a forward pass, and count its operations in the inspected step.

        A pass without gradients is not counted: the same pass with gradients follows.
        """
        if self.step != INSPECTED or not torch.is_grad_enabled():
            return forward(*arguments, **options)
        with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED) as counter:
            output = forward(*arguments, **options)
        self.flops += counter.get_total_flops()
        return output

    def backward(self, engine: Any, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def timed_backward(*arguments: Any, **options: Any) -> Any:
            if self.step == INSPECTED:
                self.record.result["gathered_parameters"] = held_bytes(engine)["parameters"]
            self.timeline.mark("backward")
            output = real(*arguments, **options)
            self.timeline.mark("other")
            if self.step == INSPECTED:
                self.note_held(held_bytes(engine))
            return output

        return timed_backward

    def allreduce_gradients(self, engine: Any, real: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed calls it at the end of the backward pass, when stages 0 and 1 still hold all gradients."""

        @functools.wraps(real)
        def watched_allreduce(*arguments: Any, **options: Any) -> Any:
            if self.step == INSPECTED:
                # Only gradients are noted: stage 3 has not yet released all the parameters that it gathered.
                self.note_held({"gradients": held_bytes(engine)["gradients"]})
            return real(*arguments, **options)

        return watched_allreduce

    def note_held(self, now: dict[str, dict[str, int]]) -> None:
        """Keep the largest count of bytes of each kind, because a rank's gradients grow and shrink within a step."""
        for kind, places in now.items():
            if sum(places.values()) > sum(self.held.get(kind, {}).values()):
                self.held[kind] = places

    def engine_step(self, engine: Any, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def timed_step(*arguments: Any, **options: Any) -> Any:
            is_last_micro_batch = engine.is_gradient_accumulation_boundary()
            self.timeline.mark("optimizer")
            output = real(*arguments, **options)
            self.timeline.mark("other")
            if is_last_micro_batch and self.step <= self.last_step:
                self.end_step(engine)
            return output

        return timed_step

    def end_step(self, engine: Any) -> None:
        self.timeline.end_step()
        if self.step == INSPECTED:
            self.inspect(engine)
            self.timeline.restart()
        if ranks.rank() == 0:
            (self.folder / "steps_done").write_text(str(self.step))
        if self.step == self.last_step:
            self.note_times_and_peaks()
            self.record.write()
            if not self.goes_on:
                self.record.end()
        self.step += 1

    def inspect(self, engine: Any) -> None:
        """At the end of the inspected step, collect what was counted in it, and the facts that theory needs."""
        self.sent.end()
        self.record.result |= {"held": self.held, "forward_flops": self.flops, **self.sent.logged}
        self.record.result["facts"] = facts(engine) | self.sent.elements
        restart_host_peak()
        if self.timeline.on_device:
            get_accelerator().reset_peak_memory_stats()

    def note_times_and_peaks(self) -> None:
        on_device = self.timeline.on_device
        self.record.result |= {
            "seconds": self.timeline.seconds(),
            "peak_host_bytes": host_peak(),
            "peak_device_bytes": get_accelerator().max_memory_allocated() if on_device else None,
        }

    def training_batches(self, real: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(real)
        def timed_batches(*arguments: Any, **options: Any) -> Iterator[Any]:
            batches = real(*arguments, **options)
            while True:
                self.timeline.mark("data")
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self.timeline.mark("other")
                yield batch

        return timed_batches


class Schedule:
    """Lets the instructions by which a pipeline computes a step mark its phases. See Meter."""

    def __init__(self, meter: Meter, engine: Any):
        self.meter = meter
        engine.train_batch = self.step(engine, engine.train_batch)
        engine._INSTRUCTION_MAP = {
            kind: self.instruction(PIPELINE_PHASES.get(kind, "waiting"), real)
            for kind, real in engine._INSTRUCTION_MAP.items()
        }
        meter.sent.watch_stage(engine.module)

    def step(self, engine: Any, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def measured_step(*arguments: Any, **options: Any) -> Any:
            if self.meter.step == INSPECTED:
                self.meter.sent.begin()
            loss = real(*arguments, **options)
            if self.meter.step <= self.meter.last_step:
                self.meter.end_step(engine)
            return loss

        return measured_step

    def instruction(self, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """Of a pipeline's schedule."""

        @functools.wraps(real)
        def timed_instruction(engine: Any, *arguments: Any, **options: Any) -> Any:
            if not engine.module.training or self.meter.step > self.meter.last_step:
                return real(engine, *arguments, **options)
            if phase == "backward" and self.meter.step == INSPECTED:
                self.meter.record.result.setdefault("gathered_parameters", held_bytes(engine)["parameters"])
            self.meter.timeline.mark(phase)
            call = functools.partial(self.meter.counted, real) if phase == "forward" else real
            output = call(engine, *arguments, **options)
            self.meter.timeline.mark("other")
            if phase == "backward" and self.meter.step == INSPECTED:
                self.meter.note_held(held_bytes(engine))
            return output

        return timed_instruction


def facts(engine: Any) -> dict[str, Any]:
    """What theory needs to know about the model and how this rank trains it.

    Sizes are numbers of elements, where the name does not say bytes. Of what a tensor-parallel group shares, this rank
    has a part; "whole" counts all of it.
    """
    zero, stage = engine.optimizer, stage_of(engine.config)
    model = model_of(engine)
    parameters = {parameter: getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()}
    # Stage 3 keeps small parameters whole on every rank, beside the shares, where these are not the whole already.
    kept_whole = {
        parameter
        for parameter, count in parameters.items()
        if getattr(parameter, "ds_persist", False) and parameter.ds_tensor.numel() < count
    }
    # A tied parameter is listed once for each module that has it, because stage 3 gathers it for each.
    gathered = [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter not in kept_whole
    ]

    def counts(counted: Collection[Any]) -> dict[str, int]:
        in_modules = [parameter for parameter in gathered if parameter in counted]
        kinds = {
            "parameters": counted,
            "trained": [parameter for parameter in counted if parameter.requires_grad],
            "kept_whole": [parameter for parameter in counted if parameter in kept_whole],
            "in_modules": in_modules,
            "frozen_in_modules": [parameter for parameter in in_modules if not parameter.requires_grad],
        }
        return {kind: sum(parameters[parameter] for parameter in found) for kind, found in kinds.items()}

    whole = {
        parameter: math.prod(found.shape) if (found := layout(parameter)) is not None else count
        for parameter, count in parameters.items()
    }
    copied = []  # what two stages of a pipeline have
    if mesh.pipeline_size() > 1:  # each stage is trained whole
        whole = {name: math.prod(shape) for name, shape in shapes_of_all_stages(engine).items()}
        copied = [weight for weight, _ in engine.module.get_tied_weights_and_groups()]
    in_partition = getattr(zero, "params_in_partition", None)
    accelerator = get_accelerator()
    experts = {parameter for parameter in parameters if is_shared(parameter)}
    touching = sum(parameter.numel() for group in in_partition for parameter in group) if in_partition else None
    of_experts = sum(p.numel() for group in in_partition for p in group if is_shared(p)) if in_partition else None
    return {
        "model": type(model).__name__,
        "whole_parameters": sum(whole.values()),
        "whole_trained": sum(
            count for parameter, count in whole.items() if isinstance(parameter, str) or parameter.requires_grad
        ),
        **counts(parameters),
        "not_shared": counts({parameter for parameter in parameters if layout(parameter) is None}),
        # At stages 1 and 2, all of the parameters that lie in this rank's share, be it only in part.
        "touching_share": touching,
        "of_experts": {**counts(experts), "touching_share": of_experts} if experts else {},
        "stage": stage,
        "element_bytes": next(iter(parameters)).element_size(),
        "accumulation_steps": engine.gradient_accumulation_steps(),
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "world_size": ranks.world_size(),
        "zero_ranks": mesh.gradient_size(),
        "tensor_size": mesh.tensor_size(),
        "sequence_size": mesh.sequence_size(),
        "expert_size": mesh.expert_size(),
        "pipeline_size": mesh.pipeline_size(),
        "copied": sum(weight.numel() for weight in copied),
        "device": torch.cuda.get_device_name() if accelerator.device_name() == "cuda" else accelerator.device_name(),
        "device_bytes": accelerator.total_memory() if accelerator.device_name() != "cpu" else None,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    folder, steps, mode, recipe, *settings = arguments
    sys.argv = [recipe, *settings]
    meter = Meter(Path(folder), int(steps), goes_on=mode == "all")
    deepspeed.initialize = meter.initialize(deepspeed.initialize)
    # These are replaced before the recipe is imported, so that the recipe needs no line of its own to be measured.
    comm.get_msg_size_from_args = meter.sent.message_size(comm.get_msg_size_from_args)
    UlyssesSPAttentionHF.forward = meter.sent.attention(UlyssesSPAttentionHF.forward)
    batches.training_batches = meter.training_batches(batches.training_batches)
    # mypy wants methods to stay as they are; these two are watched.
    checkpoints.Checkpoints.save = meter.record.save(checkpoints.Checkpoints.save)  # type: ignore[method-assign]
    run.Run.log_scores = meter.record.log_scores(run.Run.log_scores)  # type: ignore[method-assign]
    try:
        runpy.run_path(recipe, run_name="__main__")
    except Stopped:  # reaches this where the recipe does not go through lib.run.cli.cli
        leave(0)


if __name__ == "__main__":
    main()
