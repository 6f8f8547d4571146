"""The contract: what every recipe in recipes/ must do, a user's copy included. Real ranks, the real library. That of
pipelines is in test_pipelines.py.

One recipe runs under every config and number of ranks, the others under half of them, as stages are lib's work and not
a recipe's; with --all every recipe runs under all. All cases of one number of ranks share one launch.
"""

import functools
import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import contract_cases
import peft
import pytest
import torch
import transformers
from conftest import ALL, CONFIGS, MEASURED, PIPELINES, RECIPES, ROOT, execute, read_losses
from contract_cases import BATCH, BF16, FP32, STEPS
from contract_worker import tensors_of
from safetensors.torch import load_file

from lib.models.hub import model_folder

pytestmark = pytest.mark.slow

# What a recipe can do otherwise, and plain PyTorch can do too: (the setting that it must have, what is set).
VARIANTS = {
    "scratch": ("pretrained_learning_rate", "model=null"),
    "trained": ("pretrained_learning_rate", "pretrained_learning_rate=1e-3"),  # an encoder that is frozen by default
    "warm": ("decoder", "decoder=minilm"),  # a decoder that starts from pre-trained weights
    "glove": ("negatives", "method=glove"),
    "whole_words": ("whole_words", "whole_words=true"),
    "experts": ("num_experts", "architecture=mixtral,num_experts=4,balance_loss=0.5"),
    "lora": ("lora_rank", "lora_rank=4"),
    "padded": ("packing", "packing=false"),
    "ipo": ("beta", "method=ipo"),
    "new_tokens": ("answer_tokens", "model=base,chat_template=chatml"),
}
WHOLE_MATRIX = ["recurrent_lm"]  # the cheapest
SHARED_AT_STAGE_3 = ["causal_lm", "sft"]
# Scores of a few rows that were learned by heart.
BY_HEART = {
    "accuracy": 1,
    "exact_match": 100,
    "bleu": 100,
    "rouge1": 100,
    "ndcg_at_10": 1,
}
SAVING = f"save_every={STEPS // 2},keep_checkpoints=9"


@pytest.fixture(params=[recipe for recipe in RECIPES if recipe not in PIPELINES])
def runs(request: pytest.FixtureRequest, launched: Path) -> tuple[str, Path]:
    """(recipe, folder): the folder holds a run for each case, named <config>_<precision>-<ranks>."""
    return request.param, launched / request.param


def cases_of(recipe: str, folder: Path) -> dict[str, list[str]]:
    """Launch, which begins with the number of ranks -> cases of tests/contract/contract_worker.py.

    DeepSpeed 0.19.8 keeps its tensor-parallel groups until the process ends, and so they have a launch of their own.
    """
    known = kinds_of_settings(recipe)

    case = functools.partial(contract_cases.case, folder, recipe)

    def resumed(source: str, config: str, settings: str) -> str:
        """The case that goes on under `config` from the checkpoint that the run `source` wrote after half of its
        steps.
        """
        return case(f"{source}_to_{config}", config, f"{settings},resume=true,{SAVING}", source=source)

    fp32 = {
        config: case(f"{config}_fp32", config, FP32) + (f",{SAVING}" if config in ("zero2", "zero3") else "")
        for config in configs_of(recipe)
    }
    shared = {
        form: [
            case(under(config, name), config, with_variant(name))
            for config in sharing_configs(recipe, form)
            for name in ["", *shared_variants(recipe, config)]
        ]
        for form in ("tp", "sp")
    }
    bf16 = [case(f"{config}_bf16", config, BF16) for config in configs_of_bf16(recipe)]
    plain = case("plain", "zero0", FP32, BATCH)
    # Whole texts, and all tokens scored: the scores are computed once more from the export (test_exports.py).
    whole: dict[str, Any] = {"max_source_length": 256 if "instruction" in known else 128, "max_target_length": 128}
    whole |= {"label_smoothing": 0, "scored_tokens": 9999}
    whole |= {"answer_tokens": 64, "precision": "fp32"}
    whole |= {"max_length": 192} if "stride" in known else {"max_length": 512} if "answer_tokens" in known else {}
    settings_of_learn = [f"{setting}={value}" for setting, value in whole.items() if setting in known]
    constant = ["lr_schedule=constant", f"max_steps={steps_to_learn(recipe)}"]
    learn = case("learn", "zero2", ",".join([*constant, *settings_of_learn]), 4)
    other = case("other", "zero2", f"{other_settings(recipe)},{SAVING}")
    variants = [case(name, "zero3", with_variant(name)) for name in variants_on_ranks(recipe)]
    if is_large(recipe):
        variants.append(case("large_zero3", "large_zero3", FP32))
    if "lora" in variants_of(recipe):
        config = "zero3" if ALL else "zero2"
        variants.append(case("checkpointed", config, with_variant("lora"), activation_checkpointing={}))
    plain_variants = [case(f"plain_{name}", "zero0", with_variant(name), BATCH) for name in variants_of(recipe)]
    settings_of = {"zero2_fp32-2": FP32, "zero3_fp32-2": FP32, "other-2": other_settings(recipe)}
    go_on: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for name in [*resumed_alike(recipe), *resumed_elsewhere(recipe)]:
        source, target = name.split("_to_")
        config, world_size = target.split("-")
        go_on[int(world_size)].append(resumed(source, config, settings_of[source]))
    cases = {2: [*fp32.values(), *bf16, learn, other, *variants], 1: [plain, *plain_variants], 4: []}
    for name in on_other_ranks(recipe):
        config, world_size = name.split("_fp32-")
        cases[int(world_size)].append(fp32[config])
    by_ranks = {str(world_size): [*cases[world_size], *go_on[world_size]] for world_size in cases}
    by_ranks["2"] += shared["sp"]
    return by_ranks | {"2, tensor parallel": shared["tp"]}


