"""Models that were trained as adapters (LoRA): what they lie on, and both merged into one model.

A folder that peft saved has adapter_config.json, with the name of the base model, and adapter_model.safetensors. The
base may be an adapter folder itself, as after preference tuning on top of instruction tuning.
"""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lib.errors import UserError
from lib.models import hub


def load_merged(name: str, adapter: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The language model of a folder or hub id in fp32, with its own adapter if the folder has one, then `adapter`.

    Raises UserError where one of them cannot be read, or where an adapter does not fit its base.
    """
    base = hub.base_of(name)
    if base is None:
        config = hub.load_config(name, 0.0, trust_remote_code)
        model = hub.load_weights(AutoModelForCausalLM, name, config, trust_remote_code)
    elif Path(base).resolve() == Path(name).resolve():
        raise UserError(f"{name}: an adapter whose base_model_name_or_path is its own folder")
    else:
        model = merge_adapter(load_merged(base, None, trust_remote_code), name)
    return model if adapter is None else merge_adapter(model, adapter)


def merge_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the adapter of a folder added to its weights.

    If the tokenizer beside the adapter has more tokens than the model, the adapter holds the embeddings of the new
    ones. Raises UserError where the adapter does not fit.
    """
    if hub.base_of(folder) is None:
        raise UserError(f"{folder} has no adapter ({hub.ADAPTER_CONFIG})")
    model.float()  # in 16 bits, as load_model may have read it, the sum would be rounded
    try:
        _prepare(model, folder)
        merged: PreTrainedModel = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(
            f"adapter {folder} does not fit {model.config.name_or_path}, or cannot be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None
    _settle_tied_embeddings(merged)
    merged.config.name_or_path = folder
    return merged.requires_grad_(True)  # which peft had frozen


def _prepare(model: PreTrainedModel, folder: str) -> None:
    """Give the model the embeddings that the adapter of a folder was trained with."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    (name,) = (name.split(".")[-1] for name, module in model.named_modules() if module is embeddings)
    with safe_open(Path(folder) / hub.ADAPTER_WEIGHTS, "pt") as weights:
        keys = [key for key in weights.keys() if f".{name}." in key]  # noqa: SIM118  # it is no dict
        rows = [weights.get_slice(key).get_shape()[0] for key in keys if key.endswith(f".{name}.weight")]
    if any(f".{name}.lora_" in key for key in keys) and output is not None and output.weight is embeddings.weight:
        # In training, LoRA on the input embeddings leaves the output's as they are. Merged into tied ones, it would
        # change both.
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    if not (Path(folder) / "tokenizer.json").is_file():
        return
    tokens, known = len(AutoTokenizer.from_pretrained(folder)), embeddings.num_embeddings
    if tokens <= known:
        return
    if not keys:
        raise UserError(
            f"adapter {folder}: the tokenizer beside it has {tokens:,} tokens, its base {known:,}, "
            "and it holds no embeddings for the new ones"
        )
    # The adapter has the values of the new rows; there may be more of them than tokens, to make a round number.
    model.resize_token_embeddings(max([tokens, *rows]), mean_resizing=False)


def _settle_tied_embeddings(model: PreTrainedModel) -> None:
    """Tie the embeddings again if they are equal still; else let the config say that they are not."""
    output = model.get_output_embeddings()
    if not model.config.tie_word_embeddings or output is None:
        return
    weight = model.get_input_embeddings().weight
    if output.weight is not weight:
        if output.weight.shape == weight.shape and torch.equal(output.weight, weight):
            output.weight = weight
        else:
            model.config.tie_word_embeddings = False


def load_tokenizer(name: str, adapter: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of what load_merged loads: the one beside the adapter, or else the one of its base.

    If it has no padding token, its end-of-text token becomes one. Raises UserError where there is none.
    """
    folder, base = adapter or name, hub.base_of(adapter or name)
    if base is not None and not (Path(folder) / "tokenizer.json").is_file():
        return load_tokenizer(name if adapter else base, None, trust_remote_code)
    tokenizer = hub.read_tokenizer(folder, trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
