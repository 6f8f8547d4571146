"""Chat templates: the tokenizer of a model that converses, and what the model needs for it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.data.conversations import end_of_answer
from lib.errors import UserError
from lib.models import adapters, checks, hub, lora, packing

TEMPLATES = {
    # OpenAI's ChatML, with two tokens that the tokenizer may lack.
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # With no other token than the one that ends a text.
    "plain": (
        "{% for message in messages %}"
        "{{ message['role'].capitalize() + ':\n' + message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
    ),
}
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


def load_tokenizer(
    model: str, chat_template: str | None, max_length: int, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, with a chat template. Every rank must call it.

    chat_template: None for the tokenizer's own, one of TEMPLATES, or a file with one in Jinja. Raises UserError where
    there is none, and where it would not let a model learn to end an answer.
    """
    tokenizer = hub.load_tokenizer(model, max_length, trust_remote_code)
    if chat_template is not None:
        if chat_template not in TEMPLATES and not Path(chat_template).is_file():
            raise UserError(
                f"chat_template {chat_template}: it is neither {' nor '.join(TEMPLATES)} nor a file with a template"
            )
        if chat_template == "chatml":
            tokenizer.add_special_tokens({"additional_special_tokens": CHATML_TOKENS})
            tokenizer.eos_token = CHATML_TOKENS[1]
        tokenizer.chat_template = TEMPLATES.get(chat_template) or Path(chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise UserError(
            f"model {model}: its tokenizer has no chat template, as it is no chat model; set --chat_template chatml, "
            "or plain, which adds no tokens"
        )
    tokenizer.split_special_tokens = False  # as causal_lm's are: a chat template writes special tokens into the text
    end_of_answer(tokenizer)
    return tokenizer


def build_model(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The decoder that `cfg` asks for, whole, in host memory: with an adapter beside its frozen weights if lora_rank is
    set.

    cfg: model, trust_remote_code, packing, lora_rank, lora_alpha, lora_targets. Raises UserError where the model cannot
    be trained in this way.
    """
    model = fit(adapters.load_merged(cfg.model, None, cfg.trust_remote_code), tokenizer, cfg.lora_rank is not None)
    checks.check_causal(model)
    checks.check_generates(model, "take another model")
    if cfg.packing:
        packing.check_model(model)
    if cfg.lora_rank is None:
        return model
    return lora.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, has_lora: bool) -> PreTrainedModel:
    """The model with embeddings for all tokens of the tokenizer, which generates up to the end of an answer.

    Raises UserError where an adapter is to be trained and tokens are new: it would leave their embeddings at random.
    """
    tokens, known = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    if tokens > known:
        if has_lora:
            raise UserError(
                f"chat_template adds {tokens - known} tokens, whose embeddings an adapter would leave at random; set "
                "--lora_rank null, or --chat_template plain"
            )
        model.resize_token_embeddings(tokens)
    generation: Any = model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    generation.eos_token_id = sorted({end_of_answer(tokenizer), *(end for end in ends if end is not None)})
    generation.pad_token_id = tokenizer.pad_token_id
    return model