def steps_to_learn(recipe: str) -> int:
    """How many it takes to learn a few rows by heart."""
    return 150 if recipe in ("dpo", "masked_lm", "recurrent_lm") else 100


def with_variant(name: str) -> str:
    """The settings of a variant; "" for none."""
    return f"{FP32},{VARIANTS[name][1]}" if name else FP32


def under(config: str, name: str) -> str:
    """The name of the case in which ranks that share something train a variant."""
    return f"{name}_{config}_fp32" if name else f"{config}_fp32"


def variants_of(recipe: str) -> list[str]:
    known = kinds_of_settings(recipe)
    # What sft has too, and does in the same way.
    as_sft = ["lora", "padded"] if "lora_rank" in known and recipe != "sft" and not ALL else []
    return [name for name, (needs, _) in VARIANTS.items() if needs in known and name not in as_sft]


def variants_on_ranks(recipe: str) -> list[str]:
    """Those that are trained at stage 3 too; padding is a matter of one rank, and compared there."""
    return [name for name in variants_of(recipe) if name != "padded" or ALL]


def shared_variants(recipe: str, config: str) -> list[str]:
    """Those that are trained under this config of tensor or sequence parallelism too."""
    names = ("lora", "new_tokens") if ALL or config.startswith("tp") else ("lora",)
    return [name for name in names if name in variants_of(recipe)]


def is_large(recipe: str) -> bool:
    """Whether it has a config for models that barely fit, with activation checkpointing."""
    return (ROOT / "ds_configs" / recipe / "large_zero3.json").is_file()


def is_whole(recipe: str) -> bool:
    return recipe in WHOLE_MATRIX or ALL


def configs_of(recipe: str) -> list[str]:
    return CONFIGS if is_whole(recipe) else ["zero2", "zero3"]


def sharing_configs(recipe: str, form: str) -> list[str]:
    """Those under which 2 ranks share the matrices (tp) or the rows (sp): some recipes with stage 3, the slowest."""
    known = sorted(path.stem for path in (ROOT / "ds_configs" / recipe).glob(f"{form}2_*.json"))
    return known if ALL else known[-1:] if recipe in SHARED_AT_STAGE_3 else known[:1]


def configs_of_bf16(recipe: str) -> list[str]:
    return CONFIGS[:4] if is_whole(recipe) else ["zero2"]


def on_other_ranks(recipe: str) -> list[str]:
    """Runs on another number of ranks than 2."""
    return (
        [f"{config}_fp32-{world_size}" for config in ("zero0", "zero2", "zero3") for world_size in (1, 4)]
        if is_whole(recipe)
        else []
    )


