"""What a run reports, computed once more from what it exported, by the libraries that its users load it with, one row
at a time.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import PIPELINES, RECIPES, launch
from contract_cases import STEPS
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

from lib.errors import UserError, run_command
from lib.run import checkpoint_model
from lib.run.checkpoint_files import folder_of
from lib.scores.evaluation import question_answering_scores
from lib.scores.search import main as search_command
from lib.scores.search import search

pytestmark = pytest.mark.slow

Learned = tuple[Path, dict[str, float], list[dict[str, Any]]]


@pytest.fixture
def learned(request: pytest.FixtureRequest, launched: Path) -> Learned:
    """(exported folder, test scores, test rows) of the recipe's run that has learned a few rows by heart."""
    run = launched / request.param / "learn-2"
    found = json.loads((run / "scores.json").read_text())
    test = Path(found["settings"]["dataset"]) / "test.jsonl"
    rows = [json.loads(line) for line in test.read_text().splitlines()] if test.is_file() else []
    return run / "model", next(iter(found["scores"].values())), rows


def of(recipe: str) -> pytest.MarkDecorator:
    """The test gets `learned` of this recipe."""
    return pytest.mark.parametrize("learned", [recipe], indirect=True)


@of("text_classification")
def test_classification_scores_are_those_of_the_exported_model(learned: Learned) -> None:
    model_folder, scores, test = learned
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    predictions = []
    for row in test:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")).logits
        predictions.append(model.config.id2label[int(logits.argmax())])
    labels = [row["label"] for row in test]
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert scores["macro_f1"] == pytest.approx(
        f1_score(labels, predictions, average="macro", zero_division=0, labels=sorted(set(labels) | set(predictions)))
    )
    assert pipeline("text-classification", str(model_folder))("Sort a tensor.")[0]["label"] in set(
        model.config.label2id
    )


@of("causal_lm")
def test_perplexity_is_that_of_the_exported_model(learned: Learned) -> None:
    model_folder, scores, test = learned
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    texts = [row["text"] for row in test]
    tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "".join(texts)  # nothing is lost in the BPE
    length, loss_sum = 64, 0.0
    for start in range(0, len(tokens) - 1, length):
        block = torch.tensor([tokens[start : start + length + 1]])
        with torch.no_grad():
            # transformers shifts the labels itself.
            loss_sum += float(model(input_ids=block, labels=block).loss) * (block.shape[1] - 1)
    assert scores["perplexity"] == pytest.approx(math.exp(loss_sum / (len(tokens) - 1)), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / len("".join(texts).encode()), rel=1e-4)


@of("masked_lm")
def test_masked_scores_are_those_of_the_exported_model(learned: Learned) -> None:
    model_folder, scores, test = learned
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    tokens = [token for row in test for token in tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
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


@of("translation")
def test_translations_are_those_of_the_exported_model(learned: Learned) -> None:
    model_folder, scores, test = learned
    texts = generated(model_folder, [row["source"] for row in test])
    assert len(set(texts)) > 3
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [[row["target"] for row in test]]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [[row["target"] for row in test]]).score)


