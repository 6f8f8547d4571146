"""Mixtures of experts: the sizes of new ones, the loss that balances their experts, and how many tokens each gets."""

from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import nn

from lib.distributed import mesh
from lib.errors import UserError


@dataclass(frozen=True)
class Names:
    """What transformers' config of an architecture calls the sizes of its mixtures of experts."""

    experts: str  # how many a layer has
    per_token: str = "num_experts_per_tok"  # how many compute each token
    widths: tuple[str, ...] = ()  # inside each expert, and inside those that all tokens pass; (): intermediate_size
    is_sigmoid: bool = False  # whether a token's affinity to an expert is a sigmoid; else a softmax over all experts
    others: dict[str, Any] = field(default_factory=dict)  # which fit small models: experts in each layer, one group


EACH_LAYER: dict[str, Any] = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
ARCHITECTURES = {  # those whose routers test_experts.py has checked
    "mixtral": Names("num_local_experts"),
    "qwen3_moe": Names("num_experts", widths=("moe_intermediate_size",)),
    "qwen2_moe": Names("num_experts", widths=("moe_intermediate_size", "shared_expert_intermediate_size")),
    "olmoe": Names("num_experts"),
    "flex_olmo": Names("num_experts"),
    "granitemoe": Names("num_local_experts"),
    "gpt_oss": Names("num_local_experts"),
    "ernie4_5_moe": Names("moe_num_experts", "moe_k", ("moe_intermediate_size",), others={"moe_layer_start_index": 0}),
    "deepseek_v3": Names("n_routed_experts", widths=("moe_intermediate_size",), is_sigmoid=True, others=EACH_LAYER),
    "glm4_moe": Names("n_routed_experts", widths=("moe_intermediate_size",), is_sigmoid=True, others=EACH_LAYER),
    "dots1": Names("n_routed_experts", widths=("moe_intermediate_size",), is_sigmoid=True, others=EACH_LAYER),
}
ANY_NAME = {names.experts for names in ARCHITECTURES.values()}


def sizes(architecture: str, num_experts: int | None, experts_per_token: int, width: int) -> dict[str, Any]:
    """What the config of a new model says of its experts; nothing for a dense model, which has none.

    num_experts: in each layer; None: a dense model. width: inside each expert.
    Raises UserError where the architecture has no experts and num_experts is given, or the other way round.
    """
    names = ARCHITECTURES.get(architecture)
    if names is None and num_experts is not None:
        raise UserError(
            f"num_experts is {num_experts}, but architecture '{architecture}' is no mixture of experts that can be "
            f"made here; set --architecture to one of {', '.join(ARCHITECTURES)}, or leave num_experts out"
        )
    if names is None:
        return {}
    if num_experts is None:
        raise UserError(
            f"architecture '{architecture}' is a mixture of experts; set --num_experts, for example 8, "
            "or a dense --architecture such as llama"
        )
    if experts_per_token > num_experts:
        raise UserError(f"experts_per_token is {experts_per_token}, but num_experts is {num_experts}; lower the first")
    counts = {names.experts: num_experts, names.per_token: experts_per_token}
    return counts | dict.fromkeys(names.widths, width) | names.others


def _routers_of(model: Any) -> list[nn.Module]:
    """Those of expert parallelism, or those whose output transformers records: logits, weights, chosen experts."""
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    for kind in (TokenChoiceTopKRouter, getattr(recorded, "target_class", None)):
        found = [module for module in model.modules() if kind is not None and type(module) is kind]
        if found:
            return found
    return []


