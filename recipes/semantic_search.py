"""Fine-tune a bi-encoder for semantic search.

    ./launch.sh semantic_search --stage 2
    deepspeed --num_accelerators 2 recipes/semantic_search.py --deepspeed_config ds_configs/semantic_search/zero2.json
    ./launch.sh search runs/semantic_search-... "sort the rows by a column"

The default teaches MiniLM (22.7 M parameters) to find the rest of a docstring by its first paragraph, and compares it with BM25, which
reads whole documents, and with MiniLM as it was. The run leaves an index of the test documents, which `./launch.sh search` searches.

Method: a text's vector is the mean of the encoder's last layer over its tokens, scaled to length 1 (Reimers and Gurevych 2019). Minimize
the cross entropy of each query's own document among all documents of the step, -log softmax(q D^T / temperature)[own] (Henderson et al.
2017, section 4.4; Karpukhin et al. 2020). All documents means those of all ranks and micro-batches, so the loss does not depend on how a
batch is cut: the vectors of the whole step are gathered, the loss and its gradient by each vector computed, and that gradient sent
through the encoder micro-batch by micro-batch (Gao et al. 2021, GradCache). With accumulation, texts are encoded twice for that. A
document that the step has as an answer to the same query, or that equals the query's own, is no negative of it.
Batches are grouped by length, and there is no dropout.

Change first: the YAML beside this file (model, dataset, columns), then embed() and contrastive_loss().
"""

import functools
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AutoModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import Batch, pad_tokens, training_batches
from lib.data.rows import load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.repairs import repair_stage0, veto_if_not_finite
from lib.errors import UserError
from lib.models.hub import load_config, load_tokenizer, load_weights
from lib.run.checkpoints import Checkpoints
from lib.run.cli import cli
from lib.run.run import Run
from lib.scores import evaluation, inference
from lib.scores.search import DEPTH, Corpus, save_index, save_sentence_transformer
from lib.settings.config import Betas, Seed
from lib.settings.run_settings import RunSettings


@dataclass
class Config(RunSettings):
    model: str  # "minilm" (installed with the requirements), a folder, or a Hugging Face hub id
    trust_remote_code: (
        bool  # whether code and pickled weights that come with the model may run; only for sources that you trust
    )
    dataset: str  # "docstring_pairs" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    query_column: str  # the column with the queries
    document_column: str  # the column with the document that each is to find
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the order of the rows
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: (
        PositiveInt  # pairs an optimizer step, over all ranks; a query has the documents of all others as negatives
    )
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training rows; null: max_steps decide
    max_length: PositiveInt  # tokens; longer texts are truncated and counted
    temperature: PositiveFloat  # what cosines are divided by
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: Literal["linear", "cosine", "constant"]  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: (
        PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which the mean gradient is divided
    )
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    score_before: bool  # whether the model is scored before training too, to compare with


def build_model(cfg: Config) -> torch.nn.Module:
    """The encoder, whole, in host memory."""
    config = load_config(cfg.model, 0.0, cfg.trust_remote_code)
    if config.is_encoder_decoder:
        raise UserError(f"model {cfg.model} is an encoder-decoder; take an encoder")
    return load_weights(AutoModel, cfg.model, config, cfg.trust_remote_code)


