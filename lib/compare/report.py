"""The report of a comparison: the terminal's table, results.csv, report.md, report.html and charts/.

Every number in a finding is a value of results.csv, or of with.csv where there is an older comparison, in the form that
`results.written` gives it. On the page each number carries the names of its row and column;
tests/compare/test_compare.py checks them.
"""

import csv
import html
import io
import re
from typing import Any

from lib.compare import charts
from lib.compare.findings import Sentence, plain, sentences
from lib.compare.results import INSPECTED, Results, Row, case_name, missing_runs, relative, written
from lib.errors import display_path

# The table: heading -> the columns of a cell. The first column's value comes first, the others' follow in brackets.
TABLE = {
    "states a rank (theory)": ("states_bytes", "states_theory_bytes"),
    "in host memory": ("states_host_bytes",),
    "peak on device": ("peak_device_bytes",),
    "peak on host": ("peak_host_bytes",),
    "step (10 - 90 %)": ("step_ms", "step_p10_ms", "step_p90_ms"),
    "step, of the first's (rounds)": ("step_ratio", "step_ratio_low", "step_ratio_high"),
    "bubble (theory)": ("bubble", "bubble_theory"),
    "tokens/s": ("tokens_per_second",),
    "MFU": ("mfu",),
    "sent a step (theory)": ("traffic_bytes", "traffic_theory_bytes"),
    "loss, rel. difference": ("loss_difference",),
    "loss, over ranks": ("loss_difference_over_ranks",),
}
CAPTIONS = {
    "memory": "Counted from tensors, the most in a step; buffers and activations come on top."
    " Solid line: what this config should hold; dotted: the ZeRO paper.",
    "speed": "Up and to the left is better. The peak holds activations, buffers and, of a process, its libraries.",
    "step_time": "From the same marks on every config;"
    " backward and optimizer step hold the collectives that they wait for.",
    "traffic": "DeepSpeed's log of its collectives, as bytes on the wire of ring collectives."
    " Solid line: this config, by theory; dotted: the ZeRO paper.",
    "losses": "All curves should be one. Below, each one's distance from the first config on as many ranks.",
    "scaling": "Dotted: if each rank added as much as the first. On a CPU all ranks share its cores.",
}
# The columns whose values are shown next to those of an older comparison.
PAIRED_COLUMNS = (
    "step_ms",
    "tokens_per_second",
    "states_bytes",
    "peak_device_bytes",
    "peak_host_bytes",
    "traffic_bytes",
    "checkpoint_seconds",
)


def table_of(results: Results) -> dict[str, tuple[str, ...]]:
    """TABLE without the columns that have nothing to show in this comparison, and with the recipe's scores."""
    empty_values = {
        "bubble": None,
        "mfu": None,
        "peak_device_bytes": None,
        "loss_difference_over_ranks": None,
        "states_host_bytes": 0,
    }
    shown = {
        heading: names
        for heading, names in TABLE.items()
        if any(row[names[0]] != empty_values.get(names[0], "") for row in results.good())
    }
    scores = [column.name for column in results.columns() if column.name.startswith("score_")]
    return shown | {name.removeprefix("score_"): (name,) for name in scores}


def title_of(results: Results) -> str:
    count = len(results.spec["configs"])
    return f"{results.spec['recipe']} under {count} DeepSpeed config{'s' if count > 1 else ''}"


def kinds_of(results: Results) -> dict[str, str]:
    return {column.name: column.kind for column in results.columns()}


def cells(results: Results, row: Row, table: dict[str, tuple[str, ...]]) -> list[str]:
    """A row of the table, as text."""
    kinds = kinds_of(results)
    found = []
    for name, *others in table.values():
        more = f" ({' - '.join(written(row[other], kinds[other]) for other in others)})" if others else ""
        found.append(written(row.get(name), kinds[name]) + more)
    return found


# An older comparison, `other`, next to this one