class Routers:
    """What the routers of a mixture of experts decide in training; a dense model has none, and its figures are empty.

    After each forward pass in training, `balance` must be called once, and it gives the loss

        mean over layers of  sum_i f_i P_i,   f_i = N / (K T) * (tokens of the row that expert i gets),
                                              P_i = 1 / T * sum_t s_it / sum_j s_jt

    of each row of T tokens, with N experts, of which each token gets K; s_it is the affinity of token t to expert i. It
    is 1 where all experts get as many tokens, and at most N / K (DeepSeek-V3, Liu et al. 2024, equations 17 to 20;
    there, layers are summed). It belongs to a row, as the loss of Switch Transformers (Fedus et al. 2021, equation 4)
    does not: that takes f and P over a whole batch, and would depend on how a step is cut into micro-batches and ranks.

    Make it from the engine's module, after deepspeed.initialize: stage 3 must see what the loss takes of a layer.
    """

    def __init__(self, model: Any, balance_loss: float):
        """balance_loss: the weight that the recipe gives to the loss.

        Raises UserError where it is not 0 and this is a mixture of experts whose routers are not known here.
        """
        config = model.config.get_text_config()
        names = ARCHITECTURES.get(config.model_type)
        self.is_sigmoid = names is not None and names.is_sigmoid
        self.modules = _routers_of(model) if names is not None else []
        if not self.modules and balance_loss and any((getattr(config, name, None) or 0) > 1 for name in ANY_NAME):
            raise UserError(
                f"balance_loss is {balance_loss}, but the routers of architecture '{config.model_type}' are not known "
                f"here (those of {', '.join(ARCHITECTURES)} are); set --balance_loss 0"
            )
        self._records = False  # recomputation for activation checkpointing must not record once more
        self._found: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: logits and chosen experts
        self._logits: torch.Tensor | None = None  # of the layer at work
        self._step: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each micro-batch: balance, tokens of each expert
        if self.modules:
            model.register_forward_pre_hook(self._begin)
        for router in self.modules:
            if isinstance(router, TokenChoiceTopKRouter):  # whose output has no logits
                router.gate.register_forward_hook(self._note_logits)
            router.register_forward_hook(self._note)

    def _begin(self, model: nn.Module, _: Any) -> None:
        self._found, self._records = [], model.training

    def _note_logits(self, _: nn.Module, __: Any, logits: torch.Tensor) -> None:
        self._logits = logits if self._records else None

    def _note(self, _: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        if self._records:  # logits [tokens, experts] and the chosen experts, [tokens, experts of each token]
            self._found.append((output[0], output[2]) if self._logits is None else (self._logits, output[1]))
            self._logits = None

    def balance(self, rows: torch.Tensor) -> torch.Tensor:
        """The balance loss of this rank's rows of the last forward pass, summed over rows; 0 for a dense model.

        rows: [rows, length] or [rows, length, ...], what the model was given. Where ranks share rows, each has the
        share of its tokens, and the sum over these ranks is the loss of the rows.
        """
        self._records = False
        if not self.modules:
            return torch.zeros((), device=rows.device)
        assert len(self._found) == len(self.modules), "no forward pass in training since the last call"
        logits, chosen = (torch.stack(layers) for layers in zip(*self._found, strict=True))
        self._found = []
        layers, _, experts = logits.shape
        scores = logits.float().sigmoid() if self.is_sigmoid else logits.float().softmax(-1)
        scores = (scores / scores.sum(-1, keepdim=True)).view(layers, len(rows), -1, experts)
        chosen = chosen.view(layers, len(rows), -1)
        ones = torch.ones_like(chosen, dtype=scores.dtype)
        tokens = scores.new_zeros(layers, len(rows), experts).scatter_add_(2, chosen, ones)
        row_tokens = mesh.sum_over_sequence(tokens)  # of whole rows, by all ranks that share them
        share = row_tokens / row_tokens.sum(-1, keepdim=True) * experts
        length = scores.shape[2] * mesh.sequence_size()
        balance = (share * scores.sum(2)).sum() / (length * layers)
        self._step.append((balance.detach(), tokens.sum(1).long()))
        return balance

    def figures(self, rows: int) -> dict[str, torch.Tensor]:
        """This rank's shares of what metrics.jsonl has of a step: the mean balance loss of its `rows` over all ranks,
        and `tokens_per_expert`, [layers, experts]."""
        if not self.modules:
            return {}
        balance, tokens = (torch.stack(values).sum(0) for values in zip(*self._step, strict=True))
        self._step = []
        return {"balance": balance / rows, "tokens_per_expert": tokens}
