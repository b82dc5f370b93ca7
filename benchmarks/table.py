"""The figures of a run as a table, and what they say about the targets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# One cell: rate per second, p50 and p99 in ms, the shares of a core that the load generator and
# strangers took; or, of idle clients, bytes per client.
Figure = Mapping[str, float]
Results = Mapping[str, Mapping[str, Figure]]

QUIET = 0.1  # a figure is not to be compared where strangers took more of a core than this

CAPTION = """\
Rates are messages delivered (or connects) per second, then p50/p99 in ms; idle is resident memory
per client. Ratios are ours to the peer's: of the rate (more is better), of p99 or of the memory
(less is better). Generator is the most that the load generator used of its core, strangers the most
that other processes used: over ten percent, a figure is noisy and not comparable."""


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio to Node: at least the bound where more is better, at most it where less is."""

    scenario: str
    figure: str
    bound: float

    def met_by(self, ratio: float) -> bool:
        return ratio >= self.bound if self.figure == "rate" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{self.scenario}, {self.figure}"


RATES = {"fan-out @1": 2.0, "fan-out @4": 4.5, "fan-out @16": 8.0, "echo": 1.2, "connects": 1.0}
TARGETS = (
    *(Target(scenario, "rate", bound) for scenario, bound in RATES.items()),
    *(Target(scenario, "p99", 1.0) for scenario in RATES),
    Target("idle", "bytes", 1.0),
)


def thousands(value: float) -> str:
    return f"{value / 1e3:.3g}k" if value < 1e6 else f"{value / 1e6:.3g}M"


def cell(figure: Figure | None) -> str:
    if figure is None:
        return "failed"
    if "bytes" in figure:
        return f"{figure['bytes'] / 1e3:.1f} kB"
    return f"{thousands(figure['rate'])}  {figure['p50']:.3g}/{figure['p99']:.3g}"


def strangers(figure: Figure) -> float:
    return figure.get("strangers", 0)


def is_quiet(figure: Figure) -> bool:
    return strangers(figure) <= QUIET


def ratios(ours: Figure | None, theirs: Figure | None) -> dict[str, float]:
    """Return ours to theirs for each figure that is compared."""
    names = ("rate", "p99", "bytes")
    if ours is None or theirs is None:
        return {}
    return {name: ours[name] / theirs[name] for name in names if theirs.get(name)}


def ratio_cell(ours: Figure | None, theirs: Figure | None) -> str:
    return "  ".join(f"{ratio:.3g}x" for ratio in ratios(ours, theirs).values()) or "-"


def most(name: str, figures: Iterable[Figure]) -> str:
    shares = [figure[name] for figure in figures if name in figure]
    return f"{max(shares):.0%}" if shares else "-"


def rows(results: Results, scenarios: list[str]) -> list[list[str]]:
    """Return the heading, a row for each peer and a row of ratios for each peer but ours."""
    table = [["server", *scenarios, "generator", "strangers"]]
    for peer, figures in results.items():
        cells = [cell(figures.get(scenario)) for scenario in scenarios]
        shares = [most(name, figures.values()) for name in ("generator", "strangers")]
        table.append([peer, *cells, *shares])
    if "ours" in results:
        ours = results["ours"]
        for peer, figures in results.items():
            if peer != "ours":
                cells = [ratio_cell(ours.get(name), figures.get(name)) for name in scenarios]
                table.append([f"ours / {peer}", *cells, "-", "-"])
    return table


def as_rst(results: Results, scenarios: list[str]) -> str:
    """Return a simple table, which reads as well in a terminal."""
    heading, *body = rows(results, scenarios)
    widths = [max(map(len, column)) for column in zip(heading, *body, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, *body)
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule, "", CAPTION, ""])


def verdicts(results: Results) -> list[str]:
    """Return one line for each target of which both figures were measured."""
    lines = []
    ours, node = results.get("ours", {}), results.get("node", {})
    for target in TARGETS:
        measured = ratios(ours.get(target.scenario), node.get(target.scenario))
        if (ratio := measured.get(target.figure)) is not None:
            figures = ours[target.scenario], node[target.scenario]
            word = "met" if target.met_by(ratio) else "MISSED"
            word = word if all(map(is_quiet, figures)) else "noisy"
            limit = "at least" if target.figure == "rate" else "at most"
            lines.append(
                f"{word:6}  {target!s:18} {ratio:5.2f}x Node, wanted {limit} {target.bound}x"
            )
    return lines