def tokenize(rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """Columns query and document -> their token ids, what tells texts apart, the length of each and of both together, and whether either was truncated."""
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


def collate(rows: dict[str, list[Any]], pad_token_id: int) -> Batch:
    """Pairs -> query_input_ids, query_attention_mask [rows, longest query], the same of the documents; identities [rows, 2] of both texts."""
    padded = {name: pad_tokens(rows[name], pad_token_id) for name in ("query", "document")}
    identities = torch.tensor([rows["query_identity"], rows["document_identity"]]).T
    return {f"{name}_{key}": tensor for name, tensors in padded.items() for key, tensor in tensors.items()} | {
        "identities": identities
    }


def embed(engine: Any, batch: Batch, name: str) -> torch.Tensor:
    """The vectors of a batch's queries or documents: [rows, dims] of length 1, in fp32."""
    mask = batch[f"{name}_attention_mask"]
    states = engine(input_ids=batch[f"{name}_input_ids"], attention_mask=mask).last_hidden_state.float()
    mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return F.normalize(mean, dim=-1)


def embed_pairs(engine: Any, batch: Batch) -> torch.Tensor:
    """[rows, 2, dims]: queries and documents."""
    return torch.stack([embed(engine, batch, "query"), embed(engine, batch, "document")], dim=1)


def contrastive_loss(
    queries: torch.Tensor, documents: torch.Tensor, identities: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The mean cross entropy of each query's own document, the one in the same row, among it and those that are wrong answers.

    Both: [rows, dims]; identities: [rows, 2] of queries and documents.
    """
    same_query, same_document = (texts[:, None] == texts for texts in identities.T)
    answers = same_query.float() @ same_document.float() > 0  # [query, document]: some row has both
    counted = ~answers | torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    scores = (queries @ documents.T / temperature).masked_fill(~counted, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(queries), device=queries.device))


def evaluate(
    engine: Any, split: Dataset, tokenized: Dataset, collate_rows: Any, batch_size: int
) -> tuple[dict[str, float], list[str], torch.Tensor]:
    """(scores of all queries of a split against all of its documents, those documents, their vectors)."""

    def vectors_of(name: str, rows: Dataset) -> torch.Tensor:
        return inference.for_each_row(
            engine, rows, collate_rows, batch_size, lambda batch: embed(engine, batch, name), rows[f"{name}_length"]
        )

    corpus = Corpus(split["query"], split["document"])
    queries = vectors_of("query", tokenized.select(corpus.query_rows))
    documents = vectors_of("document", tokenized.select(corpus.document_rows))
    ranking = torch.cat(
        [(part @ documents.T).topk(min(DEPTH, len(documents))).indices for part in torch.split(queries, 1024)]
    )
    return evaluation.retrieval_scores(ranking.cpu().numpy(), corpus.relevant), corpus.documents, documents


def main(cfg: Config, ds_config: dict[str, Any]) -> dict[str, dict[str, float]]:
    device = ranks.init(cfg.rank_timeout)
    run = Run(cfg, ds_config, __file__)
    micro_batch_size, accumulation_steps = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )

    # Data: queries and documents to token ids.
    splits = load_rows(
        cfg.dataset, cfg.max_rows, text={"document": cfg.document_column, "query": cfg.query_column}
    )  # a document is in one split
    tokenizer = load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
    tokenized = map_rows(splits, tokenize, tokenizer=tokenizer, max_length=cfg.max_length)
    train = tokenized["train"]
    collate_rows = functools.partial(collate, pad_token_id=tokenizer.pad_token_id)
    run.plan(len(train), splits)

    # Model, optimizer, engine.
    model = load_model(lambda: build_model(cfg), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    repair_stage0(engine)
    run.attach(engine)
    truncated = sum(train["truncated"])
    run.header(
        model,
        {name: len(rows) for name, rows in tokenized.items()},
        [f"{truncated:,} training pairs truncated"] if truncated else [],
    )
    test = splits["test"]
    beside = {"BM25": ranks.on_rank0(lambda: Corpus(test["query"], test["document"]).bm25_scores())}
    if cfg.score_before:
        beside["this model, before"], _, _ = evaluate(engine, test, tokenized["test"], collate_rows, micro_batch_size)

    checkpoints = Checkpoints(run, engine, schedule)
    done = checkpoints.restore()  # optimizer steps: 0, or those of the checkpoint that --resume found
    batches = training_batches(
        train, collate_rows, cfg.batch_size, micro_batch_size, cfg.seed, device, train["length"], start=done
    )
    for step in run.steps(done):
        micro_batches = next(batches)  # this rank's share of one optimizer step
        learning_rate = schedule.get_last_lr()[0]
        masks = [
            batch[name].sum() for batch in micro_batches for name in ("query_attention_mask", "document_attention_mask")
        ]
        tokens = ranks.all_sum(torch.stack(masks).sum())  # of all ranks
        # The vectors of the whole step, on every rank; the loss, and its gradient by each of them.
        with torch.set_grad_enabled(accumulation_steps == 1):
            vectors = [embed_pairs(engine, batch) for batch in micro_batches]
        own = torch.cat([pair.detach() for pair in vectors])
        everyone = ranks.all_rows(own).requires_grad_()
        identities = ranks.all_rows(torch.cat([batch["identities"] for batch in micro_batches]))
        loss = contrastive_loss(everyone[:, 0], everyone[:, 1], identities, cfg.temperature)
        (gradient,) = torch.autograd.grad(loss, everyone)
        own_gradients = torch.split(gradient[ranks.rank() * len(own) :][: len(own)], micro_batch_size)
        for batch, own_gradient in zip(micro_batches, own_gradients, strict=True):
            pairs = vectors[0] if accumulation_steps == 1 else embed_pairs(engine, batch)
            surrogate = (pairs * own_gradient).sum()  # whose gradient by the weights is the loss's
            engine.backward(
                veto_if_not_finite(surrogate) * accumulation_steps * ranks.world_size()
            )  # undoes DeepSpeed's two divisions
            engine.step()  # changes the weights after the last micro-batch only
        run.log_step(step, loss.detach() / ranks.world_size(), tokens, learning_rate, engine.get_global_grad_norm())
        if run.due(step, cfg.eval_every):
            scores, _, _ = evaluate(
                engine, splits["validation"], tokenized["validation"], collate_rows, micro_batch_size
            )
            run.log_evaluation(step, "validation", scores)
            checkpoints.score(step, scores["ndcg_at_10"])
        checkpoints.end_step(
            step, micro_batches
        )  # saves when due, or asked to stop; a loss that is not finite has changed no weight

    checkpoints.take_best()
    export(engine, tokenizer, run.folder / "model")
    scores, documents, document_vectors = evaluate(engine, test, tokenized["test"], collate_rows, micro_batch_size)
    run.log_evaluation(run.total_steps, "test", scores)
    ranks.on_rank0(lambda: save_sentence_transformer(run.folder / "model", cfg.max_length, cfg.trust_remote_code))
    ranks.on_rank0(lambda: save_index(run.folder / "index", documents, document_vectors.cpu().numpy()))
    run.say(f"search   ./launch.sh search {run.folder} 'your query'  searches the {len(documents):,} test documents")
    run.finish({f"this model, {len(set(test['query'])):,} test queries": scores, **beside})
    return {"model": scores, **beside}


if __name__ == "__main__":
    cli(main, Config)
