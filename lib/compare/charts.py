"""The charts of a comparison, drawn by matplotlib. Each is a function that draws into a figure, in a palette's colors.

Every number in a chart is a value of results.csv, and its SVG group has the id <chart>:<config>:<ranks>:<column>.
"""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.compare import theory
from lib.compare.results import BYTE_UNITS, PHASES, TOLERANCE, TRAFFIC, Results, Row, case_name, written

matplotlib.use("agg")

Palette = dict[str, str]
LIGHT = {
    "ink": "#1c1d21", "muted": "#6d6f78", "line": "#dddee3", "paper": "#ffffff",
    "a": "#3567b0", "b": "#e09b2d", "c": "#2f9482", "d": "#a3568f", "e": "#8a8f3c", "f": "#c2543d",
}  # fmt: skip
DARK = {
    "ink": "#e9e9ec", "muted": "#a0a2ab", "line": "#3a3b42", "paper": "#1b1c20",
    "a": "#7aa7e8", "b": "#edb95c", "c": "#5cc2ae", "d": "#d08bbe", "e": "#bcc16a", "f": "#e8826c",
}  # fmt: skip
# Stand-ins for colors in an SVG inside a page. inline_svg replaces them by the page's CSS variables, so that a chart
# follows the page's light or dark scheme.
CSS = {name: f"#ab00{number:02x}" for number, name in enumerate(LIGHT)}
SERIES = ("a", "b", "c", "d", "e", "f")
PART_NAMES = {"parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer states"}
PHASE_NAMES = {
    "forward": "forward, loss",
    "backward": "backward",
    "waiting": "other stages",
    "optimizer": "optimizer step",
    "data": "waiting for data",
    "other": "other",
}
WIDTH = 4.7  # inches: readable at the width of a phone, and narrow enough for two charts in a row on a screen

STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "compare",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": ["DejaVu Sans"],
}


def unit_of(largest: float) -> tuple[float, str]:
    return next(((size, name) for size, name in BYTE_UNITS if largest >= size), (1, "B"))


def style_axes(axes: Any, palette: Palette) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=palette["muted"], length=0)
    axes.xaxis.label.set_color(palette["muted"])
    axes.yaxis.label.set_color(palette["muted"])
    for spine in axes.spines.values():
        spine.set_color(palette["line"])
    axes.set_axisbelow(True)


