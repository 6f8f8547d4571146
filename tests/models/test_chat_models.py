"""Models that are to converse: chat templates, new tokens, adapters on adapters."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lib.errors import UserError
from lib.models import chat, hub, scratch

pytestmark = pytest.mark.usefixtures("one_rank")


@dataclasses.dataclass
class Settings:
    model: str
    chat_template: str | None = None
    trust_remote_code: bool = False
    packing: bool = True
    lora_rank: int | None = None
    lora_alpha: float = 8.0
    lora_targets: str = "all-linear"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> str:
    """A decoder as causal_lm trains it: no chat template, no token for padding, special tokens read as text."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = scratch.train_tokenizer(["What is this? It is that."] * 9, 280, scratch.END_OF_TEXT)
    sizes: dict[str, Any] = {"intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    config = scratch.new_config(
        "llama", AutoModelForCausalLM, 4, 32, vocab_size=len(tokenizer), pad_token_id=None, **sizes, **ends
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(settings: Settings, template: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    tokenizer = chat.load_tokenizer(dataclasses.replace(settings, chat_template=template), 64)
    return chat.build_model(settings, tokenizer), tokenizer


def test_a_model_without_a_chat_template_needs_one(base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template, as it is no chat model; set --chat_template chatml"):
        build(Settings(base), None)
    with pytest.raises(UserError, match="chat_template mine: it is neither chatml nor plain nor a file"):
        build(Settings(base), "mine")
    file = tmp_path / "template.jinja"
    file.write_text("{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}")
    _, tokenizer = build(Settings(base), str(file))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "a<|endoftext|>b<|endoftext|>"


def test_new_tokens_get_embeddings(base: str) -> None:
    known = hub.load_config(base, 0.0, False).vocab_size
    model, tokenizer = build(Settings(base), "chatml")
    assert len(tokenizer) == known + 2 == model.get_input_embeddings().num_embeddings == model.config.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == known + 2
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == [0, tokenizer.eos_token_id]
    with pytest.raises(UserError, match="adds 2 tokens, whose embeddings an adapter would leave at random"):
        build(Settings(base, lora_rank=4), "chatml")
    adapted, _ = build(Settings(base, lora_rank=4), "plain")
    assert adapted.get_input_embeddings().num_embeddings == known


def test_an_adapter_is_a_model(base: str, tmp_path: Path) -> None:
    """On which another one can be trained."""
    model, tokenizer = build(Settings(base, lora_rank=4), "plain")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path / "first"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    second, _ = build(Settings(str(folder), lora_rank=2), None)
    assert second.peft_config["default"].base_model_name_or_path == str(folder)
    torch.testing.assert_close(second.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    all_weights, _ = build(Settings(str(folder)), None)
    assert all(parameter.requires_grad for parameter in all_weights.parameters())
    whole, _ = build(Settings(base), "plain")
    assert not torch.allclose(second(ids).logits, whole.eval()(ids).logits, atol=1e-2)