def paired_figures(results: Results, other: Results) -> list[dict[str, Any]]:
    """One entry for each figure of each config and number of ranks that both comparisons have.

    An entry has config, ranks, column, old, new and ratio; that of the last loss has loss_difference, and no ratio.
    """
    entries = []
    for row in results.good():
        old = next(
            (old for old in other.good() if (old["config"], old["ranks"]) == (row["config"], row["ranks"])), None
        )
        if old is None:
            continue
        case = {"config": row["config"], "ranks": row["ranks"]}
        for column in PAIRED_COLUMNS:
            if row[column] and old[column]:
                entries.append(
                    case
                    | {"column": column, "old": old[column], "new": row[column], "ratio": row[column] / old[column]}
                )
        pairs = zip(
            results.losses[row["config"], row["ranks"]], other.losses[row["config"], row["ranks"]], strict=False
        )
        largest = max(relative(new, before) for new, before in pairs)
        entries.append(
            case
            | {
                "column": "loss_last",
                "old": old["loss_last"],
                "new": row["loss_last"],
                "ratio": None,
                "loss_difference": largest,
            }
        )
    return entries


def nothing_in_common(results: Results, other: Results) -> str | None:
    """Why two comparisons cannot be shown next to each other; None where they can."""
    if paired_figures(results, other):
        return None
    cases = ", ".join(f"{row['config']} on {row['ranks']}" for row in other.good()) or "no config that ran"
    return f"{display_path(other.folder)} has {cases}: nothing that {display_path(results.folder)} has too"


def what_differs(results: Results, other: Results) -> list[str]:
    """What differs between the set-ups of two comparisons, as "name: old -> new"."""
    facts = []
    for comparison in (other, results):
        spec = comparison.spec
        facts.append({
            "recipe": spec["recipe"], "settings": " ".join(spec["settings"]) or "none", "steps": spec["steps"],
            "precision": spec["precision"], "preset": spec["preset"] or "none", "device": comparison.device,
            "cores": spec["cores"], "commit": spec["commit"], "code": spec["code"], **spec["versions"],
        })  # fmt: skip
        facts[-1] |= {
            f"ds_configs/{name}.json": "changed"
            for name, config in spec["configs"].items()
            if results.spec["configs"].get(name, config) != config
        }
    old, new = facts
    return [f"{name}: {old.get(name)} -> {new.get(name, 'as here')}" for name in old if old[name] != new.get(name)]


# Text and Markdown


def as_text(results: Results, other: Results | None) -> str:
    """The table and the three sentences, for the terminal."""
    # A terminal is narrow, so that only the report shows the spread over steps and rounds.
    table = {
        heading if "theory" in heading else heading.split(" (")[0]: names if "theory" in heading else names[:1]
        for heading, names in table_of(results).items()
    }
    text = [
        "",
        *aligned(
            [
                ["config", "ranks", *table],
                *([row["config"], str(row["ranks"]), *cells(results, row, table)] for row in results.good()),
            ]
        ),
    ]
    text += [f"{case_name(row, results)}: failed: {row['failed']}" for row in results.rows if row["failed"]]
    if other is not None:
        text += [
            "",
            f"Beside {display_path(other.folder)} ({other.spec['created']}):",
            *(f"  {line}" for line in what_differs(results, other)),
            "",
        ]
        text += aligned([["config", "ranks", "", "then", "now", "ratio"], *paired_cells(results, other)])
    return "\n".join(
        [*text, "", *(f"{number}. {plain(sentence, results)}" for number, sentence in enumerate(sentences(results), 1))]
    )


def aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def paired_cells(results: Results, other: Results) -> list[list[str]]:
    kinds, abouts = kinds_of(results), {column.name: column.about for column in results.columns()}
    lines = []
    for entry in paired_figures(results, other):
        kind = kinds[entry["column"]]
        change = (
            written(entry["ratio"], "ratio")
            if entry["ratio"] is not None
            else f"differs by {written(entry['loss_difference'], 'small')}"
        )
        lines.append(
            [
                entry["config"],
                str(entry["ranks"]),
                abouts[entry["column"]],
                written(entry["old"], kind),
                written(entry["new"], kind),
                change,
            ]
        )
    return lines


def setting(results: Results) -> dict[str, str]:
    """What was compared, on what, when and with which versions."""
    spec = results.spec
    good = results.good()
    missing_runs_count = missing_runs(results.folder, spec)
    missing = f"; missing or failed runs: {missing_runs_count}" if missing_runs_count else ""
    repeats = f", repeated in turn ({spec['rounds'] - 1} x {spec['repeat_steps']} steps)" if spec["rounds"] > 1 else ""
    machine = (
        f"{results.device}s" if results.on_gpu else f"CPU, {spec['cores']} cores" if good else f"{spec['cores']} cores"
    )
    return {
        "recipe": spec["recipe"]
        + (f", {results.model} with {good[0]['parameters']:,} parameters, {spec['precision']}" if good else ""),
        "machine": f"{machine}, {written(spec['memory_bytes'], 'bytes')} of memory;"
        f" ranks: {', '.join(map(str, spec['ranks']))}",
        "made": f"{spec['created']}, "
        + ", ".join(f"{name} {version}" for name, version in spec["versions"].items())
        + f", commit {spec['commit']}",
        "runs": f"{spec['steps']} steps under each config{repeats}; the first {INSPECTED} are not timed{missing}",
        "command": spec["command"],
    }


