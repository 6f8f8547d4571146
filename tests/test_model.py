"""Models: dropout under each architecture's names, tokenizers and models that do not fit, training mode."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, DistilBertConfig, GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel, RobertaConfig

from lib.config import UserError
from lib.model import check_causal, load_model, load_tokenizer, make_adamw, model_folder, set_dropout, train_tokenizer
from lib.sequence_to_sequence import SPECIAL_TOKENS, build_model, load_tokenizers, pretrained_parameters

TINY_BERT = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)


pytestmark = pytest.mark.usefixtures("one_rank")


def test_dropout_is_set_under_each_architectures_own_names() -> None:
    assert set_dropout(DistilBertConfig(), 0.3).dropout == set_dropout(DistilBertConfig(), 0.3).attention_dropout == 0.3
    model = GPT2LMHeadModel(set_dropout(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2), 0.0))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_a_model_that_sees_the_future_is_refused() -> None:
    with pytest.raises(UserError, match="decoder"):
        check_causal(BertLMHeadModel(TINY_BERT))
    check_causal(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)))


SIZES = {"hidden_size": 20, "num_heads": 2, "intermediate_size": 16, "num_layers": 1, "max_source_length": 8, "max_target_length": 8}


def test_a_decoder_is_no_encoder_to_translate_with(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    cfg = SimpleNamespace(model=str(tmp_path), trust_remote_code=False, **SIZES)
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    with pytest.raises(UserError, match="is a decoder"):
        build_model(cfg, tokenizer)
    BertModel(TINY_BERT).save_pretrained(tmp_path)
    assert build_model(cfg, tokenizer).config.is_encoder_decoder


def test_what_is_exported_does_not_say_where_minilm_lay(tmp_path: Path) -> None:
    cfg = SimpleNamespace(model="minilm", trust_remote_code=False, pretrained_learning_rate=0.0, vocab_size=259, **SIZES)
    source_tokenizer, target_tokenizer = load_tokenizers(cfg, ["a few words"], ["a few words"])
    build_model(cfg, target_tokenizer).config.save_pretrained(tmp_path)
    source_tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert model_folder("minilm") not in file.read_text(), file.name


@pytest.mark.parametrize(
    ("given", "rate", "prefix"), [("nothing", 1e-4, "-"), ("an encoder", 1e-4, "encoder."), ("an encoder", 0.0, "encoder."), ("an encoder-decoder", 1e-4, "")]
)
def test_what_is_pre_trained_learns_at_its_own_rate_or_not_at_all(given: str, rate: float, prefix: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    cfg = SimpleNamespace(model=None, trust_remote_code=False, **SIZES)
    if given != "nothing":
        whole = BertModel(TINY_BERT) if given == "an encoder" else build_model(cfg, tokenizer)
        whole.save_pretrained(tmp_path)
        cfg.model = str(tmp_path)
    model = build_model(cfg, tokenizer)
    optimizer = make_adamw(model, {"zero_optimization": {"stage": 2}}, 1e-3, 0.1, pretrained_parameters(cfg, model), rate)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in group_of) == (rate > 0 or not name.startswith(prefix)), name
        if parameter.requires_grad:
            assert group_of[id(parameter)]["lr"] == (rate if name.startswith(prefix) else 1e-3), name
            assert group_of[id(parameter)]["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0), name
    assert optimizer.param_groups[0]["lr"] == (1e-4 if given == "an encoder-decoder" else 1e-3)  # which is what a run logs


def test_a_whole_encoder_decoder_brings_its_tokenizers_and_needs_a_rate(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    cfg = SimpleNamespace(model=None, trust_remote_code=False, pretrained_learning_rate=0.0, **SIZES)
    for part in (build_model(cfg, tokenizer), tokenizer):
        part.save_pretrained(tmp_path)
    cfg.model = str(tmp_path)
    with pytest.raises(UserError, match="nothing is trained; set it"):
        load_tokenizers(cfg, ["a"], ["b"])
    cfg.pretrained_learning_rate = 1e-4
    assert [len(found) for found in load_tokenizers(cfg, ["a"], ["b"])] == [259, 259]
    train_tokenizer(["many more words"] * 9, 264, SPECIAL_TOKENS).save_pretrained(tmp_path / "target_tokenizer")  # as in an export
    assert [len(found) for found in load_tokenizers(cfg, ["a"], ["b"])] == [259, 264]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    BertLMHeadModel(TINY_BERT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(tmp_path), 8, trust_remote_code=False)


@pytest.mark.parametrize(("config", "longest"), [(RobertaConfig(max_position_embeddings=18, pad_token_id=1), 16), (BertConfig(max_position_embeddings=16), 16)])
def test_a_text_longer_than_the_model_reads_is_refused(config: PretrainedConfig, longest: int, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"at most {longest} tokens"):
        load_tokenizer(str(tmp_path), longest + 1, trust_remote_code=False)
    with pytest.raises(UserError, match="tokenizer"):  # which is what this folder lacks
        load_tokenizer(str(tmp_path), longest, trust_remote_code=False)


def test_a_context_of_which_the_tokenizer_leaves_nothing_is_refused() -> None:
    question_answering: Any = importlib.import_module("recipes.question_answering")
    rows: dict[str, list[Any]] = {
        "question": ["Which?", "What?"],
        "context": ["A word.", "\u200b"],
        "answers": [{"text": [], "answer_start": []}] * 2,
        "row": [0, 1],
    }
    with pytest.raises(UserError, match=r"'What\?'.*nothing"):
        question_answering.tokenize(rows, load_tokenizer("minilm", 32, trust_remote_code=False), max_length=32, stride=8)


def test_a_loaded_model_is_in_training_mode() -> None:
    def build() -> PreTrainedModel:
        return BertLMHeadModel(TINY_BERT).eval()  # as from_pretrained leaves it

    assert load_model(build, {"zero_optimization": {"stage": 2}}, seed=0).training
