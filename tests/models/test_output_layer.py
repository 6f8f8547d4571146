"""The loss in pieces is the loss, with its gradients: of decoders, encoders and encoder-decoders."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    set_seed,
)

from lib.data.batches import IGNORED
from lib.models import output_layer

VOCABULARY, AT_ONCE = 300, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sep_token_id": 2, "cls_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 2.0},
    "mixtral": {"num_key_value_heads": 4, "num_local_experts": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "dropout": 0.0,
    },
}
DECODERS, ENCODERS = (
    ("llama", "granite", "gpt2", "gemma2", "mixtral"),
    ("bert", "roberta", "modernbert", "electra", "distilbert"),
)
ENCODER_DECODERS = ("t5", "bart", "composed")
CHANGED_BEHIND = {"granite", "gemma2", "bart"}  # whose logits are not those of the output layer


def model_of(architecture: str) -> Any:
    set_seed(0)
    if architecture == "composed":
        parts = [AutoConfig.for_model("bert", **SIZES) for _ in range(2)]
        config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        model = EncoderDecoderModel(config)
    else:
        kind: Any = AutoModelForCausalLM if architecture in DECODERS else AutoModelForMaskedLM
        kind = AutoModelForSeq2SeqLM if architecture in ENCODER_DECODERS else kind
        model = kind.from_config(AutoConfig.for_model(architecture, **SIZES, **MORE.get(architecture, {})))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients_of(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    torch.autograd.backward(loss)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS, *ENCODER_DECODERS])
def test_the_loss_in_pieces(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a weight of its own for each label, as dpo has. Where the model changes its logits behind the output layer,
    all are computed."""
    model, generator = model_of(architecture), torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=generator)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if architecture in ENCODER_DECODERS else {})
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.6, ids, IGNORED)
    weights = torch.rand(ids.shape, generator=generator)
    smoothing = 0.1 if architecture in ENCODER_DECODERS else 0.0
    plain = F.cross_entropy(
        model(**inputs).logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none",
        label_smoothing=smoothing,
    )  # fmt: skip
    expected = gradients_of(model, (plain * weights).sum())

    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", AT_ONCE * VOCABULARY)
    widest: list[int] = []
    layer = model.get_output_embeddings()
    forward = layer.forward

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        widest.append(hidden.shape[:-1].numel())
        return forward(hidden)

    layer.forward = watched
    with output_layer.losses_for(model, labels, smoothing) as losses_in:
        losses = losses_in(model(**inputs))
    found = gradients_of(model, (losses * weights).sum())
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert max(widest) == (ids.numel() if architecture in CHANGED_BEHIND else AT_ONCE)
    assert model(**inputs).logits.shape[-1] == VOCABULARY  # as before


@pytest.mark.parametrize("architecture", ["llama", "granite", "gemma2", "mixtral", "modernbert", "t5", "composed"])
def test_a_twin_without_numbers_says_what_a_pass_would(architecture: str) -> None:
    model, ids = model_of(architecture), torch.tensor([[1, 2]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if architecture in ENCODER_DECODERS else {})
    said = output_layer._passes_numbers_on(model, model.get_output_embeddings(), inputs)
    assert output_layer._ends_its_twin(model, inputs) == said == (architecture not in CHANGED_BEHIND)


@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_other_numbers_of_the_logits(architecture: str) -> None:
    model, ids = model_of(architecture), torch.arange(3, 23).view(2, 10)
    labels = torch.where(ids % 3 == 0, ids, IGNORED)

    def highest_and_its_place(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        highest = logits.max(-1)
        return torch.stack([highest.values, highest.indices.float()], -1)

    with output_layer.at_labels(model, labels, highest_and_its_place) as found_in:
        found = found_in(model(input_ids=ids))
    expected = highest_and_its_place(model(input_ids=ids).logits, labels) * (labels != IGNORED)[..., None]
    torch.testing.assert_close(found, expected)
