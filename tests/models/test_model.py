"""Models: dropout under each architecture's names, tokenizers and models that do not fit, training mode."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from contract_worker import small_encoder
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    DistilBertConfig,
    EncoderDecoderConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw
from lib.errors import UserError
from lib.models.checks import check_causal
from lib.models.encoder_decoder import SPECIAL_TOKENS, build_model, load_tokenizers, pretrained_parameters
from lib.models.hub import load_config, load_tokenizer, load_weights, model_folder, set_dropout
from lib.models.scratch import END_OF_TEXT, new_config, train_tokenizer
from lib.scores.search import save_index, save_sentence_transformer, search

TINY_BERT = BertConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.5,
)


pytestmark = pytest.mark.usefixtures("one_rank")


def test_dropout_is_set_under_each_architectures_own_names() -> None:
    assert set_dropout(DistilBertConfig(), 0.3).dropout == set_dropout(DistilBertConfig(), 0.3).attention_dropout == 0.3
    model = GPT2LMHeadModel(set_dropout(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2), 0.0))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    both = set_dropout(EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(), GPT2Config()), 0.0)
    assert both.encoder.hidden_dropout_prob == both.decoder.resid_pdrop == 0.0
    layers = set_dropout(M2M100Config(), 0.3)
    # With layerdrop, each rank would gather other parameters.
    assert layers.dropout == 0.3 and layers.encoder_layerdrop == layers.decoder_layerdrop == 0.0


def test_a_learned_tokenizer_joins_a_question_and_a_text() -> None:
    tokenizer = train_tokenizer(
        ["a few words"], 262, {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}, "<s> $A </s>"
    )
    pair = tokenizer("few", "words")
    assert tokenizer.decode(pair["input_ids"]) == "<s>few</s>words</s>"
    assert [part for part in pair.sequence_ids() if part is not None] == [0] * 3 + [1] * 5
    assert "token_type_ids" not in pair


def test_a_model_that_sees_the_future_is_refused() -> None:
    with pytest.raises(UserError, match="decoder"):
        check_causal(BertLMHeadModel(TINY_BERT))
    check_causal(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)))


SIZES = {
    "decoder": None,
    "hidden_size": 20,
    "num_heads": 2,
    "intermediate_size": 16,
    "num_layers": 1,
    "max_source_length": 8,
    "max_target_length": 8,
}


def test_a_decoder_is_no_encoder_to_translate_with(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    cfg = SimpleNamespace(model=str(tmp_path), trust_remote_code=False, **SIZES)
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    with pytest.raises(UserError, match="is a decoder"):
        build_model(cfg, tokenizer)
    BertModel(TINY_BERT).save_pretrained(tmp_path)
    assert build_model(cfg, tokenizer).config.is_encoder_decoder


def test_what_is_exported_does_not_say_where_minilm_lay(tmp_path: Path) -> None:
    cfg = SimpleNamespace(
        model="minilm", trust_remote_code=False, pretrained_learning_rate=0.0, vocab_size=259, **SIZES
    )
    source_tokenizer, target_tokenizer = load_tokenizers(cfg, ["a few words"], ["a few words"])
    build_model(cfg, target_tokenizer).config.save_pretrained(tmp_path)
    source_tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert model_folder("minilm") not in file.read_text(), file.name


def test_a_model_that_cannot_write_what_is_asked_for_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    BertModel(BertConfig(**TINY_BERT.to_diff_dict() | {"vocab_size": 262})).save_pretrained(tmp_path / "encoder")
    cfg = SimpleNamespace(
        model=str(tmp_path / "encoder"), trust_remote_code=False, pretrained_learning_rate=1e-4, **SIZES
    )
    build_model(cfg, tokenizer).save_pretrained(tmp_path / "both")
    tokenizer.save_pretrained(tmp_path / "both")
    tokenizer.save_pretrained(tmp_path / "both" / "target_tokenizer")
    cfg.model = str(tmp_path / "both")
    load_tokenizers(cfg, [], [])
    with pytest.raises(UserError, match=r"max_target_length is 10, .* at most 9 tokens"):
        load_tokenizers(SimpleNamespace(**vars(cfg) | {"max_target_length": 10}), [], [])
    with pytest.raises(UserError, match=r"max_source_length is 513, .* at most 512"):
        load_tokenizers(SimpleNamespace(**vars(cfg) | {"max_source_length": 513}), [], [])
    shutil.rmtree(tmp_path / "both" / "target_tokenizer")
    train_tokenizer(["many more words"] * 9, 262, SPECIAL_TOKENS).save_pretrained(tmp_path / "both")
    with pytest.raises(UserError, match="its decoder knows 259 tokens"):
        load_tokenizers(cfg, [], [])


@pytest.mark.parametrize(
    ("architecture", "auto_class", "hidden_size", "words"),
    [
        ("lama", AutoModelForCausalLM, 16, "none of transformers'; did you mean 'llama'"),
        ("t5", AutoModelForCausalLM, 16, "no AutoModelForCausalLM"),
        ("funnel", AutoModelForMaskedLM, 16, "cannot be made with these sizes"),
        ("modernbert", AutoModelForCausalLM, 16, "no AutoModelForCausalLM, .* 'modernbert-decoder'"),
        ("llama", AutoModelForMaskedLM, 16, "no AutoModelForMaskedLM"),
        ("llama", AutoModelForCausalLM, 9, "no multiple of num_heads 2"),
        ("llama", AutoModelForCausalLM, 10, "cannot be made with these sizes: RoPE requires an even"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(
    architecture: str, auto_class: Any, hidden_size: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        new_config(architecture, auto_class, 2, hidden_size, num_hidden_layers=1)
    assert new_config("gpt2", AutoModelForCausalLM, 2, 10).hidden_size == 10  # learned positions need no even number


def test_fewer_layers_than_the_model_has(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    AutoModel.from_config(
        ModernBertConfig(
            vocab_size=32, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    ).save_pretrained(whole)
    cfg = SimpleNamespace(model=str(whole), dropout=0.0, trust_remote_code=False, num_layers=2)
    importlib.import_module("recipes.text_classification").build_model(cfg, ["no", "yes"], 0).save_pretrained(cut)
    assert load_config(str(cut), 0.0, False).num_hidden_layers == 2
    config = json.loads((cut / "config.json").read_text()) | {"num_hidden_layers": 1}
    (cut / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be read"):  # and not a traceback
        load_config(str(cut), 0.0, False)


def test_samples_that_the_model_could_not_generate_are_refused() -> None:
    tokenizer = train_tokenizer(["a few words"], 257, END_OF_TEXT)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    check_model = importlib.import_module("recipes.causal_lm").check_model
    check_model(SimpleNamespace(prompt="words", samples=1, sample_tokens=12), model, tokenizer)
    check_model(SimpleNamespace(prompt="words", samples=0, sample_tokens=13), model, tokenizer)
    words = "the prompt has 5 tokens and sample_tokens is 13, but the model reads at most 16"
    with pytest.raises(UserError, match=words):
        check_model(SimpleNamespace(prompt="words", samples=1, sample_tokens=13), model, tokenizer)
    rotary = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    # Rotary positions have no limit.
    check_model(SimpleNamespace(prompt="words", samples=1, sample_tokens=99), rotary, tokenizer)
    # transformers cannot generate without a head, which a model with code of its own may lack.
    headless = GPT2Model(model.config)
    with pytest.raises(UserError, match="cannot generate with it; set --samples 0"):
        check_model(SimpleNamespace(prompt="words", samples=1, sample_tokens=12), headless, tokenizer)
    check_model(SimpleNamespace(prompt="words", samples=0, sample_tokens=12), headless, tokenizer)


def test_damaged_weights_and_what_does_not_fit_them_are_one_line(tmp_path: Path) -> None:
    BertModel(TINY_BERT).save_pretrained(tmp_path)
    wider = load_config(str(tmp_path), 0.0, False, intermediate_size=32)
    with pytest.raises(UserError, match=r"a local folder, but it cannot be read .*other sizes than its config"):
        load_weights(AutoModel, str(tmp_path), wider, False)
    # What a clone without git-lfs has in place of the weights.
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"a local folder, but it cannot be read .*Safetensor"):
        load_weights(AutoModel, str(tmp_path), load_config(str(tmp_path), 0.0, False), False)


def test_bigbird_attends_alike_on_every_rank(tmp_path: Path) -> None:
    BigBirdConfig(attention_type="block_sparse").save_pretrained(tmp_path)
    assert load_config(str(tmp_path), 0.0, False).attention_type == "original_full"


def test_activation_checkpointing_that_a_model_lacks_is_refused() -> None:
    model = AutoModel.from_config(
        MPNetConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(UserError, match="but MPNetModel has none"):
        load_model(lambda: model, {"zero_optimization": {"stage": 2}, "activation_checkpointing": {}}, 0)


def test_a_model_of_another_kind_is_called_one(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is of another kind than this recipe trains"):
        load_weights(AutoModelForMaskedLM, str(tmp_path), load_config(str(tmp_path), 0.0, False), False)


def test_a_pretrained_decoder_keeps_its_weights_and_writes_with_its_own_tokens(tmp_path: Path) -> None:
    cfg = SimpleNamespace(
        model=str(small_encoder(tmp_path / "bert")),
        trust_remote_code=False,
        pretrained_learning_rate=0.0,
        vocab_size=259,
        **SIZES,
    )
    cfg.decoder = cfg.model
    source_tokenizer, target_tokenizer = load_tokenizers(cfg, ["unread"], ["unread"])
    ids = source_tokenizer("a word", add_special_tokens=False)["input_ids"]
    start, end = source_tokenizer.cls_token_id, source_tokenizer.sep_token_id
    assert target_tokenizer("a word")["input_ids"] == [*ids, end]
    model = build_model(cfg, target_tokenizer)
    assert (model.config.decoder_start_token_id, model.config.eos_token_id) == (start, end)
    weights, encoder_weights = model.decoder.bert.state_dict(), model.encoder.state_dict()
    new = [name for name in weights if "crossattention" in name]
    assert new and all((weights[name] == encoder_weights[name]).all() for name in weights if name not in new)
    frozen = {id(parameter) for parameter in pretrained_parameters(cfg, model)}
    trained = [name for name, parameter in model.named_parameters() if id(parameter) not in frozen]
    assert {name.split(".")[0] for name in trained} == {"decoder"}

    # The export is a model that another training can start from.
    model.save_pretrained(tmp_path / "export")
    source_tokenizer.save_pretrained(tmp_path / "export")
    target_tokenizer.save_pretrained(tmp_path / "export" / "target_tokenizer")
    cfg.model, cfg.decoder, cfg.pretrained_learning_rate = str(tmp_path / "export"), None, 1e-4
    exported_tokenizers = load_tokenizers(cfg, ["unread"], ["unread"])
    for exported, tokenizer in zip(exported_tokenizers, (source_tokenizer, target_tokenizer), strict=True):
        assert exported("a word")["input_ids"] == tokenizer("a word")["input_ids"]
    for name, tensor in build_model(cfg, exported_tokenizers[1]).state_dict().items():
        assert (tensor == model.state_dict()[name]).all(), name


@pytest.mark.parametrize(
    ("model", "decoder", "words"),
    [
        (None, "bert", "decoder .*bert needs an encoder as the model, and null is none"),
        ("both", "bert", "needs an encoder as the model"),
        ("bert", "both", "encoder-decoder, cannot attend"),
        ("bert", "small", "knows 32 tokens, the tokenizer beside it 30,522"),
        ("bert", "llama", "llama, cannot attend to an encoder"),
        ("bert", "nowhere", "nowhere: neither a local folder nor"),
        ("bert", "big_bird", "EncoderDecoderModel: this transformers cannot generate with it"),
        ("bert", "big_code", "big_code: .*Cross-attention not implemented for MQA"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(tmp_path: Path, model: str | None, decoder: str, words: str) -> None:
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(tmp_path / "llama")
    BigBirdModel(BigBirdConfig(vocab_size=259, **sizes)).save_pretrained(tmp_path / "big_bird")
    GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=259, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "big_code"
    )
    small_encoder(tmp_path / "bert")
    cfg = SimpleNamespace(
        trust_remote_code=False,
        pretrained_learning_rate=1e-4,
        vocab_size=259,
        **SIZES | {"decoder": str(tmp_path / decoder)},
    )
    cfg.model = str(tmp_path / "bert")
    build_model(SimpleNamespace(**vars(cfg) | {"decoder": None}), tokenizer).save_pretrained(tmp_path / "both")
    for folder in ("llama", "big_bird", "big_code"):
        tokenizer.save_pretrained(tmp_path / folder)
    BertModel(TINY_BERT).save_pretrained(small_encoder(tmp_path / "small"))
    cfg.model = model and str(tmp_path / model)
    with pytest.raises(UserError, match=words):
        build_model(cfg, load_tokenizers(cfg, ["a"], ["b"])[1])


@pytest.mark.parametrize(
    ("given", "rate", "prefix"),
    [
        ("nothing", 1e-4, "-"),
        ("an encoder", 1e-4, "encoder."),
        ("an encoder", 0.0, "encoder."),
        ("an encoder-decoder", 1e-4, ""),
    ],
)
def test_what_is_pre_trained_learns_at_its_own_rate_or_not_at_all(
    given: str, rate: float, prefix: str, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    cfg = SimpleNamespace(model=None, trust_remote_code=False, **SIZES)
    if given != "nothing":
        whole = BertModel(TINY_BERT) if given == "an encoder" else build_model(cfg, tokenizer)
        whole.save_pretrained(tmp_path)
        cfg.model = str(tmp_path)
    model = build_model(cfg, tokenizer)
    settings = SimpleNamespace(
        learning_rate=1e-3, weight_decay=0.1, adam_betas=[0.9, 0.999], adam_eps=1e-8, pretrained_learning_rate=rate
    )
    optimizer = make_adamw(settings, model, {"zero_optimization": {"stage": 2}}, pretrained_parameters(cfg, model))
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in group_of) == (rate > 0 or not name.startswith(prefix)), name
        if parameter.requires_grad:
            assert group_of[id(parameter)]["lr"] == (rate if name.startswith(prefix) else 1e-3), name
            assert group_of[id(parameter)]["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0), name
    logged_rate = 1e-4 if given == "an encoder-decoder" else 1e-3  # a run logs the rate of the first group
    assert optimizer.param_groups[0]["lr"] == logged_rate


def test_from_scratch_a_token_starts_as_one_vector_on_both_sides() -> None:
    cfg = SimpleNamespace(model=None, trust_remote_code=False, **SIZES)
    model = build_model(cfg, train_tokenizer(["a few words"], 259, SPECIAL_TOKENS))
    source_embeddings, target_embeddings = (
        half.embed_tokens.weight for half in (model.get_encoder(), model.get_decoder())
    )
    assert source_embeddings is not target_embeddings and torch.equal(source_embeddings, target_embeddings)
    assert target_embeddings is model.get_output_embeddings().weight


def test_a_whole_encoder_decoder_brings_its_tokenizers_and_needs_a_rate(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a few words"], 259, SPECIAL_TOKENS)
    target_tokenizer = train_tokenizer(["many more words"] * 9, 264, SPECIAL_TOKENS)
    cfg = SimpleNamespace(model=None, trust_remote_code=False, pretrained_learning_rate=0.0, **SIZES)
    for part in (build_model(cfg, target_tokenizer), tokenizer):
        part.save_pretrained(tmp_path)
    cfg.model = str(tmp_path)
    with pytest.raises(UserError, match="nothing is trained; set it"):
        load_tokenizers(cfg, ["a"], ["b"])
    cfg.pretrained_learning_rate = 1e-4
    assert [len(found) for found in load_tokenizers(cfg, ["a"], ["b"])] == [259, 259]
    target_tokenizer.save_pretrained(tmp_path / "target_tokenizer")  # as in an export
    assert [len(found) for found in load_tokenizers(cfg, ["a"], ["b"])] == [259, 264]


def test_a_model_with_code_of_its_own_can_be_searched_with(tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    BertModel(BertConfig(**TINY_BERT.to_dict() | {"vocab_size": 259})).save_pretrained(source)
    (source / "own.py").write_text(
        "from transformers import BertConfig, BertModel\n\n\nclass OwnConfig(BertConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    config = json.loads((source / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    }
    (source / "config.json").write_text(json.dumps(config))
    load_weights(AutoModel, str(source), load_config(str(source), 0.0, True), True).save_pretrained(run / "model")
    train_tokenizer(["a few words"], 259, SPECIAL_TOKENS).save_pretrained(run / "model")
    save_sentence_transformer(run / "model", 16, trust_remote_code=True)
    save_index(run / "index", ["few", "words"], np.eye(2, 16, dtype=np.float32))
    assert {document for _, document in search(run, "a", 2, trust_remote_code=True)} == {"few", "words"}


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    BertLMHeadModel(TINY_BERT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(tmp_path), 8, trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "longest"),
    [(RobertaConfig(max_position_embeddings=18, pad_token_id=1), 16), (BertConfig(max_position_embeddings=16), 16)],
)
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
        question_answering.tokenize(
            rows, load_tokenizer("minilm", 32, trust_remote_code=False), max_length=32, stride=8
        )


def test_a_loaded_model_is_in_training_mode() -> None:
    def build() -> PreTrainedModel:
        return BertLMHeadModel(TINY_BERT).eval()  # as from_pretrained leaves it

    assert load_model(build, {"zero_optimization": {"stage": 2}}, seed=0).training


def test_a_model_that_stage_3_would_build_otherwise_is_refused() -> None:
    def build() -> PreTrainedModel:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
        if untied:  # though its config says tied
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    stage3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    untied = False
    load_model(build, stage3, seed=0)
    untied = True
    with pytest.raises(UserError, match=r"other parameters or buffers than loaded \(lm_head.weight\)"):
        load_model(build, stage3, seed=0)