def literal(text: str) -> str:
    """The text, escaped so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def legend(figure: Figure, handles: dict[str, Any], palette: Palette, columns: int) -> None:
    options = {"frameon": False, "labelcolor": palette["ink"], "handlelength": 1.1, "columnspacing": 1.2, "fontsize": 8}
    figure.legend(handles.values(), map(literal, handles), loc="outside lower left", ncols=columns, **options)


def write_number(
    axes: Any, point: tuple[float, float], chart: str, row: Row, *, column: str, kind: str, palette: Palette
) -> Any:
    """Write a value of a row to the right of a point, with an SVG id that tells the row and the column."""
    box = {"facecolor": palette["paper"], "edgecolor": "none", "pad": 1}
    return axes.annotate(
        written(row[column], kind),
        point,
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=palette["ink"],
        bbox=box,
        gid=f"{chart}:{row['config']}:{row['ranks']}:{column}",
    )


def stacked_bars(
    figure: Figure,
    results: Results,
    palette: Palette,
    chart: str,
    *,
    parts: list[tuple[str, str, list[tuple[str, bool]]]],
    label: str,
    kind: str,
    theory_columns: tuple[str, str] | None,
    x_label: str,
) -> None:
    """One horizontal bar for each row.

    parts: (name, color, [(column, whether it is drawn pale)]) of each part of a bar.
    label: the column whose value stands at the end of a bar; kind: the kind of this column and of the parts' columns.
    theory_columns: the columns drawn as a solid and a dotted line.
    """
    rows = results.good()
    size, unit = (1.0, "ms") if kind == "ms" else unit_of(max([row[label] for row in rows], default=1))
    axes = figure.add_subplot()
    style_axes(axes, palette)
    used: dict[str, Any] = {}
    ends = []
    for y, row in enumerate(rows):
        left = 0.0
        for name, color, columns in parts:
            for column, pale in columns:
                value = (row[column] or 0) / size
                if value > 0:
                    axes.barh(
                        y, value, left=left, height=0.62, color=palette[color], alpha=0.5 if pale else 1, linewidth=0
                    )
                    used[name] = Patch(color=palette[color])
                    if pale:
                        used["in host memory"] = Patch(color=palette["muted"], alpha=0.5)
                left += value
        end = left
        if theory_columns:
            styles: list[Any] = ["-", ":"]
            for column, style, name in zip(
                theory_columns, styles, ("this config, by theory", "ZeRO paper"), strict=True
            ):
                value = row[column] / size
                axes.plot([value, value], [y - 0.42, y + 0.42], color=palette["ink"], linestyle=style, linewidth=1.6)
                used[name] = Line2D([], [], color=palette["ink"], linestyle=style, linewidth=1.6)
                end = max(end, value)
        # The number stands at the end of the bar, even where a line is drawn beyond it.
        write_number(axes, (left, y), chart, row, column=label, kind=kind, palette=palette)
        ends.append(end)
    axes.set_yticks(range(len(rows)), [literal(case_name(row, results)) for row in rows], color=palette["ink"])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max([*ends, 1e-9]))
    axes.set_xlabel(f"{x_label}, {unit}")
    axes.xaxis.grid(True, color=palette["line"], linewidth=0.7)
    axes.spines["bottom"].set_visible(False)
    legend(figure, used, palette, 3)


def memory(figure: Figure, results: Results, palette: Palette) -> None:
    parts = [
        (PART_NAMES[kind], color, [(f"{kind}_device_bytes", False), (f"{kind}_host_bytes", True)])
        for kind, color in zip(theory.KINDS, SERIES, strict=False)
    ]
    stacked_bars(
        figure,
        results,
        palette,
        "memory",
        parts=parts,
        label="states_bytes",
        kind="bytes",
        theory_columns=("states_theory_bytes", "states_paper_bytes"),
        x_label="model states on a rank",
    )


def traffic(figure: Figure, results: Results, palette: Palette) -> None:
    parts = [
        (name, color, [(f"{kind}_bytes", False)])
        for (kind, name), color in zip(TRAFFIC.items(), ("d", "b", "f", "c", "a", "e"), strict=True)
    ]
    stacked_bars(
        figure,
        results,
        palette,
        "traffic",
        parts=parts,
        label="traffic_bytes",
        kind="bytes",
        theory_columns=("traffic_theory_bytes", "traffic_paper_bytes"),
        x_label="sent by a rank in a step",
    )


def step_time(figure: Figure, results: Results, palette: Palette) -> None:
    parts = [
        (PHASE_NAMES[phase], color, [(f"{phase}_ms", False)])
        for phase, color in zip(PHASES, ("a", "c", "d", "b", "f", "e"), strict=True)
        if phase != "waiting" or any(row["waiting_ms"] for row in results.good())
    ]
    stacked_bars(
        figure,
        results,
        palette,
        "step",
        parts=parts,
        label="step_ms",
        kind="ms",
        theory_columns=None,
        x_label="mean of each phase; the number is the median step",
    )


def speed(figure: Figure, results: Results, palette: Palette) -> None:
    """Throughput against peak memory."""
    column = results.peak
    size, unit = unit_of(max(row[column] for row in results.good()))
    axes = figure.add_subplot()
    style_axes(axes, palette)
    handles: dict[str, Any] = {}
    for number, config in enumerate(results.spec["configs"]):
        rows = [row for row in results.good() if row["config"] == config]
        color = palette[SERIES[number % len(SERIES)]]
        if rows:
            axes.plot(
                [row[column] / size for row in rows],
                [row["tokens_per_second"] for row in rows],
                "o-",
                color=color,
                markersize=9,
                alpha=0.85,
                linewidth=1,
            )
            handles[config] = Line2D([], [], color=color, marker="o", linewidth=0)
    axes.set_xlim(0, 1.08 * max(row[column] for row in results.good()) / size)
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.set_xlabel(f"peak memory of a rank's {'device' if results.on_gpu else 'process'}, {unit}")
    axes.set_ylabel("tokens/s, all ranks")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(True, color=palette["line"], linewidth=0.7)
    legend(figure, handles, palette, 3)


def losses(figure: Figure, results: Results, palette: Palette) -> None:
    """The loss curves on top of each other, and below them each curve's distance from the first."""
    rows = results.good()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    tolerance = TOLERANCE[results.spec["precision"]]
    handles: dict[str, Any] = {}
    configs, counts = list(results.spec["configs"]), list(results.spec["ranks"])
    for number, row in enumerate(rows):
        values = results.losses[row["config"], row["ranks"]]
        first = results.first_on_as_many_ranks(row)
        color = palette[SERIES[configs.index(row["config"]) % len(SERIES)]]
        style: Any = ("-", "--", ":", "-.")[counts.index(row["ranks"]) % 4]
        # Each curve is narrower than the one below it, so that all can be seen where they coincide.
        above.plot(
            range(1, len(values) + 1),
            values,
            color=color,
            linestyle=style,
            linewidth=max(1.2, 6.5 - 5.3 * number / max(1, len(rows) - 1)),
        )
        if row is not first:
            floor = [max(value, 1e-9) for value in results.loss_differences(row, first)]
            below.plot(
                range(1, len(values) + 1),
                floor,
                color=color,
                linestyle=style,
                linewidth=1.2,
                marker="." if len(values) < 60 else None,
                markersize=4,
            )
        handles[case_name(row, results)] = Line2D([], [], color=color, linestyle=style, linewidth=2)
    below.axhline(tolerance, color=palette["f"], linestyle="--", linewidth=1)
    below.annotate(
        f"rounding ends: {tolerance:.0e}",
        (1, tolerance),
        xytext=(2, 3),
        textcoords="offset points",
        color=palette["f"],
        fontsize=8,
    )
    below.set_yscale("log")
    below.set_ylim(
        7e-10,
        max(20 * tolerance, 2 * max([row["loss_difference"] for row in rows if math.isfinite(row["loss_difference"])])),
    )
    below.set_ylabel("rel. difference")
    below.set_xlabel("optimizer step")
    above.set_ylabel("training loss")
    for axes in (above, below):
        style_axes(axes, palette)
        axes.yaxis.grid(True, color=palette["line"], linewidth=0.7)
    legend(figure, handles, palette, 3)


