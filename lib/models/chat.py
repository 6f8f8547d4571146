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


def load_tokenizer(cfg: Any, max_length: int, setting: str = "max_length") -> PreTrainedTokenizerBase:
    """The tokenizer of `cfg.model`, with a chat template. Every rank must call it.

    cfg: model, trust_remote_code, lora_rank, and chat_template: None for the tokenizer's own, one of TEMPLATES, or a
    file with one in Jinja. max_length, setting: see hub.load_tokenizer. Raises UserError where there is no template,
    where it would not let a model learn to end an answer, and where it needs new tokens beside an adapter, which would
    leave their embeddings at random.
    """
    model, chat_template = cfg.model, cfg.chat_template
    tokenizer = hub.load_tokenizer(model, max_length, cfg.trust_remote_code, setting)
    if chat_template is not None:
        if chat_template not in TEMPLATES and not Path(chat_template).is_file():
            raise UserError(
                f"chat_template {chat_template}: it is neither {' nor '.join(TEMPLATES)} nor a file with a template"
            )
        if chat_template == "chatml":
            new_tokens = tokenizer.add_special_tokens({"additional_special_tokens": CHATML_TOKENS})
            if new_tokens and cfg.lora_rank is not None:
                raise UserError(
                    f"chat_template chatml adds {new_tokens} tokens, whose embeddings an adapter would leave at "
                    "random; set --lora_rank null, or --chat_template plain"
                )
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
    model = fit(adapters.load_merged(cfg.model, None, cfg.trust_remote_code), tokenizer)
    checks.check_causal(model)
    checks.check_generates(model, "take another model")
    if cfg.packing:
        packing.check_model(model)
    if cfg.lora_rank is None:
        return model
    return lora.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with embeddings for all tokens of the tokenizer, which generates up to the end of an answer."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > model.get_input_embeddings().num_embeddings:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.float()  # as load_model may have read it in 16 bits: new rows are means of the old ones
        model.resize_token_embeddings(tokens)
    generation: Any = model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    generation.eos_token_id = sorted({end_of_answer(tokenizer), *(end for end in ends if end is not None)})
    generation.pad_token_id = tokenizer.pad_token_id
    return model
