"""A comparison's findings in three sentences: which config to take and why, which is the fastest, what was surprising.

A sentence is a list of texts and figures. A figure is (row, name of a column), so that it can be traced to results.csv.
"""

from lib.compare.results import Results, Row, case_name, written

Sentence = list[str | tuple[Row, str]]
NEAR = 0.05  # step times and peaks that differ by a smaller part count as equal, because a machine's timing is noisy


def sentences(results: Results) -> list[Sentence]:
    trusted = [row for row in results.good() if row["loss_left_at_step"] is None]
    if not trusted:
        return [["No config ran to the end; the reasons are in the report."]]
    # Step times are compared on one number of ranks: the fastest row's.
    ranks = max(trusted, key=lambda row: row["tokens_per_second"])["ranks"]
    rows = [row for row in trusted if row["ranks"] == ranks]
    return [advice(results, rows), speed(results, rows), surprise(results, rows)]


def advice(results: Results, rows: list[Row]) -> Sentence:
    """The config to take: among those that are as fast as the fastest, the one with the least memory at its peak."""
    peak, place = results.peak, " on its device" if results.on_gpu else ""
    states = "states_device_bytes" if results.on_gpu else "states_bytes"
    fastest = max(rows, key=lambda row: row["tokens_per_second"])
    as_fast = [
        row
        for row in rows
        if row["step_ratio"] <= fastest["step_ratio"] * (1 + NEAR)
        or row["step_ratio_low"] <= fastest["step_ratio_high"]
    ]
    least = min(row[peak] for row in as_fast)
    take = max((row for row in as_fast if row[peak] <= (1 + NEAR) * least), key=lambda row: row["tokens_per_second"])
    smallest = min(rows, key=lambda row: row[peak])

    sentence: Sentence = [f"Take {case_name(take, results)}: "]
    if len(rows) > 1:
        sentence += ["no config is faster" + ("" if take is fastest else " by more than the noise"), ", and "]
    sentence += [f"at its peak a rank needs{place} ", (take, peak), ", of which ", (take, states), " are model states"]
    if smallest[peak] < (1 - NEAR) * take[peak]:
        sentence += [
            f". If memory is short, {case_name(smallest, results)} needs{place} ",
            (smallest, peak),
            "; its step takes ",
            (smallest, "step_ms"),
        ]
        sentence += [" instead of ", (take, "step_ms")]
    return [*sentence, "."]


def speed(results: Results, rows: list[Row]) -> Sentence:
    fastest, slowest = (choose(rows, key=lambda row: row["tokens_per_second"]) for choose in (max, min))
    sentence: Sentence = [
        f"The fastest that fits is {case_name(fastest, results)} with ",
        (fastest, "tokens_per_second"),
        " tokens/s",
    ]
    if slowest is not fastest:
        sentence += [f", the slowest {case_name(slowest, results)} with ", (slowest, "tokens_per_second")]
    failed = ", ".join(case_name(row, results) for row in results.rows if row["failed"] is not None)
    return [*sentence, f"; {failed} failed." if failed else "."]


def surprise(results: Results, rows: list[Row]) -> Sentence:
    """The finding that a reader would least expect.

    It is a loss that differs by more than rounding; else the figure that exceeds the paper's by the largest factor.
    """
    diverged = [row for row in results.good() if row["loss_left_at_step"] is not None]
    if diverged:
        start = f"Surprising: {case_name(diverged[0], results)} left the path of the losses at step "
        return [
            start,
            (diverged[0], "loss_left_at_step"),
            "; the largest relative difference is ",
            (diverged[0], "loss_difference"),
            ".",
        ]
    first, peak = rows[0], results.peak
    found: list[tuple[float, Sentence]] = []
    for row in rows:
        name = case_name(row, results)
        gradients: Sentence = [
            f"Surprising: {name} holds ",
            (row, "gradients_device_bytes"),
            " of gradients where the paper has ",
            (row, "gradients_paper_bytes"),
        ]
        found.append(
            (row["gradients_device_bytes"] / row["gradients_paper_bytes"], [*gradients, "; the report says why."])
        )
        if row["traffic_paper_bytes"]:
            sent: Sentence = [
                f"Surprising: a rank of {name} sends ",
                (row, "traffic_bytes"),
                " a step where the paper has ",
                (row, "traffic_paper_bytes"),
            ]
            found.append((row["traffic_bytes"] / row["traffic_paper_bytes"], [*sent, "; the report says why."]))
        if row["states_share"] < 1 - NEAR:
            memory: Sentence = [
                f"Surprising: {name}'s model states are ",
                (row, "states_share"),
                f" of {case_name(first, results)}'s, but its peak is ",
            ]
            found.append((row[peak] / first[peak], [*memory, (row, peak), " against ", (first, peak), "."]))
            faster: Sentence = [
                f"Surprising: {name} saves memory and is faster, with ",
                (row, "tokens_per_second"),
                " tokens/s against ",
            ]
            found.append(
                (row["tokens_per_second"] / first["tokens_per_second"], [*faster, (first, "tokens_per_second"), "."])
            )
    size, sentence = max(found, key=lambda pair: pair[0])
    if size > 1 + 2 * NEAR:
        return sentence
    expected = (
        "the report says where a figure is other than the paper's"
        if results.notes
        else "memory and traffic are as the paper has them"
    )
    if len(rows) == 1:
        return [f"Nothing was surprising: {expected}."]
    return [
        f"Nothing was surprising: {expected}, and no loss differs by more than ",
        (max(rows, key=lambda row: row["loss_difference"]), "loss_difference"),
        ".",
    ]


def plain(sentence: Sentence, results: Results) -> str:
    """A sentence as text."""
    kinds = {column.name: column.kind for column in results.columns()}
    return "".join(part if isinstance(part, str) else written(part[0][part[1]], kinds[part[1]]) for part in sentence)
