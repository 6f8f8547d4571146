"""Generation by all ranks together: it ends at every stage, and the texts depend on neither stage nor world size."""

import json

import pytest
from conftest import ALL, CONFIGS, run_ranks

pytestmark = pytest.mark.slow


# Number of ranks -> configs. Stages 1 and 2, offloaded or not, generate with whole parameters, as stage 0 does.
CASES = {1: CONFIGS, 2: CONFIGS} if ALL else {1: ["zero0"], 2: ["zero2", "zero3"]}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[str]]]:
    """{number of ranks: {"<model> <config> <beams> <length penalty> <no repeat>": a text for each row}}."""
    folder = tmp_path_factory.mktemp("generation")
    for world_size, configs in CASES.items():
        run_ranks(world_size, "generation_worker", folder / f"{world_size}.json", *configs)
    return {world_size: json.loads((folder / f"{world_size}.json").read_text()) for world_size in CASES}


@pytest.mark.parametrize("model", ["scratch", "encoder", "warm"])
@pytest.mark.parametrize("search", ["1 1 0", "3 1 0", "3 4 0", "3 4 2"])
@pytest.mark.parametrize(
    "world_size, config", [(world_size, config) for world_size, configs in CASES.items() for config in configs]
)
def test_the_same_text_at_every_stage_and_number_of_ranks(
    texts: dict[int, dict[str, list[str]]], model: str, config: str, search: str, world_size: int
) -> None:
    assert texts[world_size][f"{model} {config} {search}"] == texts[1][f"{model} zero0 {search}"]


@pytest.mark.parametrize("model", ["scratch", "encoder", "warm"])
def test_the_texts_tell_the_rows_and_the_searches_apart(texts: dict[int, dict[str, list[str]]], model: str) -> None:
    """Without this the test above would pass for a model whose text is always the same."""
    greedy, beams, longer, unrepeated = (
        texts[1][f"{model} zero0 {search}"] for search in ("1 1 0", "3 1 0", "3 4 0", "3 4 2")
    )
    assert len(set(greedy)) > 8 and greedy != beams
    assert sum(map(len, longer)) > sum(map(len, beams))
    assert unrepeated != longer
    assert len({len(text) for text in greedy}) > 4
