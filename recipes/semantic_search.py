"""Fine-tune a bi-encoder for semantic search.

    ./launch.sh semantic_search --stage 2
    deepspeed --num_accelerators 2 recipes/semantic_search.py --deepspeed_config ds_configs/semantic_search/zero2.json
    ./launch.sh search runs/semantic_search-... "sort the rows by a column"

The default teaches MiniLM (22.7 M parameters) to find the rest of a docstring by its first paragraph, and compares it
with BM25, which reads whole documents, and with MiniLM as it was. The run leaves an index of the test documents, which
`./launch.sh search` searches.

Method: a text's vector is the mean of the encoder's last layer over its tokens, scaled to length 1 (Reimers and
Gurevych 2019). Minimize the cross entropy of each query's own document among all documents of the step, -log softmax(q
D^T / temperature)[own] (Henderson et al. 2017, section 4.4; Karpukhin et al. 2020). All documents means those of all
ranks and micro-batches, so the loss does not depend on how a batch is cut: the vectors of the whole step are gathered,
the loss and its gradient by each vector computed, and that gradient sent through the encoder micro-batch by micro-batch
(Gao et al. 2021, GradCache). With accumulation, texts are encoded twice for that. A document that the step has as an
answer to the same query, or that equals the query's own, is no negative of it. Batches are grouped by length, and there
is no dropout.

Change first: the YAML beside this file (model, dataset, columns), then embed() and contrastive_loss().
"""

import functools
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AutoModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import Batch, pad_tokens
from lib.data.rows import load_rows, map_rows
from lib.distributed import mesh, ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.errors import UserError
from lib.models import hub
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import evaluation, inference, search
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed
from lib.settings.run_settings import RunSettings


@dataclass(kw_only=True)
class Config(RunSettings):
    model: str  # "minilm" (installed with the requirements), a folder, or a Hugging Face hub id
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    dataset: str  # "docstring_pairs" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    query_column: str  # the column with the queries
    document_column: str  # the column with the document that each is to find
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the order of the rows
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # pairs an optimizer step, over all ranks; a query's negatives are all other documents
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training rows; null: max_steps decide
    max_length: PositiveInt  # tokens; longer texts are truncated and counted
    temperature: PositiveFloat  # what cosines are divided by
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    score_before: bool  # whether the model is scored before training too, to compare with


def build_model(cfg: Config) -> torch.nn.Module:
    """The encoder, whole, in host memory."""
    config = hub.load_config(cfg.model, 0.0, cfg.trust_remote_code)
    if config.is_encoder_decoder:
        raise UserError(f"model {cfg.model} is an encoder-decoder; take an encoder")
    return hub.load_weights(AutoModel, cfg.model, config, cfg.trust_remote_code)


