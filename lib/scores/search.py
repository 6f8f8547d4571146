"""Search documents by vectors: relevant documents of each query, the index of a run, and a command to try by hand.

./launch.sh search runs/semantic_search-... "sort the rows by a column" --top 5
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lib.errors import UserError, did_you_mean, display_path, run_command
from lib.scores import baselines, evaluation
from lib.settings.config import Parser

DEPTH = 100  # documents in a ranking, as many as recall@100 needs


class Corpus:
    """Pairs of a query and a document, made into a retrieval task.

    Equal queries are one query, equal documents one document. relevant: for each query the numbers of its documents.
    """

    def __init__(self, queries: Sequence[str], documents: Sequence[str]):
        query_rows, document_rows = (
            {text: row for row, text in reversed(list(enumerate(texts)))} for texts in (queries, documents)
        )
        # The first row that has each query or document.
        self.query_rows, self.document_rows = sorted(query_rows.values()), sorted(document_rows.values())
        self.queries, self.documents = (
            [queries[row] for row in self.query_rows],
            [documents[row] for row in self.document_rows],
        )
        numbers = {document: number for number, document in enumerate(self.documents)}
        relevant: dict[str, set[int]] = {query: set() for query in self.queries}
        for query, document in zip(queries, documents, strict=True):
            relevant[query].add(numbers[document])
        self.relevant = list(relevant.values())

    def bm25_scores(self) -> dict[str, float]:
        return evaluation.retrieval_scores(baselines.bm25(self.queries, self.documents, DEPTH), self.relevant)


def save_sentence_transformer(folder: Path, max_length: int, trust_remote_code: bool) -> None:
    """Add to an exported encoder what SentenceTransformer(folder) needs to load it.

    The vector of a text is the mean over its tokens' vectors, scaled to length 1.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    trust: dict[str, Any] = {
        name: {"trust_remote_code": trust_remote_code} for name in ("model_kwargs", "config_kwargs", "processor_kwargs")
    }
    encoder = modules.Transformer(str(folder), max_seq_length=max_length, **trust)
    pooling = modules.Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[encoder, pooling, modules.Normalize()], device="cpu").save(
        str(folder), create_model_card=False
    )


def save_index(folder: Path, documents: Sequence[str], vectors: np.ndarray) -> None:
    """Write documents.json and vectors.safetensors into the folder. vectors: [documents, dims], each of length 1."""
    folder.mkdir(exist_ok=True)
    (folder / "documents.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    save_file({"vectors": np.ascontiguousarray(vectors)}, folder / "vectors.safetensors")


def search(run: Path, query: str, top: int, trust_remote_code: bool) -> list[tuple[float, str]]:
    """[(cosine, document)] of the `top` documents in a run's index that are most similar to the query, best first.

    Raises UserError if the run has no index.
    """
    from sentence_transformers import SentenceTransformer

    if not (run / "index" / "vectors.safetensors").is_file():
        indexed = [display_path(index.parents[1]) for index in Path("runs").glob("**/index/vectors.safetensors")]
        known = f"; runs that have one: {', '.join(sorted(indexed)[:5])}" if indexed else ""
        raise UserError(
            f"{display_path(run)} has no index{did_you_mean(display_path(run), indexed)};"
            f" it is left by a finished run of semantic_search{known}"
        )
    documents = json.loads((run / "index" / "documents.json").read_text(encoding="utf-8"))
    model = SentenceTransformer(str(run / "model"), device="cpu", trust_remote_code=trust_remote_code)
    cosines = load_file(run / "index" / "vectors.safetensors")["vectors"] @ model.encode(query)
    return [(float(cosines[number]), documents[number]) for number in np.argsort(-cosines)[:top]]


def main(arguments: list[str]) -> None:
    parser = Parser(
        prog="./launch.sh search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run of semantic_search")
    parser.add_argument("query", help="what to look for")
    parser.add_argument("--top", type=int, default=5, help="how many documents to show (default: 5)")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="let code that lies beside the model run, if you trust its source",
    )
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise UserError(f"--top is {options.top}; set 1 or more")
    for cosine, document in search(options.run, options.query, options.top, options.trust_remote_code):
        print(f"{cosine:.3f}  {' '.join(document.split())[:200]}")


if __name__ == "__main__":
    run_command(main)
