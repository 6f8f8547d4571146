"""Low-rank adapters (Hu et al. 2021, LoRA): W x + (alpha / rank) B A x, where W stays as it is and A and B learn."""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from lib.distributed.stored_weights import seen_as_fp32
from lib.errors import UserError

ALL = "all-linear"  # peft's name for all linear layers but the output layer


def add_lora(model: PreTrainedModel, rank: int, alpha: float, targets: str) -> PreTrainedModel:
    """The model with an adapter beside each linear layer that `targets` names, and all else frozen.

    targets: "all-linear", or the ends of layers' names with commas between them, such as "q_proj,v_proj". B begins as
    zeros, so that the model gives what it gave before. Raises UserError where a name fits no layer.
    """
    names: Any = ALL if targets == ALL else [name.strip() for name in targets.split(",")]
    for name in [] if names == ALL else names:
        if not any(f".{module}".endswith(f".{name}") for module, _ in model.named_modules()):
            ends = sorted({module.rpartition(".")[2] for module, layer in model.named_modules() if _is_linear(layer)})
            raise UserError(f"lora_targets: {type(model).__name__} has no layer '{name}'; it has {', '.join(ends)}")
    try:
        with seen_as_fp32(model):  # peft gives an adapter the type of the weights beside it, which may be 16 bits
            model.add_adapter(LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=names))
    except ValueError as error:
        raise UserError(f"lora_targets {targets}: {' '.join(str(error).split())[:200]}") from None
    # transformers would name the folder of this machine's cache.
    name = model.config.name_or_path
    model.name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    model.peft_config["default"].base_model_name_or_path = model.config.name_or_path = model.name_or_path
    return model


def _is_linear(layer: Any) -> bool:
    return getattr(layer, "weight", None) is not None and layer.weight.dim() == 2 and not hasattr(layer, "padding_idx")