def resumed_alike(recipe: str) -> list[str]:
    return ["other-2_to_zero2-2", *(["zero3_fp32-2_to_zero3-2"] if is_whole(recipe) else [])]


def resumed_elsewhere(recipe: str) -> list[str]:
    return ["zero3_fp32-2_to_zero0-1", *(["zero2_fp32-2_to_zero3-4"] if is_whole(recipe) else [])]


def other_settings(recipe: str) -> str:
    """What the recipe can do otherwise: dropout, the other method, whole words, an encoder that learns too, an adapter
    that learns alone."""
    others = [("dropout", "dropout=0.2"), *(VARIANTS[name] for name in ("glove", "whole_words", "trained", "lora"))]
    return ",".join([FP32, *(setting for needs, setting in others if needs in kinds_of_settings(recipe))])


def kinds_of_settings(recipe: str) -> dict[str, Any]:
    return importlib.import_module(f"recipes.{recipe}").Config.__annotations__


def difference(runs: tuple[str, Path], run: str, reference: str) -> float:
    """The largest relative difference of any loss of two runs, also shown at the end of the tests."""
    recipe, folder = runs
    losses, expected = read_losses(folder / run), read_losses(folder / reference)
    assert len(losses) == len(expected) == STEPS
    largest = max(abs(x - y) / abs(y) for x, y in zip(losses, expected, strict=True))
    MEASURED.append(f"{recipe:<24} {run:<24} {reference:<16} {largest:.1e}")
    return largest


def steps_of(run: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


def test_every_stage_trains_as_plain_torch_does(runs: tuple[str, Path]) -> None:
    for config in configs_of(runs[0]):
        assert difference(runs, f"{config}_fp32-2", "plain-1") < 1e-5
    if is_large(runs[0]):
        assert difference(runs, "large_zero3-2", "plain-1") < 1e-5


def test_every_variant_trains_as_plain_torch_does(runs: tuple[str, Path]) -> None:
    recipe, folder = runs
    for name in variants_on_ranks(recipe):
        assert difference(runs, f"{name}-2", f"plain_{name}-1") < 1e-5
        found, expected = (steps_of(folder / run) for run in (f"{name}-2", f"plain_{name}-1"))
        for here, there in zip(found, expected, strict=True):
            assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
            assert here.get("balance", 0.0) == pytest.approx(there.get("balance", 0.0), rel=1e-5)
            assert here.get("tokens_per_expert") == there.get("tokens_per_expert")
        if name in ("experts", "lora", "new_tokens"):
            assert_is_exported(recipe, folder / f"{name}-2")


def test_an_adapter_is_exported_alone(runs: tuple[str, Path]) -> None:
    recipe, folder = runs
    if "lora" not in variants_of(recipe):
        pytest.skip("it trains no adapter")
    run = folder / "lora-2"
    matrices = load_file(run / "model" / "adapter_model.safetensors")
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).name == "smollm2-tiny" and len(matrices) == 2 * 7 * 2
    for name, matrix in matrices.items():
        assert matrix.shape[0 if ".lora_A." in name else 1] == 4 and matrix.dim() == 2
        assert matrix.abs().max() > 1e-3, name  # B begins as zeros
    assert difference(runs, "checkpointed-2", "plain_lora-1") < 1e-5


def test_packing_changes_nothing(runs: tuple[str, Path]) -> None:
    recipe, _ = runs
    if "padded" not in variants_of(recipe):
        pytest.skip("it does not pack")
    assert difference(runs, "plain_padded-1", "plain-1") < 1e-5


