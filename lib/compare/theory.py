"""What a ZeRO config should cost a rank: the paper's formulas, and how DeepSpeed 0.19.8 departs from them.

The paper is Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", sections 5
(states) and 7 (traffic). Psi is the number of parameters, N the number of ranks over which ZeRO divides. The paper
counts mixed precision: 2 bytes for a parameter, 2 for a gradient, 12 for fp32 copy, momentum and variance; in fp32
these are 4, 4 and 8. The facts are those of lib/compare/measure.py: numbers of elements. No measured bytes enter the
formulas.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lib.settings.ds_config import offload_device, stage_of
from lib.settings.states import bytes_each

REUSE_DISTANCE = 1_000_000_000  # elements; DeepSpeed's default of stage3_max_reuse_distance
PAPER_STAGE3 = (
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
)
KINDS = ("parameters", "gradients", "optimizer")
NOT_SHARED = (
    "embeddings, norms and the output layer are whole on each rank of a tensor-parallel group, where the paper divides"
    " the whole model"
)
STAGES_DIFFER = (
    "the first stage of a pipeline has the embedding, the last one the output layer, and both have it where the two are"
    " tied; the paper divides the whole model"
)

# Peak matrix FLOP/s of devices, dense, without sparsity: {part of the name: (16-bit, fp32)}, from the vendors' data
# sheets; TF32, where there is one, has half of the 16-bit figure. The first part that a device's name contains counts.
PEAK_FLOPS = {
    "H100 PCIe": (756e12, 51e12), "H100 NVL": (835e12, 60e12), "H100": (989e12, 67e12), "H200": (989e12, 67e12),
    "GH200": (989e12, 67e12), "H800": (989e12, 67e12), "H20": (148e12, 44e12), "B200": (2250e12, 75e12),
    "A100": (312e12, 19.5e12), "A800": (312e12, 19.5e12), "A40": (149.7e12, 37.4e12), "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12), "L40S": (362e12, 91.6e12), "L40": (181e12, 90.5e12), "L4": (121e12, 30.3e12),
    "V100": (125e12, 15.7e12), "T4": (65e12, 8.1e12), "MI300X": (1307e12, 163e12),
}  # fmt: skip


@dataclass
class Expected:
    """A figure of the paper in bytes, and what DeepSpeed adds to it or takes from it: (bytes, the reason)."""

    paper: float
    differences: list[tuple[float, str]] = field(default_factory=list)

    @property
    def total(self) -> float:
        return self.paper + sum(amount for amount, _ in self.differences)

    def differs(self, amount: float, why: str) -> None:
        if amount:
            self.differences.append((amount, why))


def peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of the device of this name in a precision; None where it is unknown, as for CPUs."""
    found = next((peaks for part, peaks in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device)), None)
    if found is None:
        return None
    half, single = found
    return {"fp32": single, "tf32": half / 2}.get(precision, half)