def note_lines(results: Results) -> list[tuple[str, str]]:
    return [(f"{', '.join(configs)}: {what}", why) for (what, why), configs in results.notes.items()]


def marked(text: str) -> str:
    """The text on one line, escaped so that Markdown shows it as it is: without tags, table cells, emphasis or code."""
    return " ".join(re.sub(r"[<|`*\\]", r"\\\g<0>", text).split())


def table_line(texts: list[str]) -> str:
    return "| " + " | ".join(map(marked, texts)) + " |"


def as_markdown(results: Results, other: Results | None) -> str:
    headings = ["config", "ranks", *table_of(results)]
    lines = [f"# {marked(title_of(results))}", ""]
    lines += [f"{number}. {marked(plain(sentence, results))}" for number, sentence in enumerate(sentences(results), 1)]
    lines += ["", table_line(headings), "|" + "---|" * len(headings)]
    lines += [
        table_line([row["config"], str(row["ranks"]), *cells(results, row, table_of(results))])
        for row in results.good()
    ]
    lines += [
        "",
        *(
            f"- **{marked(case_name(row, results))} failed**: {marked(row['failed'])}"
            for row in results.rows
            if row["failed"]
        ),
    ]
    lines += [
        f"- **{marked(case_name(row, results))} left the path of the losses** at step {row['loss_left_at_step']}"
        for row in results.good()
        if row["loss_left_at_step"]
    ]
    if other is not None:
        lines += [
            "",
            f"## Beside {marked(display_path(other.folder))}",
            "",
            *(f"- {marked(line)}" for line in what_differs(results, other)),
            "",
        ]
        lines += [
            "| config | ranks | | then | now | ratio |",
            "|---|---|---|---|---|---|",
            *(table_line(line) for line in paired_cells(results, other)),
        ]
    for name, (title, _, _) in charts.charts_of(results).items():
        lines += ["", f"## {title}", "", f"![{title}](charts/{name}.png)", "", CAPTIONS[name]]
    if results.notes:
        lines += [
            "",
            "## Where it differs from the ZeRO paper",
            "",
            *(f"- {marked(what)}: {marked(why)}" for what, why in note_lines(results)),
        ]
    lines += [
        "",
        "## How it was made",
        "",
        *(
            f"- {name}: `{value}`" if name == "command" and "`" not in value else f"- {name}: {marked(value)}"
            for name, value in setting(results).items()
        ),
    ]
    return "\n".join(lines) + "\n"


# The page

