"""Mixtures of experts: the balance loss is that of the paper, for the routers of every architecture named."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from lib.errors import UserError
from lib.models import experts, scratch

ROWS, LENGTH, EXPERTS, CHOSEN, LAYERS, TOKENS = 3, 10, 4, 2, 2, 31


def build(architecture: str, num_experts: int | None = EXPERTS) -> Any:
    set_seed(0)
    config = scratch.new_config(
        architecture, AutoModelForCausalLM, 4, 32, vocab_size=TOKENS, intermediate_size=24, num_hidden_layers=LAYERS,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=None,
        **experts.sizes(architecture, num_experts, CHOSEN, 24),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # so that experts get different numbers of tokens, and no two the same affinity
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.train()


def rows_of(seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randint(2, TOKENS, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def gradient_of(router: Any) -> torch.Tensor:
    return router.weight.grad.clone()


def by_the_paper(affinity: torch.Tensor, chosen: torch.Tensor) -> float:
    """Equations 17 to 20 for one row: affinity [T, N] of each token to each expert, chosen [T, K]."""
    (length, count), per_token = affinity.shape, chosen.shape[1]
    balance = 0.0
    for expert in range(count):
        f = count / (per_token * length) * sum(expert in chosen[t].tolist() for t in range(length))
        p = sum(float(affinity[t, expert] / affinity[t].sum()) for t in range(length)) / length
        balance += f * p
    return balance


@pytest.mark.parametrize("architecture", experts.ARCHITECTURES)
def test_the_balance_loss_is_the_papers_in_every_architecture(architecture: str) -> None:
    model = build(architecture)
    routers = experts.Routers(model, 1.0)
    assert len(routers.modules) == LAYERS
    outputs: list[tuple[torch.Tensor, ...]] = []
    for router in routers.modules:
        router.register_forward_hook(lambda _, __, output: outputs.append(output))
    ids = rows_of(0)
    model(input_ids=ids)
    balance = routers.balance(ids).detach()
    expected = 0.0
    for logits, weights, chosen in outputs:
        affinity = (logits.sigmoid() if experts.ARCHITECTURES[architecture].is_sigmoid else logits.softmax(-1)).detach()
        # The router weighs the chosen experts by the same affinities.
        of_chosen = affinity.gather(1, chosen)
        torch.testing.assert_close(
            of_chosen / of_chosen.sum(1, keepdim=True), (weights / weights.sum(1, keepdim=True)).detach()
        )
        for row in range(ROWS):
            part = slice(row * LENGTH, (row + 1) * LENGTH)
            expected += by_the_paper(affinity[part], chosen[part]) / LAYERS
    assert float(balance) == pytest.approx(expected, rel=1e-5) and expected > 1.01 * ROWS
    figures = routers.figures(ROWS)
    assert float(figures["balance"]) == pytest.approx(expected / ROWS, rel=1e-5)
    assert figures["tokens_per_expert"].sum(1).tolist() == [ROWS * LENGTH * CHOSEN] * LAYERS
    counted = [torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist() for _, _, chosen in outputs]
    assert figures["tokens_per_expert"].tolist() == counted and len({*counted[0]}) > 1


def test_a_step_has_the_same_balance_and_gradient_however_it_is_cut() -> None:
    ids = rows_of(1, rows=4)
    found = []
    for parts in ([ids], [ids[:1], ids[1:]], [ids[:2], ids[2:]]):
        model = build("mixtral")
        routers = experts.Routers(model, 1.0)
        for part in parts:
            model(input_ids=part)
            torch.autograd.backward(routers.balance(part))
        gradients = [gradient_of(router) for router in routers.modules]
        found.append((routers.figures(4)["balance"], gradients))
    for balance, gradients in found[1:]:
        torch.testing.assert_close(balance, found[0][0])
        torch.testing.assert_close(gradients, found[0][1])
    assert float(found[0][1][0].norm()) > 0


def test_recomputation_and_evaluation_do_not_count() -> None:
    model, ids = build("qwen3_moe"), rows_of(2)
    routers = experts.Routers(model, 1.0)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=ids).logits.square().mean()
        torch.autograd.backward(loss + routers.balance(ids))
        gradients.append(gradient_of(routers.modules[0]))
        model.zero_grad()
        model.eval()(input_ids=ids)
        model.train()
        assert not routers._found  # nor is a layer's graph kept
        assert int(routers.figures(ROWS)["tokens_per_expert"].sum()) == ROWS * LENGTH * CHOSEN * LAYERS
    torch.testing.assert_close(*gradients)


def test_a_dense_model_has_no_figures() -> None:
    model = build("llama", None)
    routers = experts.Routers(model, 0.01)
    model(input_ids=rows_of(0))
    assert float(routers.balance(rows_of(0))) == 0 and routers.figures(ROWS) == {}


def test_transformers_adds_no_loss_of_its_own() -> None:
    assert build("mixtral")(input_ids=rows_of(0)).get("aux_loss") is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (("llama", 4, 2, 8), "num_experts is 4, but architecture 'llama' is no mixture .* one of mixtral, qwen3_moe"),
        (("mixtral", None, 2, 8), "'mixtral' is a mixture of experts; set --num_experts"),
        (("mixtral", 4, 5, 8), "experts_per_token is 5, but num_experts is 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        experts.sizes(*sizes)


def test_routers_that_are_not_known_are_refused_where_they_were_to_be_balanced() -> None:
    model = build("mixtral")
    model.config.model_type = "unknown"
    with pytest.raises(UserError, match=r"routers of architecture 'unknown' are not known .* set --balance_loss 0"):
        experts.Routers(model, 0.1)
    assert experts.Routers(model, 0.0).modules == []