@of("summarization")
def test_summaries_are_those_of_the_exported_model(learned: Learned) -> None:
    model_folder, scores, test = learned
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    texts = []
    for row in test:
        request = [{"role": "user", "content": f"Summarize in one line.\n\n{row['body']}"}]
        inputs = tokenizer.apply_chat_template(
            request, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    found = [scorer.score(row["summary"], text) for row, text in zip(test, texts, strict=True)]
    assert len(set(texts)) > 3
    for name in ("rouge1", "rougeL"):
        assert scores[name] == pytest.approx(100 * sum(score[name].fmeasure for score in found) / len(found))


def generated(folder: Path, sources: list[str]) -> list[str]:
    """What an exported encoder-decoder makes of texts, one at a time, by the search of --quick."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    target_tokenizer = AutoTokenizer.from_pretrained(folder / "target_tokenizer")
    tokens = [
        model.generate(**tokenizer(source, truncation=True, max_length=128, return_tensors="pt"), num_beams=2)[0]
        for source in sources
    ]
    return [target_tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]


@of("sft")
def test_answers_to_conversations_are_those_of_the_exported_model(learned: Learned) -> None:
    model_folder, scores, test = learned
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    answers, nats, count = [], 0.0, 0
    for *before, last in (row["messages"] for row in test):
        messages: Any = {"conversation": before, "return_tensors": "pt", "return_dict": True}
        prompt = tokenizer.apply_chat_template(**messages, add_generation_prompt=True)["input_ids"]
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64)
        answers.append(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip())
        assert len(before) in (1, 3)
        whole = tokenizer.apply_chat_template([*before, last], return_tensors="pt", return_dict=True)["input_ids"]
        begins = [prompt.shape[1]]
        if len(before) == 3:  # its first answer counts too
            messages["conversation"] = before[:1]
            begins.append(tokenizer.apply_chat_template(**messages, add_generation_prompt=True)["input_ids"].shape[1])
        with torch.no_grad():
            log_probabilities = model(whole).logits[0, :-1].log_softmax(-1)
        for begin in begins:
            end = begin + whole[0, begin:].tolist().index(tokenizer.eos_token_id) + 1
            nats -= float(log_probabilities[begin - 1 : end - 1].gather(1, whole[0, begin:end, None]).sum())
            count += end - begin
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [(row["messages"][-1]["content"], answer) for row, answer in zip(test, answers, strict=True)]
    assert scores["rougeL"] == pytest.approx(
        100 * sum(scorer.score(expected, answer)["rougeL"].fmeasure for expected, answer in pairs) / len(pairs)
    )
    assert scores["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


@of("question_answering")
def test_answers_are_those_of_the_exported_model(learned: Learned) -> None:
    model_folder, scores, test = learned
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    answers = []
    for row in test:
        encoded = tokenizer(row["question"], row["context"], return_offsets_mapping=True, return_tensors="pt")
        assert encoded["input_ids"].shape[1] <= 192  # one window
        characters = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            output = model(**encoded)
        starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        context_tokens = [place for place, part in enumerate(encoded.sequence_ids()) if part == 1]
        spans = {
            (start, end): starts[start] + ends[end]
            for start in context_tokens
            for end in context_tokens
            if start <= end < start + 48
        }
        (start, end), best = max(spans.items(), key=lambda span: span[1])
        answers.append(row["context"][characters[start][0] : characters[end][1]] if best > starts[0] + ends[0] else "")
    assert any(answers) and not all(answers)
    assert scores == pytest.approx(question_answering_scores(answers, [row["answers"]["text"] for row in test]))


@of("semantic_search")
def test_a_sentence_transformer_finds_what_the_run_found(learned: Learned) -> None:
    model_folder, scores, test = learned
    model = SentenceTransformer(str(model_folder), device="cpu")
    queries, documents = model.encode([row["summary"] for row in test]), model.encode([row["body"] for row in test])
    run = {
        str(q): {str(d): float(cosine) for d, cosine in enumerate(row)} for q, row in enumerate(queries @ documents.T)
    }
    relevant = {str(q): {str(q): 1} for q in range(len(test))}
    judged = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10", "recall.1,10,100"}).evaluate(run)
    for name, of_trec in (
        ("ndcg_at_10", "ndcg_cut_10"),
        ("recall_at_1", "recall_1"),
        ("recall_at_10", "recall_10"),
        ("recall_at_100", "recall_100"),
    ):
        assert scores[name] == pytest.approx(sum(query[of_trec] for query in judged.values()) / len(test), abs=1e-6)
    index = model_folder.parent / "index"
    in_index = load_file(index / "vectors.safetensors")["vectors"]
    torch.testing.assert_close(
        torch.tensor(model.encode(json.loads((index / "documents.json").read_text()))), in_index, rtol=0, atol=1e-5
    )
    found = launch("search", model_folder.parent, test[7]["summary"], "--top", "3").stdout.splitlines()
    assert len(found) == 3
    best = test[int((queries[7] @ documents.T).argmax())]["body"]
    assert " ".join(best.split())[:200] in found[0]
    with pytest.raises(UserError, match="has no index"):
        search(model_folder, "words", 3, trust_remote_code=False)


@pytest.mark.parametrize("top", ["0", "-3"])
def test_no_documents_cannot_be_asked_for(
    top: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["search", "runs/x", "words", "--top", top])
    with pytest.raises(SystemExit, match="2"):
        run_command(search_command)
    assert capsys.readouterr().err == f"error: --top is {top}; set 1 or more\n"


@of("word_embeddings")
def test_gensim_loads_the_word_vectors(learned: Learned) -> None:
    model_folder, scores, _ = learned
    vectors = KeyedVectors.load_word2vec_format(str(model_folder / "vectors.txt"))
    _, spearman, unknown = vectors.evaluate_word_pairs(datapath("wordsim353.tsv"))
    assert scores["wordsim353"] == pytest.approx(spearman.statistic, abs=1e-6)
    assert scores["wordsim353_pairs"] == pytest.approx(353 * (1 - unknown / 100))


# What recipes add to the exported model, for gensim and sentence-transformers, and what the latter writes anew.
ADDED = [
    "vectors.txt", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json", "2_Normalize/config.json",
]  # fmt: skip
REWRITTEN = ["config.json", "tokenizer_config.json"]


@pytest.mark.parametrize("runs", [recipe for recipe in RECIPES if recipe not in PIPELINES])
def test_the_model_of_the_last_checkpoint_is_the_one_that_the_run_exported(runs: str, launched: Path) -> None:
    made = []
    for checkpoint in sorted((launched / runs).glob(f"*/checkpoints/{folder_of(STEPS)}")):
        run = checkpoint.parents[1]
        try:
            _, again = checkpoint_model.write(run, None, None, overwrite=False)
        except UserError as error:
            assert "are frozen" in str(error), run.name
            continue
        found, expected = files_of(again), files_of(run / "model")
        expected = {name: content for name, content in expected.items() if str(name) not in ADDED}
        assert found.keys() == expected.keys(), run.name
        anew = REWRITTEN if runs == "semantic_search" else []
        assert all(found[name] == expected[name] for name in expected if str(name) not in anew), run.name
        made.append(run.name)
    assert made


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