PAGE_STYLE = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); \
font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 60px; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 6px; text-wrap: balance; }
h2 { font-size: 1.05rem; margin: 0 0 8px; }
.lead { color: var(--muted); margin: 0 0 20px; }
section { margin-top: 20px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 16px; min-width: 0; }
.verdict { display: grid; gap: 12px; padding: 0; margin: 0; list-style: none; }
.verdict li { border-left: 4px solid var(--a); }
.verdict li:nth-child(2) { border-left-color: var(--c); }
.verdict li:nth-child(3) { border-left-color: var(--b); }
.alarm { border: 2px solid var(--alarm); color: var(--alarm); font-weight: 600; margin-bottom: 12px; }
.charts figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
.charts { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 520px; height: auto; margin: 0 auto; font-family: inherit; }
figcaption, .small { color: var(--muted); font-size: .85rem; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: 6px 8px; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
data { white-space: nowrap; } small { display: block; color: var(--muted); white-space: nowrap; }
tbody th { color: var(--ink); font-weight: 600; vertical-align: middle; }
.bad { color: var(--alarm); font-weight: 600; }
.scroll { overflow-x: auto; }
code { overflow-wrap: anywhere; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
ul { padding-left: 20px; margin: 0; } li + li { margin-top: 6px; } .verdict li + li { margin-top: 0; }
summary { cursor: pointer; font-weight: 600; }
@media (min-width: 860px) { .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); } \
.verdict { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
@media (max-width: 859px) {
  .rows thead { display: none; }
  .rows tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line); }
  .rows tbody th { display: block; border: 0; padding: 0 0 4px; font-size: 1rem; text-align: left; }
  .rows td { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 8px; border: 0; \
padding: 2px 0; text-align: right; }
  .rows td::before { content: attr(data-heading); color: var(--muted); text-align: left; }
  .rows small { display: inline; }
}
"""


def escaped(value: Any) -> str:
    """A value from a file or a recipe, such as a config's name or a run's message, escaped for HTML."""
    return html.escape(str(value))


def page_style() -> str:
    extra = ({"ground": "#f5f5f3", "alarm": "#b3261e"}, {"ground": "#121316", "alarm": "#ff8a80"})
    light, dark = (
        "; ".join(f"--{name}: {value}" for name, value in (palette | more).items())
        for palette, more in zip((charts.LIGHT, charts.DARK), extra, strict=True)
    )
    return PAGE_STYLE.replace("LIGHT", light).replace("DARK", dark)


def figure_of(row: Row, column: str, kind: str) -> str:
    """A number as an HTML element that names the row and the column of results.csv from which the number comes."""
    if row.get(column) is None:
        return "-"
    return (
        f'<data data-row="{escaped(row["config"])}:{escaped(row["ranks"])}" data-column="{escaped(column)}"'
        f' value="{escaped(row[column])}">{escaped(written(row[column], kind))}</data>'
    )


def sentence_html(sentence: Sentence, kinds: dict[str, str]) -> str:
    return "".join(escaped(part) if isinstance(part, str) else figure_of(*part, kinds[part[1]]) for part in sentence)


def row_html(results: Results, row: Row) -> str:
    kinds = kinds_of(results)
    parts = [f"<tr><th>{escaped(row['config'])}</th>"]
    if len(results.spec["ranks"]) > 1:
        parts.append(f'<td data-heading="ranks">{figure_of(row, "ranks", "count")}</td>')
    if row["failed"]:
        parts.append(f'<td class="bad" colspan="{len(table_of(results))}">failed: {escaped(row["failed"])}</td>')
    else:
        for heading, (name, *others) in table_of(results).items():
            more = (
                f"<small>({' - '.join(figure_of(row, other, kinds[other]) for other in others)})</small>"
                if others
                else ""
            )
            css = "bad" if name == "loss_difference" and row["loss_left_at_step"] is not None else ""
            parts.append(
                f'<td data-heading="{escaped(heading)}" class="{css}">'
                f"<span>{figure_of(row, name, kinds[name])} {more}</span></td>"
            )
    return "".join([*parts, "</tr>"])


def alarms(results: Results) -> str:
    kinds = kinds_of(results)
    found = []
    for row in results.good():
        if row["loss_left_at_step"] is not None:
            sentence: Sentence = [
                f"{case_name(row, results)} left the path of the losses at step ",
                (row, "loss_left_at_step"),
                ": the largest relative difference is ",
                (row, "loss_difference"),
                ", more than rounding explains. Do not trust its figures.",
            ]
            found.append(f'<p class="card alarm">{sentence_html(sentence, kinds)}</p>')
    return "".join(found)


def paired_html(results: Results, other: Results) -> str:
    kinds, abouts = kinds_of(results), {column.name: column.about for column in results.columns()}
    rows = []
    for entry in paired_figures(results, other):
        key, kind = escaped(f"{entry['config']}:{entry['ranks']}:{entry['column']}"), kinds[entry["column"]]
        old, new = (
            f'<data data-with="{key}:{which}">{escaped(written(entry[which], kind))}</data>' for which in ("old", "new")
        )
        which, kind = ("ratio", "ratio") if entry["ratio"] is not None else ("loss_difference", "small")
        change = f'<data data-with="{key}:{which}">{escaped(written(entry[which], kind))}</data>'
        name = (
            escaped(f"{entry['config']}, {entry['ranks']}")
            if len(results.spec["ranks"]) > 1
            else escaped(entry["config"])
        )
        rows.append(
            f"<tr><th>{name}</th><td>{escaped(abouts[entry['column']])}</td>"
            f"<td>{old}</td><td>{new}</td><td>{change}</td></tr>"
        )
    differs = "".join(f"<li>{escaped(line)}</li>" for line in what_differs(results, other))
    return (
        f'<section class="card"><h2>Beside {escaped(other.folder.name)}</h2><ul class="small">{differs}</ul>'
        '<div class="scroll"><table><thead><tr><th>config</th><th></th>'
        "<th>then</th><th>now</th><th>ratio, or loss difference</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def everything_html(results: Results) -> str:
    """All columns of results.csv, each on a line."""
    rows = results.good()
    head = "".join(f"<th>{escaped(case_name(row, results))}</th>" for row in rows)
    lines = []
    for column in results.columns():
        if column.name not in ("config", "failed") and any(row.get(column.name) is not None for row in rows):
            values = "".join(f"<td>{figure_of(row, column.name, column.kind)}</td>" for row in rows)
            lines.append(f"<tr><td>{escaped(column.about)}</td>{values}</tr>")
    return (
        '<details class="card"><summary>All figures (results.csv)</summary><div class="scroll"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def as_html(results: Results, other: Results | None) -> str:
    kinds = kinds_of(results)
    facts = setting(results)
    title = title_of(results)
    verdict = "".join(f'<li class="card">{sentence_html(sentence, kinds)}</li>' for sentence in sentences(results))
    figures = "".join(
        f'<figure class="card" id="chart-{name}"><h2>{escaped(chart[0])}</h2>{charts.inline_svg(results, name, chart)}'
        f"<figcaption>{escaped(CAPTIONS[name])}</figcaption></figure>"
        for name, chart in charts.charts_of(results).items()
    )
    headings = "".join(
        f"<th>{escaped(heading)}</th>"
        for heading in [*(["ranks"] if len(results.spec["ranks"]) > 1 else []), *table_of(results)]
    )
    notes = "".join(f"<li>{escaped(what)}: {escaped(why)}</li>" for what, why in note_lines(results))
    differences = (
        f'<section class="card"><h2>Where it differs from the ZeRO paper, and why</h2><ul>{notes}</ul></section>'
        if notes
        else ""
    )

    made = "".join(
        f"<dt>{escaped(name)}</dt><dd>{f'<code>{escaped(value)}</code>' if name == 'command' else escaped(value)}</dd>"
        for name, value in facts.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title><style>{page_style()}</style></head>
<body><main>
<h1>{escaped(title)}</h1>
<p class="lead">{escaped(facts["recipe"])}. {escaped(facts["machine"])}. {escaped(results.spec["created"])}.</p>
{alarms(results)}
<ol class="verdict">{verdict}</ol>
<section class="card"><h2>What each costs and gives</h2><div class="scroll"><table class="rows">\
<thead><tr><th>config</th>{headings}</tr></thead>
<tbody>{"".join(row_html(results, row) for row in results.rows)}</tbody></table></div>
<p class="small">Losses, memory and time of every config were measured in processes of their own. \
A ratio is over the first config's time on as many ranks, step by step; in brackets, the rounds that were lowest and \
highest. The loss is held against the first config on as many ranks; over ranks, against the same config on the first \
number of ranks.</p></section>
<section class="charts">{figures}</section>
{paired_html(results, other) if other is not None else ""}
{differences}
<section>{everything_html(results)}</section>
<section class="card"><h2>How it was made</h2><dl>{made}</dl></section>
</main></body></html>
"""