def test_ranks_that_share_train_score_and_export_as_one_device_does(runs: tuple[str, Path]) -> None:
    recipe, folder = runs
    configs = [*sharing_configs(recipe, "tp"), *sharing_configs(recipe, "sp")]
    for config, name in itertools.chain.from_iterable(
        ((config, name) for name in ["", *shared_variants(recipe, config)]) for config in configs
    ):
        run, plain = folder / f"{under(config, name)}-2", folder / (f"plain_{name}-1" if name else "plain-1")
        assert difference(runs, run.name, plain.name) < 1e-5
        norms = [
            [entry["grad_norm"] for entry in map(json.loads, (path / "metrics.jsonl").open()) if "loss" in entry]
            for path in (run, plain)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        scores, expected = (json.loads((path / "scores.json").read_text())["scores"] for path in (run, plain))
        assert scores["model"] == pytest.approx(expected["model"], rel=1e-4)
        assert_is_exported(recipe, run)


def test_any_number_of_ranks_trains_alike(runs: tuple[str, Path]) -> None:
    for run in on_other_ranks(runs[0]):
        assert difference(runs, run, f"{run.split('-')[0]}-2") < 1e-5


def test_stages_agree_in_bf16(runs: tuple[str, Path]) -> None:
    recipe, folder = runs
    for config in configs_of_bf16(recipe):
        if config != "zero2":
            assert difference(runs, f"{config}_bf16-2", "zero2_bf16-2") < 2e-3
    in_bf16, in_fp32 = (read_losses(folder / f"zero2_{precision}-2") for precision in ("bf16", "fp32"))
    assert in_bf16 != in_fp32 and in_bf16[2] == pytest.approx(in_fp32[2], rel=0.02)


def test_interrupted_and_resumed_equals_uninterrupted(runs: tuple[str, Path]) -> None:
    """Bit for bit: every loss, and the weights in the end."""
    (recipe, folder), half = runs, STEPS // 2
    for run in resumed_alike(recipe):
        whole, cut = folder / run.split("_to_")[0], folder / run
        assert read_losses(cut) == read_losses(whole) and len(read_losses(whole)) == STEPS
        of_steps = [
            [line for line in (run / "metrics.jsonl").read_text().splitlines() if "step_seconds" in line]
            for run in (cut, whole)
        ]
        assert of_steps[0][:half] == of_steps[1][:half] and of_steps[0][half:] != of_steps[1][half:], (
            "it began anew, or did nothing"
        )
        assert not list((cut / "checkpoints").glob("damaged-*"))
        files = list((whole / "model").glob("*.safetensors"))
        assert files
        for file in files:
            assert file.read_bytes() == (cut / "model" / file.name).read_bytes()


def test_another_stage_and_number_of_ranks_resumes(runs: tuple[str, Path]) -> None:
    for run in resumed_elsewhere(runs[0]):
        assert difference(runs, run, run.split("_to_")[0]) < 1e-5


def test_gradient_norms_are_logged_and_agree(runs: tuple[str, Path]) -> None:
    recipe, folder = runs
    norms = []
    for name in ("plain-1", *(f"{config}_fp32-2" for config in configs_of(recipe)), *on_other_ranks(recipe)):
        entries = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        norms.append([entry["grad_norm"] for entry in entries if "loss" in entry])
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-3)


def test_scores_do_not_depend_on_ranks_or_stage(runs: tuple[str, Path]) -> None:
    """With rows that do not divide evenly, so that fillers are needed."""
    recipe, folder = runs
    expected = json.loads((folder / "plain-1" / "scores.json").read_text())["scores"]
    for name in (*(f"{config}_fp32-2" for config in configs_of(recipe)), *on_other_ranks(recipe)):
        scores = json.loads((folder / name / "scores.json").read_text())["scores"]
        for row, values in expected.items():
            assert scores[row] == pytest.approx(values, rel=1e-4), name


def test_it_learns_a_few_rows_by_heart(runs: tuple[str, Path]) -> None:
    """The test rows are those that it has learned, if it trains on a built-in sample; with data of its own, the loss
    must fall.
    """
    recipe, folder = runs
    losses = read_losses(folder / "learn-2")
    assert len(losses) == steps_to_learn(recipe)
    found = json.loads((folder / "learn-2" / "scores.json").read_text())
    few = found["settings"]["dataset"].endswith("-learn")
    assert sum(losses[-5:]) < (0.5 if few else 0.85) * sum(losses[:5])
    if not few:
        return
    scores = next(iter(found["scores"].values()))
    if "reward_accuracy" in scores:  # which is learned; the accuracy is also that of the model before training
        scores["accuracy"] = scores["reward_accuracy"]
    for name, best in BY_HEART.items():
        assert scores.get(name, best) >= 0.95 * best, scores
    assert scores.get("perplexity", 1) < 6 and scores.get("pseudo_perplexity", 1) < 2, scores


