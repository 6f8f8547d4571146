"""Small models for the tests of chat, generate, merge and export: runs with adapters, and how a command is called."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lib.errors import UserError
from lib.models import smollm2

TEXT = "The capital of France is Paris, and that of Spain is Madrid: 12 and 34.\n\n  don't  say é 漢字 🙂 "


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are small; on cores that are busy, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny() -> tuple[Any, Any]:
    """The model and the tokenizer of smollm2-tiny, with larger random weights, so that it says more than one word."""
    folder = smollm2.folder("smollm2-tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.5)
    return model, AutoTokenizer.from_pretrained(folder)


def save_tiny(folder: Path, chats: bool = True) -> str:
    """Write what `tiny` gives as a model folder. chats: with its chat template."""
    model, tokenizer = tiny()
    tokenizer.chat_template = tokenizer.chat_template if chats else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter_run(run: Path, base: str, new_tokens: tuple[str, ...] = ()) -> torch.Tensor:
    """A run folder as a recipe leaves it, with an adapter in model/. Returns the logits of TEXT with that adapter."""
    model, tokenizer = tiny()
    torch.manual_seed(1)
    if new_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(new_tokens)})
        model.resize_token_embeddings(len(tokenizer))
    trained = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    for name, weight in trained.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.2)
    trained.peft_config["default"].base_model_name_or_path = base
    trained.save_pretrained(run / "model", save_embedding_layers=bool(new_tokens))
    tokenizer.save_pretrained(run / "model")
    (run / "config.yaml").write_text(f"model: {base}\n")
    return logits(trained, tokenizer, TEXT + "".join(new_tokens))


def logits(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).logits


def new_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE as causal_lm learns it, without a chat template."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT] * 3, vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def call(main: Callable[[list[str]], None], *arguments: Any) -> str:
    """What a command prints on stdout, called in this process. Its mistakes are raised."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main([str(argument) for argument in arguments])
    finally:
        logging.disable(logging.NOTSET)
    return out.getvalue()


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises a UserError of one line that has these words."""
    with pytest.raises(UserError) as error:
        yield
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