def _parts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of what ZeRO divides over the same ranks: of all, or of the experts that a rank has, which it divides
    over the ranks that have them too, and of the rest."""
    experts = facts.get("of_experts") or {}
    if not experts:
        return [facts]
    rest = {kind: facts[kind] - count for kind, count in experts.items() if facts[kind] is not None}
    ranks = facts["zero_ranks"] // facts["expert_size"]
    return [
        facts | part | {"whole_parameters": part["parameters"], "whole_trained": part["trained"]}
        for part in (rest, {**experts, "zero_ranks": ranks})
    ]


def _sum_of(parts: Iterable[Expected]) -> Expected:
    parts = list(parts)
    return Expected(sum(part.paper for part in parts), [pair for part in parts for pair in part.differences])


def states(ds_config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Expected]:
    """{kind: bytes} of "parameters", "gradients" and "optimizer" states on a rank, on device and host together.

    The bytes are the most that a rank has after any backward pass of a step, with AdamW.
    """
    found = [_states(ds_config, part) for part in _parts(facts)]
    return {kind: _sum_of(part[kind] for part in found) for kind in KINDS}


def _states(ds_config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Expected]:
    stage, ranks, size = facts["stage"], facts["zero_ranks"], facts["element_bytes"]
    psi, trained, accumulates = facts["parameters"], facts["trained"], facts["accumulation_steps"] > 1
    # What each rank of a tensor-parallel group or a pipeline would have if the whole model was divided evenly.
    stages = facts.get("pipeline_size", 1)
    evenly = facts["tensor_size"] * stages
    divided, divided_trained = (facts[name] / evenly for name in ("whole_parameters", "whole_trained"))
    why = STAGES_DIFFER if stages > 1 else NOT_SHARED
    if stage == 3:  # divides what a group does not share over the group too
        psi, trained = divided, divided_trained
    offloads, zero = offload_device(ds_config, "optimizer") != "none", ds_config.get("zero_optimization", {})
    each = bytes_each(stage, ranks, size)
    parameters = Expected(each["parameters"] * divided)
    gradients, optimizer = (Expected(each[kind] * divided_trained) for kind in ("gradients", "optimizer"))
    parameters.differs(each["parameters"] * (psi - divided), why)
    gradients.differs(each["gradients"] * (trained - divided_trained), why)
    optimizer.differs(each["optimizer"] * (trained - divided_trained), why)
    if stage >= 1 and size == 4:
        optimizer.differs(
            4 * trained / ranks,
            "ZeRO keeps a separate fp32 copy of a rank's share even when the model itself is in fp32",
        )
    if stage == 3:
        parameters.differs(
            size * facts["kept_whole"],
            "parameters of at most stage3_param_persistence_threshold elements are kept whole on every rank,"
            " beside the shares",
        )
    share = size * trained / ranks
    straddling = size * facts["touching_share"] - share if facts["touching_share"] is not None else 0.0
    reduced_in_backward = stage == 2 or (stage == 1 and zero.get("overlap_comm", False) and not accumulates)
    if stage == 1 and reduced_in_backward:
        gradients.differs(
            share - gradients.total,
            "with overlap_comm and no accumulation, gradients move into the communication buffer during backward,"
            " which is not counted",
        )
    if offloads:
        freed = share if reduced_in_backward and not accumulates else 0
        gradients.differs(
            4 * trained / ranks - freed, "offloading keeps the gradients of a rank's share in fp32 in host memory"
        )
    if reduced_in_backward and not (offloads and not accumulates):
        gradients.differs(
            straddling, "a tensor that straddles the edge of two ranks' shares keeps its whole gradient on both"
        )
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def traffic(ds_config: dict[str, Any], facts: dict[str, Any]) -> Expected:
    """The bytes of parameters and gradients that a rank sends in an optimizer step, with ring collectives."""
    ranks, size = facts["zero_ranks"], facts["tensor_size"]
    if facts["stage"] < 3 or size == 1:
        found = _sum_of(_traffic(ds_config, part, part["zero_ranks"]) for part in _parts(facts))
        found.differs(
            facts["element_bytes"] * facts.get("copied", 0),
            "the first and the last stage of a pipeline sum their gradients of the weight that both have",
        )
        return found
    # Stage 3 divides what a tensor-parallel group does not share over the group too.
    not_shared = facts["not_shared"]
    shared = {kind: facts[kind] - count for kind, count in not_shared.items()}
    parts = [_traffic(ds_config, facts | shared, ranks), _traffic(ds_config, facts | not_shared, ranks * size)]
    return _sum_of(parts)


def _traffic(ds_config: dict[str, Any], facts: dict[str, Any], ranks: int) -> Expected:
    stage, micro_steps = facts["stage"], facts["accumulation_steps"]
    zero = ds_config.get("zero_optimization", {})
    ring = facts["element_bytes"] * (ranks - 1) / ranks  # bytes that a rank sends for one element in one pass
    gradients, parameters = ring * facts["trained"], ring * facts["parameters"]
    volume = Expected(3 * parameters if stage == 3 else 2 * gradients)
    if stage in (1, 2):
        rounds = micro_steps if stage == 2 else 1
        # A rank gets only its share of the sums if all three of these hold. Offloading makes gradients contiguous.
        contiguous = zero.get("contiguous_gradients", True) or offload_device(ds_config, "optimizer") != "none"
        all_reduces = (
            zero.get("use_multi_rank_bucket_allreduce", True) or not zero.get("reduce_scatter", True) or not contiguous
        )
        if all_reduces:
            why = (
                "unless use_multi_rank_bucket_allreduce is false, and reduce_scatter and contiguous_gradients are true"
            )
            volume.differs(gradients, f"each rank is sent the sums of all gradients, not of its share alone, {why}")
        volume.differs(
            (rounds - 1) * (2 if all_reduces else 1) * gradients,
            "stage 2 reduces the gradients of every micro-batch, the paper once a step",
        )
    if stage == 3:
        kept_whole, in_modules = ring * facts["kept_whole"], ring * facts["in_modules"]
        gathered = parameters - kept_whole
        # A module's parameters are kept from forward to backward if the elements used in between are fewer than the
        # reuse distance. Between the two, every later module is used twice. The rest of the parameters is released.
        released = max(0.0, 1 - zero.get("stage3_max_reuse_distance", REUSE_DISTANCE) / 2 / max(1, facts["in_modules"]))
        volume.differs(-kept_whole, "parameters kept whole are gathered once, after the optimizer's step")
        volume.differs(
            (released - 1) * gathered,
            "parameters that are used again within stage3_max_reuse_distance elements are gathered once,"
            " and kept until backward",
        )
        volume.differs(
            2 * released * (in_modules - gathered), "a parameter that two modules share is gathered for each of them"
        )
        per_micro_batch = (1 - released) * gathered + 2 * released * in_modules
        volume.differs((micro_steps - 1) * per_micro_batch, "parameters are gathered at every micro-batch")
        volume.differs(
            (micro_steps - 1) * gradients, "stage 3 reduces the gradients of every micro-batch, the paper once a step"
        )
        volume.differs(gradients - parameters, "parameters that are not trained have no gradients to reduce")
        volume.differs(
            -micro_steps * released * ring * facts["frozen_in_modules"],
            "parameters that are not trained are not gathered for the backward pass",
        )
    return volume


def activation_traffic(facts: dict[str, Any]) -> Expected:
    """The bytes that a rank sends in an optimizer step to those that share its layers or its rows.

    Tensor parallel (Shoeybi et al. 2019, "Megatron-LM", section 3): the outputs of each block are summed over the group
    in the forward pass, and the gradients of its inputs in the backward pass; so each layer has four all-reduces of
    tokens x hidden size, and a shared vocabulary two. Sequence parallel (Jacobs et al. 2023, "DeepSpeed Ulysses",
    section 3.2): each layer has four all-to-alls of this rank's tokens x hidden size (queries, keys, values, outputs)
    in each of the two passes. Expert parallel (Lepikhin et al. 2020, "GShard", section 3.2): each layer has two
    all-to-alls (to the experts and back) in each of the two passes, of this rank's tokens x experts of each x hidden
    size where the experts get equally many tokens; in the mean over ranks they are as large in any case. Pipeline
    (Huang et al. 2019, "GPipe", section 2): a stage sends the hidden states of each micro-batch to the next one, and
    their gradients to the one before.
    """
    size = facts["element_bytes"]
    if facts.get("pipeline_size", 1) > 1:
        return Expected(size * facts["passed_on"])
    if facts.get("expert_size", 1) > 1:
        return Expected(4 * size * (facts["expert_size"] - 1) / facts["expert_size"] * facts["routed"])
    if facts["tensor_size"] > 1:
        ring = 2 * size * (facts["tensor_size"] - 1) / facts["tensor_size"]
        sent = Expected(2 * ring * facts["summed_outputs"])
        sent.differs(
            ring * (facts["summed_gradients"] - facts["summed_outputs"]),
            "the gradients of a block's inputs are summed once for each matrix that reads them: queries, keys, values; "
            "gate, up",
        )
        return sent
    once = size * (facts["sequence_size"] - 1) / facts["sequence_size"]
    sent = Expected(8 * once * facts["attention_outputs"])
    sent.differs(
        once * (facts["exchanged"] - 8 * facts["attention_outputs"]),
        "keys and values have other numbers of heads than queries, or activations are computed again",
    )
    return sent


def wire_bytes(logged: dict[str, dict[str, dict[str, int]]]) -> dict[str, float]:
    """{collective: bytes that a rank sends} from DeepSpeed's log, {N: {collective: {bytes of its argument: calls}}}.

    N: the ranks of the group.
    With rings, a rank sends 2(N-1)/N times the argument of an all-reduce and (N-1)/N times that of a reduce-scatter
    (nccl-tests, PERFORMANCE.md). The argument of an all-gather is a rank's share, and a rank sends N-1 times as many
    bytes. All ranks but one pass on the argument of a reduce or broadcast: (N-1)/N times the argument on average.
    """
    sent: dict[str, float] = {}
    for ranks, by_collective in ((int(ranks), by_collective) for ranks, by_collective in logged.items()):
        once = (ranks - 1) / ranks
        factors = {
            "all_gather_into_tensor": ranks - 1,
            "all_gather": ranks - 1,
            "all_reduce": 2 * once,
            "all_reduce_coalesced": 2 * once,
            "barrier": 0,
            "send": 1,
            "recv": 0,
        }
        for op, sizes in by_collective.items():
            value = factors.get(op, once) * sum(int(size) * calls for size, calls in sizes.items())
            sent[op] = sent.get(op, 0.0) + value
    return {op: value for op, value in sent.items() if value}


def with_paper_preset(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The config with ZeRO's knobs set so that the traffic is the paper's on a model of any size."""
    changed = ds_config | {"zero_optimization": dict(ds_config.get("zero_optimization", {}))}
    if stage_of(ds_config) in (1, 2):
        changed["zero_optimization"] |= {
            "use_multi_rank_bucket_allreduce": False,
            "reduce_scatter": True,
            "contiguous_gradients": True,
        }
    if stage_of(ds_config) == 3:
        changed["zero_optimization"] |= dict.fromkeys(PAPER_STAGE3, 0)
    return changed
