"""The results on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.contenders import ALL
from bench.results import STOLEN_LIMIT, Results
from bench.rows import BY_NAME, IOPS
from bench.targets import TARGETS, Target

RATIOS = (("ukai", "glusterfs"), ("ukai-flush", "moosefs"), ("ukai", "binding"))


def figure(value: float | None, unit: str = "") -> str:
    """A number as people read it."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def repeats(results: Results) -> str:
    """What the host did to the samples, in a sentence."""
    again, kept = results.repeated()
    limit = f"{STOLEN_LIMIT * 100:g} % of the cores' time"
    return f"Samples measured again, since the host took more than {limit}: {again}; kept though it took more: {kept}."


def show(results: Results, console: Console) -> None:
    """All tables."""
    _show_about(results, console)
    for table in (main_table(results), latency_table(results), process_table(results), other_table(results)):
        if table.row_count:
            console.print(table)
    console.print(repeats(results), highlight=False)
    if results.failures:
        console.print("[bold]Could not be run:[/bold]")
        for line in results.failures:
            console.print(f"  {line}", markup=False)
    console.print(target_table(results))


def _show_about(results: Results, console: Console) -> None:
    about = results.about
    keys = ("date", "kernel", "python", "fio", "cores", "memory_gb", "load", "settings")
    for key in keys:
        console.print(f"{key}: {about.get(key, '')}", markup=False, highlight=False)
    for part in ("systems", "commands"):
        for name, text in about.get(part, {}).items():
            console.print(f"{name}: {text}", markup=False, highlight=False)


def main_table(results: Results) -> Table:
    """Medians of each system, and the ratios that are wanted."""
    systems = results.systems(ALL)
    ratios = [(a, b) for a, b in RATIOS if a in systems and b in systems]
    table = Table(title="Medians (lowest–highest of the rounds)")
    table.add_column("row")
    for name in systems:
        table.add_column(name, justify="right")
    for ours, theirs in ratios:
        table.add_column(f"{ours} / {theirs}", justify="right")
    for row in ALL:
        if not any(results.of(name, row) for name in systems):
            continue
        cells = []
        for name in systems:
            cell = figure(results.median(name, row))
            spread = results.spread(name, row)
            if spread is not None and len(results.of(name, row)) > 1:
                cell += f"\n({figure(spread[0])}–{figure(spread[1])})"
            cells.append(cell)
        cells += [figure(results.ratio(ours, theirs, row)) for ours, theirs in ratios]
        title = BY_NAME[row].title
        table.add_row(title if BY_NAME[row].unit == IOPS else f"{title}, MB/s", *cells)
    return table


def latency_table(results: Results) -> Table:
    """p50 and p99 of a request in µs."""
    systems = results.systems(ALL)
    table = Table(title="Latency p50 / p99, µs")
    table.add_column("row")
    for name in systems:
        table.add_column(name, justify="right")
    for row in ALL:
        cells = []
        for name in systems:
            p50, p99 = results.median(name, row, "p50_us"), results.median(name, row, "p99_us")
            cells.append("–" if p50 is None else f"{figure(p50)} / {figure(p99)}")
        if any(cell != "–" for cell in cells):
            table.add_row(BY_NAME[row].title, *cells)
    return table


def process_table(results: Results) -> Table:
    """Processor time and memory, added up over each system, and by process."""
    table = Table(title="Cores in use (peak MB resident)")
    for title in ("row", "system"):
        table.add_column(title)
    table.add_column("cores", justify="right")
    table.add_column("µs of a core per request", justify="right")
    table.add_column("processes")
    for row in ALL:
        for system in results.systems([row]):
            processes = results.processes(system, row)
            if not processes:
                continue
            total = sum(cores for cores, _ in processes.values())
            iops = results.median(system, row, "iops")
            ordered = sorted(processes.items(), key=lambda item: -item[1][0])
            shown = ", ".join(f"{name} {cores:.2f} ({peak:.0f})" for name, (cores, peak) in ordered if cores >= 0.005)
            table.add_row(row, system, f"{total:.2f}", figure(total * 1e6 / iops if iops else None), shown)
    return table


def other_table(results: Results) -> Table:
    """Everything else."""
    table = Table(title="Other figures")
    for title in ("system", "what"):
        table.add_column(title)
    table.add_column("median", justify="right")
    table.add_column("p99, µs", justify="right")
    seen = dict.fromkeys((s.system, s.row, s.unit) for s in results.samples if s.row not in ALL)
    for system, row, unit in seen:
        p99 = results.median(system, row, "p99_us")
        table.add_row(system, row, figure(results.median(system, row), unit), figure(p99) if p99 else "")
    return table


def verdict(target: Target, results: Results) -> tuple[str, str]:
    """(what was reached, pass or FAIL)."""
    reached = target.value(results)
    if reached is None:
        return "–", "not measured"
    return figure(reached) + ("×" if target.base else ""), "pass" if target.met(reached) else "FAIL"


def target_table(results: Results) -> Table:
    table = Table(title="Targets")
    table.add_column("what")
    for title in ("wanted", "reached"):
        table.add_column(title, justify="right")
    table.add_column("")
    for target in TARGETS:
        reached, judged = verdict(target, results)
        style = {"pass": "green", "FAIL": "bold red"}.get(judged, "dim")
        table.add_row(target.title, target.wanted, reached, f"[{style}]{judged}[/{style}]")
    return table