def tokenize(rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """Columns query and document -> their token ids, what tells texts apart, the length of each and of both
    together, and whether either was truncated."""
    queries, documents = (
        tokenizer(rows[name], truncation=True, max_length=max_length) for name in ("query", "document")
    )
    pairs = list(zip(queries.encodings, documents.encodings, strict=True))
    return {
        "query": queries["input_ids"],
        "document": documents["input_ids"],
        "query_identity": [identity(text) for text in rows["query"]],
        "document_identity": [identity(text) for text in rows["document"]],
        "query_length": [len(query.ids) for query, _ in pairs],
        "document_length": [len(document.ids) for _, document in pairs],
        "length": [len(query.ids) + len(document.ids) for query, document in pairs],
        "truncated": [bool(query.overflowing or document.overflowing) for query, document in pairs],
    }


def identity(text: str) -> int:
    """A number that equal texts have in common, and different ones do not: 63 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def truncation_notes(train: Dataset) -> list[str]:
    truncated = sum(train["truncated"])
    return [f"{truncated:,} training pairs truncated"] if truncated else []


def count_tokens(batch: Batch) -> torch.Tensor:
    return batch["query_attention_mask"].sum() + batch["document_attention_mask"].sum()


def collate(rows: dict[str, list[Any]], pad_token_id: int) -> Batch:
    """Pairs -> query_input_ids, query_attention_mask [rows, longest query], the same of the documents; identities
    [rows, 2] of both texts."""
    padded = {name: pad_tokens(rows[name], pad_token_id) for name in ("query", "document")}
    identities = torch.tensor([rows["query_identity"], rows["document_identity"]]).T
    tensors = {f"{name}_{key}": tensor for name, found in padded.items() for key, tensor in found.items()}
    return tensors | {"identities": identities}


def embed(engine: Any, batch: Batch, name: str) -> torch.Tensor:
    """The vectors of a batch's queries or documents: [rows, dims] of length 1, in fp32."""
    mask = batch[f"{name}_attention_mask"]
    states = engine(input_ids=batch[f"{name}_input_ids"], attention_mask=mask).last_hidden_state.float()
    mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return F.normalize(mean, dim=-1)


def embed_pairs(engine: Any, batch: Batch) -> torch.Tensor:
    """[rows, 2, dims]: queries and documents."""
    return torch.stack([embed(engine, batch, "query"), embed(engine, batch, "document")], dim=1)


def step_vectors(engine: Any, micro_batches: list[Batch]) -> list[torch.Tensor]:
    """[rows, 2, dims] of each micro-batch: with gradients if it is the only one, else it must be encoded once more."""
    with torch.set_grad_enabled(len(micro_batches) == 1):
        return [embed_pairs(engine, batch) for batch in micro_batches]


def vector_gradients(
    vectors: list[torch.Tensor], micro_batches: list[Batch], temperature: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss over the vectors of all ranks, and its gradient by each of this rank's, micro-batch by micro-batch."""
    local = torch.cat([pairs.detach() for pairs in vectors])
    everyone = ranks.all_rows(local).requires_grad_()
    identities = ranks.all_rows(torch.cat([batch["identities"] for batch in micro_batches]))
    loss = contrastive_loss(everyone[:, 0], everyone[:, 1], identities, temperature)
    (gradient,) = torch.autograd.grad(loss, everyone)
    local_gradient = gradient[mesh.data_parallel_rank() * len(local) :][: len(local)]
    return loss.detach(), list(torch.split(local_gradient, len(vectors[0])))


def contrastive_loss(
    queries: torch.Tensor, documents: torch.Tensor, identities: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The mean cross entropy of each query's own document, the one in the same row, among all that do not answer it.

    Both: [rows, dims]; identities: [rows, 2] of queries and documents.
    """
    same_query, same_document = (texts[:, None] == texts for texts in identities.T)
    answers = same_query.float() @ same_document.float() > 0  # [query, document]: some row has both
    counted = ~answers | torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    scores = (queries @ documents.T / temperature).masked_fill(~counted, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(queries), device=queries.device))


def retrieve(
    engine: Any, split: Dataset, tokenized: Dataset, collate_rows: Any, batch_size: int
) -> tuple[dict[str, float], list[str], torch.Tensor]:
    """(scores of all queries of a split against all of its documents, those documents, their vectors)."""

    def vectors_of(name: str, rows: Dataset) -> torch.Tensor:
        lengths = rows[f"{name}_length"]
        answer = functools.partial(embed, engine, name=name)
        return inference.for_each_row(engine, rows, collate_rows, batch_size, answer=answer, lengths=lengths)

    corpus = search.Corpus(split["query"], split["document"])
    queries = vectors_of("query", tokenized.select(corpus.query_rows))
    documents = vectors_of("document", tokenized.select(corpus.document_rows))
    ranking = torch.cat(
        [(part @ documents.T).topk(min(search.DEPTH, len(documents))).indices for part in torch.split(queries, 1024)]
    )
    return evaluation.retrieval_scores(ranking.cpu().numpy(), corpus.relevant), corpus.documents, documents


def save(run: Run, cfg: Config, documents: list[str], vectors: torch.Tensor) -> None:
    """What sentence-transformers needs beside the model, and the index that `./launch.sh search` searches."""
    model, index = run.folder / "model", run.folder / "index"
    ranks.on_rank0(lambda: search.save_sentence_transformer(model, cfg.max_length, cfg.trust_remote_code))
    ranks.on_rank0(lambda: search.save_index(index, documents, vectors.cpu().numpy()))
    run.say(f"search   ./launch.sh search {run.folder} 'your query'  searches {len(documents):,} test documents")


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: queries and documents to token ids. A document is in one split.
    columns = {"document": cfg.document_column, "query": cfg.query_column}
    splits = load_rows(cfg.dataset, cfg.max_rows, text=columns)
    tokenizer = hub.load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
    tokenized = map_rows(splits, tokenize, tokenizer=tokenizer, max_length=cfg.max_length)
    train = tokenized["train"]
    collate_rows = functools.partial(collate, pad_token_id=tokenizer.pad_token_id)
    run.plan(train, splits)

    # Model, optimizer, engine.
    model = load_model(lambda: build_model(cfg), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {name: len(rows) for name, rows in tokenized.items()}, truncation_notes(train), tokenizer)

    def evaluate(split: str) -> tuple[dict[str, float], list[str], torch.Tensor]:
        return retrieve(engine, splits[split], tokenized[split], collate_rows, run.micro_batch_size)

    test = splits["test"]
    baseline_scores = {"BM25": ranks.on_rank0(lambda: search.Corpus(test["query"], test["document"]).bm25_scores())}
    if cfg.score_before:
        name = f"scores on {len(test):,} test pairs"
        baseline_scores["this model, before"] = run.kept(name, lambda: evaluate("test")[0])
    for step, micro_batches in run.steps(train, collate_rows, train["length"]):  # this rank's share of a step
        tokens = ranks.sum_over_ranks(count_tokens(batch) for batch in micro_batches)
        vectors = step_vectors(engine, micro_batches)
        loss, gradients = vector_gradients(vectors, micro_batches, cfg.temperature)
        for batch, pairs, gradient in zip(micro_batches, vectors, gradients, strict=True):
            encoded = pairs if pairs.requires_grad else embed_pairs(engine, batch)
            surrogate = (encoded * gradient).sum()  # its gradient by the weights is that of the loss
            engine.backward(run.undivided(surrogate))  # DeepSpeed divides by accumulation steps and ranks
            engine.step()  # changes the weights after the last micro-batch only
        run.log_step(step, loss / mesh.data_parallel_size(), tokens)  # every rank has the whole loss
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation")[0], higher_is_better="ndcg_at_10")

    export(engine, tokenizer, run.folder / "model")
    scores, documents, document_vectors = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    save(run, cfg, documents, document_vectors)
    return run.finish(scores, f"{len(set(test['query'])):,} test queries", baseline_scores)


if __name__ == "__main__":
    cli(main, Config)
