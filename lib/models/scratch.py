"""What training from scratch starts with: the config of a new model, and a tokenizer learned from the texts."""

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lib.distributed import ranks
from lib.errors import UserError, did_you_mean
from lib.models.hub import set_dropout
from lib.progress import progress


def new_config(architecture: str, auto_class: Any, num_heads: int, hidden_size: int, **sizes: Any) -> PretrainedConfig:
    """The config of a model to train from scratch, without dropout.

    architecture: transformers' name, such as "llama". auto_class: the one of transformers' AutoModelFor... classes that
    will make the model. sizes: further keys of the config, under the names of transformers.
    Raises UserError where the architecture is unknown, or does not fit the class or the sizes.
    """
    if architecture not in CONFIG_MAPPING:
        raise UserError(
            f"architecture '{architecture}' is none of transformers'{did_you_mean(architecture, CONFIG_MAPPING)}"
        )
    if CONFIG_MAPPING[architecture] not in auto_class._model_mapping:
        fitting = [kind.model_type for kind in auto_class._model_mapping]
        raise UserError(
            f"architecture '{architecture}' has no {auto_class.__name__}, which this recipe trains"
            f"{did_you_mean(architecture, fitting) or '; set another --architecture'}"
        )
    if hidden_size % num_heads:
        raise UserError(f"hidden_size {hidden_size} is no multiple of num_heads {num_heads}")
    try:
        return set_dropout(
            AutoConfig.for_model(architecture, hidden_size=hidden_size, num_attention_heads=num_heads, **sizes), 0.0
        )
    except (StrictDataclassError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
        # For example, a head whose width is odd cannot have rotary positions.
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"architecture '{architecture}' cannot be made with these sizes: {reason}") from None


END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}  # the special tokens of a language model


@progress("training the tokenizer")
def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Mapping[str, str | AddedToken], template: str = "$A"
) -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE from texts. Any text can be encoded with it and decoded without loss.

    special_tokens: by transformers' names, such as {"eos_token": "</s>"}. template: how a text is encoded, such as
    "<s> $A </s>", where $A stands for the text.
    Names of special tokens in a text, such as <s> in HTML, are encoded as text. With a mask token among them, they are
    encoded as special tokens: users of a masked language model write <mask> into their texts.
    Every rank must call it; rank 0 learns. Raises UserError where vocab_size is too small.
    """
    names = list(dict.fromkeys(map(str, special_tokens.values())))
    if vocab_size < 256 + len(names):
        raise UserError(
            f"vocab_size is {vocab_size}; it must hold 256 bytes and {len(names)} special tokens: "
            f"{256 + len(names)} or more"
        )

    def learn() -> PreTrainedTokenizerBase:
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, vocab_size, special_tokens=names, show_progress=False)
        if template != "$A":
            pair = f"{template} $B{template.partition('$A')[2]}"  # as BERT joins a question and a text
            ids = [(name, bpe.token_to_id(name)) for name in names]
            bpe._tokenizer.post_processor = TemplateProcessing(single=template, pair=pair, special_tokens=ids)
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, split_special_tokens="mask_token" not in special_tokens, **special_tokens
        )

    return ranks.on_rank0(learn)
