"""The figures as a part of README.md, between two marks.  Pure but for the files."""

from __future__ import annotations

from pathlib import Path

from bench import picture
from bench.contenders import ALL
from bench.report import figure, repeats, verdict
from bench.results import Results
from bench.rows import BY_NAME, IOPS
from bench.targets import TARGETS

PAGE = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- figures: written by --page -->", "<!-- end of figures -->"


def update(results: Results, page: Path = PAGE) -> None:
    """Put the figures into the page in place of the former ones, and the picture beside it.

    Raises ValueError where the page has no place for them.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the figures")
    page.write_text(f"{before}{BEGIN}\n\n{markdown(results)}\n{END}{after}")
    page.with_name("figures.svg").write_text(picture.draw(results))


def markdown(results: Results) -> str:
    """Everything that was measured."""
    about = results.about
    machine = f"{about.get('cores', '?')} cores, {about.get('memory_gb', '?')} GB, Linux {about.get('kernel', '?')}"
    parts = [
        "![Ratios](figures.svg)",
        f"Measured {about.get('date', '')}: {machine}, Python {about.get('python', '?')}, {about.get('fio', '')}; "
        f"load before it {about.get('load', 0):.1f}. Medians. {repeats(results)}",
        _rows(results),
        "Latency of a request, p50 / p99 in µs:",
        _latencies(results),
        "Cores in use, added up, and µs of a core per request:",
        _costs(results),
        "Targets:",
        _targets(results),
        "Everything else:",
        _others(results),
    ]
    if results.failures:
        parts += ["Could not be run:", "\n".join(f"- {line.splitlines()[0]}" for line in results.failures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(row: str) -> str:
    return BY_NAME[row].title + ("" if BY_NAME[row].unit == IOPS else ", MB/s")


def _rows(results: Results) -> str:
    systems = results.systems(ALL)
    rows = [[_title(row), *(figure(results.median(name, row)) for name in systems)] for row in ALL]
    return table(["", *systems], rows)


def _latencies(results: Results) -> str:
    systems = results.systems(ALL)
    rows = []
    for row in ALL:
        cells = [BY_NAME[row].title]
        for name in systems:
            p50, p99 = results.median(name, row, "p50_us"), results.median(name, row, "p99_us")
            cells.append("–" if p50 is None else f"{figure(p50)} / {figure(p99)}")
        rows.append(cells)
    return table(["", *systems], rows)


def _costs(results: Results) -> str:
    systems = [name for name in results.systems(ALL) if any(results.processes(name, row) for row in ALL)]
    rows = []
    for row in ALL:
        cells = [BY_NAME[row].title]
        for name in systems:
            cores = sum(busy for busy, _ in results.processes(name, row).values())
            iops = results.median(name, row, "iops")
            cells.append(f"{cores:.2f} / {figure(cores * 1e6 / iops)}" if iops else "–")
        rows.append(cells)
    return table(["", *systems], rows)


def _targets(results: Results) -> str:
    rows = [[target.title, target.wanted, *verdict(target, results)] for target in TARGETS]
    return table(["", "wanted", "reached", ""], rows)


def _others(results: Results) -> str:
    seen = dict.fromkeys((s.system, s.row, s.unit) for s in results.samples if s.row not in ALL)
    rows = []
    for system, row, unit in seen:
        p99 = results.median(system, row, "p99_us")
        rows.append([f"{system} {row}", figure(results.median(system, row), unit), figure(p99) if p99 else ""])
    return table(["", "median", "p99, µs"], rows)