def as_csv(results: Results) -> str:
    columns = [column.name for column in results.columns()]
    return to_csv(columns, [[row.get(name) for name in columns] for row in results.rows])


def to_csv(header: list[str], rows: list[list[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return file.getvalue()


def write(results: Results, other: Results | None) -> None:
    """Write the report into the comparison's folder."""
    folder = results.folder
    files = {
        "results.csv": as_csv(results),
        "report.md": as_markdown(results, other),
        "report.html": as_html(results, other),
    }
    if other is not None:
        names = ["config", "ranks", "column", "old", "new", "ratio", "loss_difference"]
        files["with.csv"] = to_csv(
            names, [[entry.get(name) for name in names] for entry in paired_figures(results, other)]
        )
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    drawn = folder / "charts"
    drawn.mkdir(exist_ok=True)
    for name, chart in charts.charts_of(results).items():
        figure = charts.draw(results, chart, charts.LIGHT, titled=True)
        figure.savefig(drawn / f"{name}.png", dpi=200)
        (drawn / f"{name}.svg").write_text(charts.svg(figure), encoding="utf-8")
    if results.good():
        for name, palette in (("overview", charts.LIGHT), ("overview-dark", charts.DARK)):
            charts.overview(results, palette).savefig(drawn / f"{name}.png", dpi=160)