def test_the_export_is_the_trained_model(runs: tuple[str, Path]) -> None:
    recipe, folder = runs
    for config in configs_of(recipe):
        run = folder / f"{config}_fp32-2"
        model = assert_is_exported(recipe, run)
        assert {path.suffix for path in (run / "model").rglob("*") if path.is_file()} <= {
            ".json",
            ".safetensors",
            ".txt",
            ".jinja",
            ".md",
        }
        if (run / "model" / "tokenizer.json").exists():
            assert transformers.AutoTokenizer.from_pretrained(run / "model").vocab_size > 0
        if isinstance(model, transformers.PreTrainedModel) and model.get_output_embeddings() is not None:
            # An encoder may have other embeddings.
            reader = model.get_decoder() if model.config.is_encoder_decoder else model
            if reader.config.tie_word_embeddings:
                assert model.get_output_embeddings().weight is reader.get_input_embeddings().weight


@pytest.fixture(scope="session")
def documented(launched: Path) -> dict[str, str]:
    """Recipe -> what the example of its page printed, of a model that it exported. One new process runs them all."""
    script = "import contextlib, io, json, traceback\nprinted = {}\n"
    for folder in sorted(
        path for path in launched.iterdir() if (ROOT / "docs" / "recipes" / f"{path.name}.md").exists()
    ):
        page = (ROOT / "docs" / "recipes" / f"{folder.name}.md").read_text()
        example = page.partition("```python\n")[2].partition("```")[0].replace("runs/...", str(folder / "zero3_fp32-2"))
        script += f"with contextlib.redirect_stdout(io.StringIO()) as out:\n    try:\n        exec({example!r}, {{}})\n"
        script += "    except Exception:\n        print('failed:', traceback.format_exc())\n"
        script += f"printed[{folder.name!r}] = out.getvalue()\n"
    done = execute([sys.executable, "-c", f"{script}print(json.dumps(printed))"])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_example_of_its_page_works(runs: tuple[str, Path], documented: dict[str, str]) -> None:
    recipe, _ = runs
    if not (ROOT / "docs" / "recipes" / f"{recipe}.md").exists():
        pytest.skip("it has no page")
    assert documented[recipe] and "failed:" not in documented[recipe]


def assert_is_exported(recipe: str, run: Path) -> Any:
    """The exported model, which answers as the trained one did in the end."""
    model = load_export(recipe, run / "model")
    inputs, answered = torch.load(run / "probe.pt")
    with torch.no_grad():
        torch.testing.assert_close(tensors_of(model(**inputs)), answered, rtol=1e-5, atol=1e-5)
    return model


def load_export(recipe: str, folder: Path) -> Any:
    """The exported model: by peft, by transformers, or by the recipe's own class where it has one."""
    if (folder / "adapter_config.json").exists():
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = transformers.AutoModelForCausalLM.from_pretrained(model_folder(name))
        return peft.PeftModel.from_pretrained(base, folder).eval()
    config = json.loads((folder / "config.json").read_text())
    if "architectures" in config:
        return getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    module = importlib.import_module(f"recipes.{recipe}")
    classes = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, torch.nn.Module) and thing.__module__ == module.__name__
    ]
    model = classes[0](config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def test_the_run_folder_is_complete(runs: tuple[str, Path]) -> None:
    recipe, folder = runs
    run = folder / "zero2_fp32-2"
    there = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "ds_config.json",
        "versions.json",
        "metrics.jsonl",
        "log.txt",
        "model",
        "result.json",
    } <= there
    assert json.loads((run / "result.json").read_text())["finished"] is True
    entry = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "step_seconds"} <= set(entry)
    assert importlib.import_module(f"recipes.{recipe}").Config


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_is_short_and_complete(recipe: str) -> None:
    assert len((ROOT / "recipes" / f"{recipe}.py").read_text().splitlines()) <= 250
    assert (ROOT / "recipes" / f"{recipe}.yaml").is_file()
    configs = CONFIGS[:2] if recipe in PIPELINES else CONFIGS
    assert {f"{name}.json" for name in configs} <= {path.name for path in (ROOT / "ds_configs" / recipe).iterdir()}
