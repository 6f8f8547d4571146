"""How fast gensim's word2vec reads, by its number of threads, on the words and settings of the recipe word_embeddings.

    python tests/by_hand/benchmark_words.py --threads 1,2

How fast the recipe reads is in the line `speed` of its run.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import gensim
import yaml
from word_embeddings import words_of

from lib.data.samples import load_sample
from lib.scores import baselines, evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    threads = [int(number) for number in parser.parse_args().threads.split(",")]
    cfg = yaml.safe_load((ROOT / "recipes" / "word_embeddings.yaml").read_text())
    texts = [words_of(row["text"]) for rows in load_sample(cfg["dataset"]).values() for row in rows]
    options = {name: cfg[name] for name in ("window", "negatives", "min_count", "seed")}
    options |= {"dims": cfg["dimensions"], "epochs": int(cfg["epochs"]), "sample": cfg["subsample"]}
    print(f"gensim {gensim.__version__}, {options['epochs']} epochs of {sum(map(len, texts)):,} words")
    for number in threads:
        names, vectors, speed = baselines.gensim_word2vec(texts, **options, workers=number)
        scores = evaluation.similarity_scores(names, vectors)
        ratings = ", ".join(f"{name} {scores[name]:.3f}" for name in ("wordsim353", "simlex999"))
        print(f"{number} thread{'s' if number > 1 else ''}: {speed:,.0f} words/s; {ratings}", flush=True)


if __name__ == "__main__":
    main()
