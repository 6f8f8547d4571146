"""Packing changes nothing but the speed; adapters."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib.data.batches import IGNORED, Batch
from lib.data.conversations import lay_out
from lib.errors import UserError
from lib.models import lora, output_layer, packing
from lib.models.losses import token_losses

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    # Its layers do not tell the attention of their window.
    "phimoe": {"sliding_window": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen3": {},
    "gpt2": {},
    "granite": {"logits_scaling": 2.0},  # it divides its logits behind the output layer
}
LENGTHS = (7, 1, 12, 3)


@pytest.fixture(autouse=True)
def _one_rank(one_rank: None) -> None:
    """lay_out asks how many ranks share a row."""


def model_of(architecture: str, attention: str = "sdpa") -> Any:
    set_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES, **MORE.get(architecture, {}))
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, dropout, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def conversations() -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and labels of four conversations."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    labels = [[token if place % 3 != 1 else IGNORED for place, token in enumerate(row)] for row in ids]
    return ids, labels


def loss_and_gradients(model: Any, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    losses = []
    for batch in batches:
        places = {"position_ids": batch["position_ids"], **packing.lengths_of(model, batch)}
        with output_layer.losses_for(model, batch["labels"]) as losses_in:
            losses.append(losses_in(model(input_ids=batch["input_ids"], use_cache=False, **places)).sum())
    total = torch.stack(losses).sum()
    torch.autograd.backward(total)
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return float(total.detach()), torch.cat(gradients)


def plain_loss_and_gradients(model: Any, ids: list[list[int]], labels: list[list[int]]) -> tuple[float, torch.Tensor]:
    """One conversation at a time, from whole logits."""
    model.zero_grad()
    losses = [
        token_losses(model(input_ids=torch.tensor([row]), use_cache=False).logits.float(), torch.tensor([expected]))
        for row, expected in zip(ids, labels, strict=True)
    ]
    total = torch.cat(losses, 1).sum()
    torch.autograd.backward(total)
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return float(total.detach()), torch.cat(gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MORE)
@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_equals_its_conversations_one_by_one(architecture: str, attention: str, packed: bool) -> None:
    model, (ids, labels) = model_of(architecture, attention), conversations()
    expected, gradients = plain_loss_and_gradients(model, ids, labels)
    loss, found = loss_and_gradients(model, [lay_out(ids, labels, packed)])
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-5 * float(gradients.abs().max()))


def test_conversations_are_kept_apart_by_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa is called for each conversation; without the lengths the mask of transformers does the same."""
    model, (ids, labels) = model_of("llama"), conversations()
    batch = lay_out(ids, labels, True)
    assert packing.lengths_of(model, batch) == {"packed_lengths": LENGTHS}
    assert packing.lengths_of(model, lay_out(ids, labels, False)) == {}
    called: list[int] = []
    whole_rows = packing._whole_rows

    def watched(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        called.append(query.shape[2])
        return whole_rows(module, query, *rest, **options)

    monkeypatch.setattr(packing, "_whole_rows", watched)
    loss_and_gradients(model, [batch])
    assert called[-8:] == [*LENGTHS, *LENGTHS]  # in both layers


def test_a_model_that_mixes_conversations_is_refused() -> None:
    model = model_of("llama")
    packing.check_model(model)
    model.model.layers[0].self_attn.config._attn_implementation = "mixing"
    ALL_ATTENTION_FUNCTIONS["mixing"] = lambda module, query, key, value, mask, **options: (
        value.mean(2, keepdim=True).repeat(1, 2, query.shape[2], 1).transpose(1, 2), None
    )  # fmt: skip
    with pytest.raises(UserError, match="mixes the conversations of a row; set --packing false"):
        packing.check_model(model)


@pytest.mark.parametrize("by_layer", [False, True])
def test_positions_that_depend_on_the_length_of_the_row_are_refused(by_layer: bool) -> None:
    """A packed row is longer than its conversations."""
    model = model_of("llama")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model.config.rope_parameters = {"full_attention": rope} if by_layer else rope
    with pytest.raises(UserError, match=r"positions \(dynamic\) that depend on the length of the row; set --packing"):
        packing.check_model(model)


def test_labels_may_be_missing() -> None:
    """A rank's part of a row may have none, and must take part in the backward pass still."""
    model, (ids, labels) = model_of("llama"), conversations()
    loss, gradients = loss_and_gradients(model, [lay_out(ids, [[IGNORED] * len(row) for row in labels], True)])
    assert loss == 0 and not gradients.any() and len(gradients) == sum(p.numel() for p in model.parameters())


def test_an_adapter_learns_alone() -> None:
    model, (ids, labels) = model_of("llama"), conversations()
    before = model(input_ids=torch.tensor(ids[:1])).logits
    lora.add_lora(model, 4, 8.0, lora.ALL)
    torch.testing.assert_close(model(input_ids=torch.tensor(ids[:1])).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)  # A and B of 7 layers in 2 blocks
    _, gradients = loss_and_gradients(model, [lay_out(ids, labels, True)])
    assert len(gradients) == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_layers_of_an_adapter_are_named() -> None:
    model = lora.add_lora(model_of("llama"), 4, 8.0, "q_proj, v_proj")
    assert len([name for name, parameter in model.named_parameters() if parameter.requires_grad]) == 2 * 2 * 2
    with pytest.raises(UserError, match="has no layer 'qproj'; it has down_proj, gate_proj, k_proj"):
        lora.add_lora(model_of("llama"), 4, 8.0, "qproj")
