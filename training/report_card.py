"""A report card: scores with their intervals, one column or two, as a table and as a chart."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from training.files import atomic_write
from training.measurement import Score
from training.significance import holm, mcnemar_test, sign_flip_test

ALPHA = 0.05
COLORS = ("#1f77b4", "#d62728")
MANY_SUBJECTS = 12  # more of them would drown the chart: it shows their total only
GUESSING = "guessing"
LABELS = {
    "bits per byte": "bits per byte, the fewer the better (95 % interval)",
    "steps": "pieces of code run for a question (95 % interval)",
}
# Fonts that have Chinese characters, on the systems that bring one.
CHINESE_FONTS = ("Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei")
EXPLANATION = (
    "95 % intervals: Wilson's for rates, the bootstrap over texts for bits per byte and over items "
    "for steps. Rates: the more the better; replies that loop, bits per byte and steps: the fewer "
    "the better.\n"
)
COMPARISON = (
    "Both checkpoints had the same items. p: McNemar's exact test for rates, the paired sign-flip "
    "test for bits per byte and steps. So many tests find a difference by chance now and then, so "
    "the verdict goes by Holm's correction of p for all rows of the table.\n"
)


@dataclass
class Difference:
    """How a second checkpoint's score differs from the first's, and how surely."""

    first: Score
    second: Score
    p: float
    adjusted: float = 1.0

    @property
    def change(self) -> str:
        difference = self.second.value - self.first.value
        return f"{difference:+.3f}" if self.first.sizes else f"{100 * difference:+.1f} points"

    def verdict(self, name: str) -> str:
        """What can be said of `name`, the second checkpoint."""
        if self.p >= ALPHA:
            return "no difference shown"
        if self.adjusted >= ALPHA:
            return "no difference shown after Holm's correction"
        better = (self.second.value < self.first.value) == self.first.lower_is_better
        return f"{name} is {'better' if better else 'worse'}"


def compare(first: list[Score], second: list[Score], seed: int) -> dict[str, Difference]:
    """The differences by task, for the tasks that both checkpoints have."""
    others = {score.name: score for score in second}
    found = {}
    for a in first:
        if (b := others.get(a.name)) is not None:
            if a.sizes:
                changes = [y - x for x, y in zip(a.values, b.values, strict=True)]
                p = sign_flip_test(changes, seed)
            else:
                p = mcnemar_test(a.values, b.values)
            found[a.name] = Difference(a, b, p)
    adjusted = holm([difference.p for difference in found.values()])
    for difference, value in zip(found.values(), adjusted, strict=True):
        difference.adjusted = value
    return found


# ---- Table ---------------------------------------------------------------------------------------


def report_rows(columns: dict[str, list[Score]], seed: int) -> list[list[str]]:
    """Header and rows; `columns` are the scores of one checkpoint or of two, by name."""
    names = list(columns)
    by_name = [{score.name: score for score in scores} for scores in columns.values()]
    tasks = dict.fromkeys(name for scores in by_name for name in scores)
    header = ["task", "items"]
    for name in names:
        prefix = f"{name}: " if len(names) > 1 else ""
        header += [f"{prefix}score", "95 % interval"]
    header.append("chance")
    differences = compare(*columns.values(), seed) if len(names) > 1 else {}
    if len(names) > 1:
        header += ["difference", "p", "p (Holm)", "verdict"]
    rows = [header]
    for task in tasks:
        found = [scores.get(task) for scores in by_name]
        score = next(filter(None, found))
        row = [task, str(len(score.values))]
        for one in found:
            interval = [one.show(x) for x in one.interval(seed)] if one else []
            row += [one.show(one.value) if one else "–", " – ".join(interval)]
        row.append("" if score.chance is None else score.show(score.chance))
        if len(names) > 1:
            difference = differences.get(task)
            row += [
                difference.change, show_p(difference.p), show_p(difference.adjusted),
                difference.verdict(names[1]),
            ] if difference else ["", "", "", "not compared"]
        rows.append(row)
    return rows


def print_rows(rows: list[list[str]], title: str) -> None:
    """The table on the screen; of a comparison's columns only those that fit there."""
    kept = range(len(rows[0]))
    if "verdict" in rows[0]:
        kept = (0, 2, 4, 7, 9, 10)  # task, both scores, difference, p (Holm), verdict
    screen = Table(*(rows[0][i] for i in kept), title=title)
    for row in rows[1:]:
        screen.add_row(*(row[i] for i in kept))
    Console().print(screen)


