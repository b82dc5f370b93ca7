"""The report of a soak: tables and plots, in a directory of Markdown and SVG."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from tests.faults.gauges import Sample

Series = dict[str, list[tuple[float, float]]]
"""Points by the name of a line: minutes, and a value."""

Span = tuple[float, float, str]
"""From and until when, in minutes, and what happened."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 240, 70, 30
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")

GAUGES: dict[str, Callable[[Sample], float | None]] = {
    "RSS, MB": lambda sample: sample.rss / 1e6,
    "descriptors": lambda sample: sample.descriptors,
    "greenlets": lambda sample: sample.greenlets,
    "sessions": lambda sample: sample.sessions,
    "bytes queued, kB": lambda sample: sample.queued / 1e3,
    "hub lag, ms": lambda sample: sample.lag * 1e3,
}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [" | ".join(map(str, row)) for row in (head, ["---"] * len(head), *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def plot(title: str, series: Series, spans: Sequence[Span] = ()) -> str:
    """Return an SVG of lines over time; `spans` are shaded, and say what they are."""
    points = [point for line in series.values() for point in line] or [(0.0, 0.0)]
    end = max(x for x, _ in points) or 1.0
    top = max(y for _, y in points) * 1.05 or 1.0

    def x_of(minute: float) -> float:
        return _LEFT + minute / end * (_WIDTH - _LEFT - 10)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _BOTTOM - 30)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for since, until, name in spans:
        width = max(x_of(min(until, end)) - x_of(since), 1)
        parts.append(
            f'<rect x="{x_of(since):.1f}" y="30" width="{width:.1f}"'
            f' height="{_HEIGHT - _BOTTOM - 30}" fill="#ddd"><title>{escape(name)}</title></rect>'
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = x_of(end * share), y_of(top * share)
        parts += [
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 10}" y2="{y:.1f}" stroke="#eee"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * share:.4g}</text>',
            f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{end * share:.1f}</text>',
        ]
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}"/>',
            f'<text x="{_LEFT + 150 + 110 * number}" y="18" fill="{colour}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def write_plots(
    directory: Path, samples: dict[str, list[Sample]], began: float, spans: Sequence[Span]
) -> str:
    """Write a plot of each gauge, and return the Markdown that shows them."""
    shown = []
    for title, gauge in GAUGES.items():
        series: Series = {
            name: [
                ((sample.at - began) / 60, value)
                for sample in line
                if (value := gauge(sample)) is not None
            ]
            for name, line in samples.items()
        }
        name = title.split(",")[0].replace(" ", "-") + ".svg"
        (directory / name).write_text(plot(f"{title}, by minutes", series, spans))
        shown.append(f"![{title}]({name})\n")
    return "\n".join(shown)