def scaling(figure: Figure, results: Results, palette: Palette) -> None:
    """Throughput over the number of ranks, and what it would be if each rank added as much as the first."""
    axes = figure.add_subplot()
    style_axes(axes, palette)
    counts = results.spec["ranks"]
    handles: dict[str, Any] = {}
    for number, config in enumerate(results.spec["configs"]):
        rows = [row for row in results.good() if row["config"] == config]
        if len(rows) < 2:
            continue
        color = palette[SERIES[number % len(SERIES)]]
        axes.plot(
            [row["ranks"] for row in rows],
            [row["tokens_per_second"] for row in rows],
            "o-",
            color=color,
            linewidth=1.6,
            markersize=5,
        )
        if not handles:
            tokens_per_rank = rows[0]["tokens_per_second"] / rows[0]["ranks"]
            axes.plot(
                [counts[0], counts[-1]],
                [tokens_per_rank * counts[0], tokens_per_rank * counts[-1]],
                color=palette["muted"],
                linestyle=":",
                linewidth=1.4,
            )
            handles[f"{config}, if it scaled perfectly"] = Line2D([], [], color=palette["muted"], linestyle=":")
        handles[config] = Line2D([], [], color=color, linewidth=2.5)
    axes.set_xticks(counts)
    axes.set_ylim(0)
    axes.set_xlabel("ranks")
    axes.set_ylabel("tokens/s, all ranks")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.grid(True, color=palette["line"], linewidth=0.7)
    legend(figure, handles, palette, 2)


Chart = tuple[str, Callable[[Figure, Results, Palette], None], float]  # (title, function that draws, height in inches)


def charts_of(results: Results) -> dict[str, Chart]:
    """{file name: chart} of the charts for which the results have values."""
    count = len(results.good())
    if not count:
        return {}
    bars = 1.35 + 0.33 * count
    found: dict[str, Chart] = {
        "memory": ("Model states on a rank", memory, bars),
        "speed": ("Throughput against memory", speed, 3.0),
        "step_time": ("Where a step's time goes", step_time, bars),
        "losses": ("Losses", losses, 3.6),
    }
    if any(row["traffic_bytes"] for row in results.good()):
        found["traffic"] = ("Traffic", traffic, bars)
    if len(results.spec["ranks"]) > 1:
        found["scaling"] = ("Scaling over ranks", scaling, 3.2)
    return found


def draw(results: Results, chart: Chart, palette: Palette, titled: bool) -> Figure:
    title, draw_into, height = chart
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH, height + (0.3 if titled else 0)),
            layout="constrained",
            facecolor=palette["paper"] if titled else "none",
        )
        if titled:
            figure.suptitle(title, x=0.02, ha="left", color=palette["ink"], fontsize=11, fontweight="bold")
        draw_into(figure, results, palette)
    return figure


def svg(figure: Figure) -> str:
    with matplotlib.rc_context(STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def inline_svg(results: Results, name: str, chart: Chart) -> str:
    """An <svg> element for a page. Its colors are variables of the page, and its ids differ from other charts' ids."""
    text = svg(draw(results, chart, CSS, titled=False))
    text = text[text.index("<svg") :]
    for color, value in CSS.items():
        text = text.replace(value, f"var(--{color})")
    text = re.sub(r'id="(?!\w+:)([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)([^")]+)', rf"\g<1>{name}-\2", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return (
        text.replace("<svg", f'<svg role="img" aria-label="{chart[0]}"', 1)
        .replace("'DejaVu Sans'", "inherit")
        .replace("DejaVu Sans", "inherit")
    )


def overview(results: Results, palette: Palette) -> Figure:
    """The three charts that say most in a row, for a README."""
    found = charts_of(results)
    names = [name for name in ("memory", "speed", "traffic") if name in found]
    with matplotlib.rc_context(STYLE):
        height = max(found[name][2] for name in names) + 0.2
        figure = Figure(figsize=(WIDTH * len(names), height), layout="constrained", facecolor=palette["paper"])
        panels = figure.subfigures(1, len(names), squeeze=False, wspace=0.03)[0]
        for panel, name in zip(panels, names, strict=True):
            panel.set_facecolor(palette["paper"])
            panel.suptitle(found[name][0], x=0.02, ha="left", color=palette["ink"], fontsize=11, fontweight="bold")
            found[name][1](panel, results, palette)
    return figure
