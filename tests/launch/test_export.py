"""Adapters: merged, on adapters, with new tokens; and GGUF files, which transformers reads back."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from small_models import (
    TEXT,
    call,
    logits,
    new_tokenizer,
    one_thread,  # noqa: F401  # for all of these tests
    refused,
    save_adapter_run,
    save_tiny,
    tiny,
)
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lib.launch import export, merge
from lib.models import adapters, gguf_file, hub


def test_a_merged_run_is_its_adapter_on_its_base(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    expected = save_adapter_run(tmp_path / "run", base)
    with refused("merged", "exists already", "--overwrite"):
        (tmp_path / "run" / "merged").mkdir()
        call(merge.main, tmp_path / "run")
    with refused("no model folder"):
        call(merge.main, tmp_path / "run", "--overwrite")
    (tmp_path / "run" / "merged").rmdir()
    assert "run/merged: " in call(merge.main, tmp_path / "run")
    merged = tmp_path / "run" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    torch.testing.assert_close(logits(model, tokenizer, TEXT), expected, atol=1e-4, rtol=1e-4)
    plain, _ = tiny()
    assert (logits(plain, tokenizer, TEXT) - expected).abs().max() > 0.1
    assert tokenizer.chat_template and not (merged / "adapter_config.json").exists()
    call(merge.main, tmp_path / "run", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "merged", "model"]
    with refused("whole model already"):
        call(merge.main, base)
    with refused("the adapter lies there"):
        call(merge.main, tmp_path / "run", "--output", tmp_path / "run", "--overwrite")


def test_an_adapter_brings_new_tokens_and_lies_on_an_adapter(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    expected = save_adapter_run(tmp_path / "run", base, new_tokens=("<tool>", "</tool>"))
    name = str(tmp_path / "run" / "model")
    model, tokenizer = adapters.load_merged(name), adapters.load_tokenizer(name)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == tiny()[0].config.vocab_size + 2
    torch.testing.assert_close(logits(model, tokenizer, TEXT + "<tool></tool>"), expected, atol=1e-4, rtol=1e-4)
    call(merge.main, tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, tokenizer, TEXT + "<tool></tool>"), expected, atol=1e-4, rtol=1e-4)
    on_base = adapters.load_merged(base, name)
    torch.testing.assert_close(logits(on_base, tokenizer, TEXT + "<tool></tool>"), expected, atol=1e-4, rtol=1e-4)

    save_adapter_run(tmp_path / "first", base)
    save_adapter_run(tmp_path / "second", str(tmp_path / "first" / "model"))  # the same values again
    twice = adapters.load_merged(str(tmp_path / "second" / "model"))
    plain, once = tiny()[0], adapters.load_merged(str(tmp_path / "first" / "model"))
    weight = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        twice.state_dict()[weight], 2 * once.state_dict()[weight] - plain.state_dict()[weight], atol=1e-5, rtol=1e-5
    )


def test_an_adapter_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_adapter_run(tmp_path / "run", base)
    folder = tmp_path / "run" / "model"
    assert hub.base_of(folder) == base and hub.base_of(base) is None
    tokenizer = adapters.load_tokenizer(str(folder))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with refused("holds no embeddings for the new ones"):
        adapters.load_merged(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, words in ((None, "must name the model"), (str(folder), "its own folder"), ("./gone", "model ./gone")):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with refused(words):
            adapters.load_merged(str(folder))


def read_back(file: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_a_run_exported_as_gguf_is_read_back_the_same(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<pad>"})
    tokenizer.add_tokens(["<think>"])  # not special
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", tiny()[1].chat_template
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=len(tokenizer)))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "run" / "model")
    file = tmp_path / "model.gguf"
    assert "model.gguf" in call(export.main, tmp_path / "run", "--gguf", file)
    again, tokenizer_again = read_back(file)
    for text in (TEXT, "<|im_start|>user\nHi<|im_end|>\n", "x<think>y", "a<|endoftext|>b", "\tdef f(x):  return 1"):
        assert tokenizer_again(text)["input_ids"] == tokenizer(text)["input_ids"]
        torch.testing.assert_close(logits(again, tokenizer, text), logits(model, tokenizer, text), atol=1e-5, rtol=1e-5)
    for what in ("chat_template", "eos_token", "pad_token", "bos_token"):
        assert getattr(tokenizer_again, what) == getattr(tokenizer, what)
    with refused("exists already"):
        call(export.main, tmp_path / "run", "--gguf", file)
    with refused("no folder"):
        call(export.main, tmp_path / "run", "--gguf", tmp_path / "none" / "x.gguf")
    with refused("--dtype", "q8_0"):
        call(export.main, tmp_path / "run", "--gguf", tmp_path / "x.gguf", "--dtype", "q4")
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["model.gguf"]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, rope_theta=5e5, tie_word_embeddings=False),
        LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
        Qwen2Config(**SIZES, tie_word_embeddings=False),
        Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True),  # transformers reads back no other head_dim
    ],
    ids=["llama", "llama-wide-heads", "qwen2", "qwen3"],
)
def test_architectures(config: Any, tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    config.vocab_size = len(tokenizer) + 5  # more embeddings than tokens
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data.normal_(std=0.2)
    gguf_file.write(model, tokenizer, tmp_path / "model.gguf", "f32", "a test")
    again, tokenizer_again = read_back(tmp_path / "model.gguf")
    assert tokenizer_again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    torch.testing.assert_close(logits(again, tokenizer, TEXT), logits(model, tokenizer, TEXT), atol=1e-5, rtol=1e-5)
    assert again.config.tie_word_embeddings == config.tie_word_embeddings


def test_smaller_numbers(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=len(tokenizer)))
    for dtype, tolerance in (("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)):
        file = tmp_path / f"{dtype}.gguf"
        gguf_file.write(model, tokenizer, file, dtype, "a test")
        kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
        assert kinds == {"F32", dtype.upper()}
        difference = (logits(read_back(file)[0], tokenizer, TEXT) - logits(model, tokenizer, TEXT)).norm()
        assert 0 < difference / logits(model, tokenizer, TEXT).norm() < tolerance


def test_the_pre_tokenizer_has_llama_cpps_name() -> None:
    def name(pre_tokenizer: Any, **bpe: Any) -> str:
        tokenizer = new_tokenizer().backend_tokenizer
        tokenizer.pre_tokenizer = pre_tokenizer
        as_json = json.loads(tokenizer.to_str())
        return gguf_file.pre_tokenizer_name(as_json | {"model": as_json["model"] | bpe})

    def split(pattern: str) -> Any:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert name(byte_level) == "gpt-2"
    assert name(pre_tokenizers.Sequence([digits, byte_level])) == "smollm"
    assert name(split(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), ignore_merges=True) == "llama-bpe"
    assert name(split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"])) == "qwen2"
    for unknown in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level]),
        pre_tokenizers.Metaspace(),
        split(r"\w+"),
        split(GGUF_PRE_TOKENIZER_SPLITS["tekken"]),
    ):
        with refused("pre-tokenizer", "convert_hf_to_gguf.py", "./launch.sh merge"):
            name(unknown)


def test_what_gguf_has_no_words_for_is_refused(tmp_path: Path) -> None:
    for config, words in (
        ({"model_type": "gpt2"}, "type gpt2"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}).to_dict(), "rope_type"),
        (LlamaConfig(attention_bias=True).to_dict(), "attention_bias True"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").touch()
        with refused(words, "convert_hf_to_gguf.py", "./launch.sh merge"):
            call(export.main, tmp_path, "--gguf", tmp_path / "x.gguf")
