"""What a run reports, computed once more from what it exported, by the libraries that its users load it with, one row at a time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import launch, run_ranks
from contract_worker import small_encoder
from gensim.models import KeyedVectors
from gensim.test.utils import datapath
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)  # fmt: skip

from lib.evaluation import question_answering_scores
from lib.samples import load_sample

pytestmark = pytest.mark.slow

LENGTHS = ("--max_source_length", "32", "--max_target_length", "24", "--beams", "2", "--length_penalty", "1.5")  # and what the tests below generate with


def train(recipe: str, folder: Path, *settings: str) -> tuple[Path, dict[str, float]]:
    """(exported folder, test scores) of a short run at stage 3 on 2 ranks."""
    run = folder / "run"
    run_ranks(2, "recipe_worker", recipe, "--deepspeed_config", f"ds_configs/{recipe}/zero3.json", "--quick", "--run_dir", run, *settings)
    return run / "model", next(iter(json.loads((run / "result.json").read_text())["scores"].values()))


def rows_of_test(sample: str, count: int) -> Any:
    """The test rows that a run with so many max_rows has."""
    return load_sample(sample)["test"].shuffle(seed=0).select(range(count))


def test_classification_scores_are_those_of_the_exported_model(tmp_path: Path) -> None:
    rows = load_sample("docstrings")
    for split, size in {"train": 200, "validation": 20, "test": 77}.items():  # 77: odd, and no multiple of anything here
        rows[split].shuffle(seed=1).select(range(size)).to_json(tmp_path / f"{split}.jsonl")
    model_folder, scores = train("text_classification", tmp_path, "--dataset", str(tmp_path), "--max_rows", "null", "--max_steps", "40")
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    predictions = []
    for row in test:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")).logits
        predictions.append(model.config.id2label[int(logits.argmax())])
    labels = [row["label"] for row in test]
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro", zero_division=0, labels=sorted(set(labels) | set(predictions))))
    assert pipeline("text-classification", str(model_folder))("Sort a tensor.")[0]["label"] in set(model.config.label2id)


def test_perplexity_is_that_of_the_exported_model(tmp_path: Path) -> None:
    model_folder, scores = train("causal_lm", tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    texts = rows_of_test("sotu", 3)["text"]
    tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "".join(texts)  # nothing is lost in the BPE
    length, loss_sum = 64, 0.0
    for start in range(0, len(tokens) - 1, length):
        block = torch.tensor([tokens[start : start + length + 1]])
        with torch.no_grad():
            loss_sum += float(model(input_ids=block, labels=block).loss) * (block.shape[1] - 1)  # transformers shifts the labels itself
    assert scores["perplexity"] == pytest.approx(math.exp(loss_sum / (len(tokens) - 1)), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / len("".join(texts).encode()), rel=1e-4)


def test_masked_scores_are_those_of_the_exported_model(tmp_path: Path) -> None:
    texts = {split: [text[:400] for text in load_sample("sotu")[split]["text"][:7]] for split in ("train", "validation", "test")}
    for split, part in texts.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    model_folder, scores = train("masked_lm", tmp_path, "--dataset", str(tmp_path), "--max_rows", "null", "--scored_tokens", "9999")  # all there are
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    tokens = [token for text in texts["test"] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, right, inside = [], [], 64 - 2
    for start in range(0, len(tokens), inside):
        block = torch.tensor([[tokenizer.cls_token_id, *tokens[start : start + inside], tokenizer.sep_token_id]])
        hidden = block.repeat(block.shape[1] - 2, 1)  # each token but the first and last, one at a time
        places = torch.arange(1, block.shape[1] - 1)
        hidden[places - 1, places] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=hidden).logits[places - 1, places]
        nats.append(F.cross_entropy(logits, block[0, 1:-1], reduction="none"))
        right.append(logits.argmax(-1) == block[0, 1:-1])
    assert scores["pseudo_perplexity"] == pytest.approx(float(torch.cat(nats).mean().exp()), rel=1e-4)
    assert scores["masked_accuracy"] == pytest.approx(float(torch.cat(right).float().mean()), abs=2 / len(tokens))
    assert len(pipeline("fill-mask", str(model_folder))("The state of the<mask>.")) == 5


@pytest.mark.parametrize("encoder", ["from scratch", "pre-trained"])
def test_translations_are_those_of_the_exported_model(tmp_path: Path, encoder: str) -> None:
    model = "null" if encoder == "from scratch" else str(small_encoder(tmp_path / "encoder"))
    model_folder, scores = train("translation", tmp_path, "--model", model, "--max_steps", "200", "--max_rows", "21", "--label_smoothing", "0", *LENGTHS)
    translator, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    target_tokenizer = AutoTokenizer.from_pretrained(model_folder / "target_tokenizer")
    rows = rows_of_test("messages_fr", 21)
    texts = []
    for source in rows["source"]:
        tokens = translator.generate(**tokenizer(source, truncation=True, max_length=32, return_tensors="pt"), num_beams=2, length_penalty=1.5)
        texts.append(target_tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert len(set(texts)) > 3
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [rows["target"]]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [rows["target"]]).score)


@pytest.mark.parametrize("decoder", ["new", "pre-trained"])
def test_summaries_are_those_of_the_exported_model(tmp_path: Path, decoder: str) -> None:
    warm = [] if decoder == "new" else ["--decoder", str(small_encoder(tmp_path / "bert"))]
    model_folder, scores = train("summarization", tmp_path, *warm, "--max_steps", "100", "--max_rows", "21", "--no_repeat_ngram", "3", *LENGTHS)
    writer, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    target_tokenizer = AutoTokenizer.from_pretrained(model_folder / "target_tokenizer")
    rows, scorer, found = rows_of_test("docstring_pairs", 21), RougeScorer(["rouge1", "rougeL"], use_stemmer=True), []
    texts: list[str] = []
    for body, summary in zip(rows["body"], rows["summary"], strict=True):
        text = tokenizer(body, truncation=True, max_length=32, return_tensors="pt")
        tokens = writer.generate(**text, num_beams=2, length_penalty=1.5, no_repeat_ngram_size=3)
        texts.append(target_tokenizer.decode(tokens[0], skip_special_tokens=True))
        found.append(scorer.score(summary, texts[-1]))
    assert len(set(texts)) > 3
    for name in ("rouge1", "rougeL"):
        assert scores[name] == pytest.approx(100 * sum(score[name].fmeasure for score in found) / len(found))


def test_answers_are_those_of_the_exported_model(tmp_path: Path) -> None:
    sample = load_sample("docstring_questions").filter(lambda row: len(row["context"].split()) < 100)
    for split in ("train", "validation", "test"):  # the same rows, so that some answers are given
        sample["test"].select(range(31)).to_json(tmp_path / f"{split}.jsonl")
    settings = ["--dataset", tmp_path, "--max_rows", "null", "--max_length", "512", "--stride", "128", "--model", small_encoder(tmp_path / "encoder")]
    model_folder, scores = train("question_answering", tmp_path, *map(str, settings), "--max_steps", "60", "--learning_rate", "5e-3")
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    rows, answers = sample["test"].select(range(31)), []
    for question, context in zip(rows["question"], rows["context"], strict=True):
        encoded = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
        assert encoded["input_ids"].shape[1] <= 512  # one window
        characters = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            output = model(**encoded)
        starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        context_tokens = [place for place, part in enumerate(encoded.sequence_ids()) if part == 1]
        spans = {(start, end): starts[start] + ends[end] for start in context_tokens for end in context_tokens if start <= end < start + 48}
        (start, end), best = max(spans.items(), key=lambda span: span[1])
        answers.append(context[characters[start][0] : characters[end][1]] if best > starts[0] + ends[0] else "")
    assert any(answers) and not all(answers)
    assert scores == pytest.approx(question_answering_scores(answers, [found["text"] for found in rows["answers"]]))


def test_a_sentence_transformer_finds_what_the_run_found(tmp_path: Path) -> None:
    model_folder, scores = train("semantic_search", tmp_path)
    rows, model = rows_of_test("docstring_pairs", 101), SentenceTransformer(str(model_folder), device="cpu")
    queries, documents = model.encode(rows["summary"]), model.encode(rows["body"])
    run = {str(q): {str(d): float(cosine) for d, cosine in enumerate(row)} for q, row in enumerate(queries @ documents.T)}
    relevant = {str(q): {str(q): 1} for q in range(len(rows))}
    judged = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10", "recall.1,10,100"}).evaluate(run)
    for name, of_trec in (("ndcg_at_10", "ndcg_cut_10"), ("recall_at_1", "recall_1"), ("recall_at_10", "recall_10"), ("recall_at_100", "recall_100")):
        assert scores[name] == pytest.approx(sum(query[of_trec] for query in judged.values()) / len(rows), abs=1e-6)
    index = model_folder.parent / "index"
    in_index = load_file(index / "vectors.safetensors")["vectors"]
    torch.testing.assert_close(torch.tensor(model.encode(json.loads((index / "documents.json").read_text()))), in_index, rtol=0, atol=1e-5)
    found = launch("search", model_folder.parent, rows["summary"][7], "--top", "3").stdout.splitlines()
    assert len(found) == 3
    assert "--top is 0" in launch("search", model_folder.parent, "words", "--top", "0").stderr
    best = rows["body"][int((queries[7] @ documents.T).argmax())]
    assert " ".join(best.split())[:200] in found[0]


def test_gensim_loads_the_word_vectors(tmp_path: Path) -> None:
    model_folder, scores = train("word_embeddings", tmp_path)
    vectors = KeyedVectors.load_word2vec_format(str(model_folder / "vectors.txt"))
    _, spearman, unknown = vectors.evaluate_word_pairs(datapath("wordsim353.tsv"))
    assert scores["wordsim353"] == pytest.approx(spearman.statistic, abs=1e-6)
    assert scores["wordsim353_pairs"] == pytest.approx(353 * (1 - unknown / 100))