def show_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def write_report(
    path: Path, rows: list[list[str]], names: Iterable[str], notes: Iterable[str], chart: str
) -> None:
    """The table as Markdown, with what it was measured on; nothing in it changes between runs.

    Args:
        notes: one line each.
        chart: the name of the picture beside the report.
    """
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    with atomic_write(path, "w") as file:
        file.write(f"# {' and '.join(names)}\n\n")
        file.writelines(f"- {note}\n" for note in notes)
        file.write("\n")
        for line in lines:
            file.write(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n")
        file.write(f"\n{EXPLANATION}")
        if "verdict" in rows[0]:
            file.write(f"\n{COMPARISON}")
        file.write(f"\n![the scores with their intervals]({chart})\n")


# ---- Chart ---------------------------------------------------------------------------------------


def draw_chart(columns: dict[str, list[Score]], seed: int, path: Path) -> None:
    """Rates beside their chance, and bits per byte, each with its interval, as a PNG."""
    import matplotlib  # here, for it takes a second to load
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    subjects = {s.name for scores in columns.values() for s in scores if ": " in s.name}
    subjects -= {name for name in subjects if name.endswith(": total")}
    exams = {name for name in subjects if not name.startswith("bits per byte")}
    hidden = exams if len(exams) > MANY_SUBJECTS else set()
    panels = []
    for unit in ("rate", *LABELS):
        names = dict.fromkeys(
            score.name for scores in columns.values() for score in scores
            if score.unit == unit and score.name not in hidden
        )
        if names:
            panels.append((list(names), unit))
    heights = [len(names) + 1.5 for names, _ in panels]
    fonts = [font for font in CHINESE_FONTS if font in get_font_names()]
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *fonts], "font.size": 9}):
        figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.5), layout="constrained")
        all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (names, unit) in zip(all_axes, panels, strict=True):
            draw_panel(axes, columns, names, unit, seed)
        labels = dict(zip(*reversed(all_axes[0].get_legend_handles_labels()), strict=True))
        order = sorted(labels, key=lambda label: label == GUESSING)  # after the checkpoints
        figure.legend(
            [labels[label] for label in order], order, loc="outside upper center", ncols=3,
            frameon=False,
        )
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120)


def draw_panel(
    axes, columns: dict[str, list[Score]], names: list[str], unit: str, seed: int
) -> None:
    """One row per task, from the top; a dot for each checkpoint's score."""
    scale = 100 if unit == "rate" else 1
    for number, (checkpoint, scores) in enumerate(columns.items()):
        shift = 0.28 * (number - (len(columns) - 1) / 2)
        mine = [score for score in scores if score.name in names]
        x = [scale * score.value for score in mine]
        y = [names.index(score.name) + shift for score in mine]
        ends = [[scale * end for end in score.interval(seed)] for score in mine]
        errors = [[abs(v - e[side]) for v, e in zip(x, ends, strict=True)] for side in (0, 1)]
        axes.errorbar(
            x, y, xerr=errors, fmt="o", color=COLORS[number], markersize=4.5, elinewidth=1.6,
            capsize=2.5, label=checkpoint,
        )
        if len(columns) == 1:  # two dots in a row leave no room for figures
            for value, place, score in zip(x, y, mine, strict=True):
                axes.annotate(
                    score.show(score.value).rstrip("%"), (value, place), (0, 4),
                    textcoords="offset points", ha="center", fontsize=6.5, color=COLORS[number],
                    bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}, zorder=1.5,
                )
    chances = {
        score.name: scale * score.chance for scores in columns.values() for score in scores
        if score.name in names and score.chance is not None
    }
    if chances:
        axes.plot(
            list(chances.values()), [names.index(name) for name in chances], "|", color="#444444",
            markersize=13, markeredgewidth=1.6, label=GUESSING, zorder=1,
        )
    axes.set_yticks(range(len(names)), [name.removeprefix("bits per byte: ") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if unit == "rate":
        axes.set(xlim=(-2, 102), xlabel="% of the items (95 % interval)")
    else:
        axes.set(xlabel=LABELS[unit])
        axes.set_xlim(left=0)
