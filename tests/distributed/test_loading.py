"""A model whose files have 16 bits trains as if it had been read in fp32, at every stage and in every precision."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lib.models import smollm2

pytestmark = pytest.mark.slow


def test_losses_do_not_depend_on_how_the_files_are_read(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder("smollm2-tiny"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    model.bfloat16().save_pretrained(tmp_path / "model", max_shard_size="50KB")  # several files and an index
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "model")
    run_ranks(2, "loading_worker", tmp_path, "zero2", "zero3")
    found = json.loads((tmp_path / "losses.json").read_text())
    for case, losses in found.items():
        kind, _, precision, _ = case.split("/")
        assert losses[0] != losses[-1]
        assert losses == found[case.replace("/stored", "/widened")], case
        assert losses == pytest.approx(
            found[f"{kind}/zero2/{precision}/stored"], rel=1e-6 if precision == "fp32" else 2e-3
        )
