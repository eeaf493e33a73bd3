"""Medians, ratios, judgements, and what is made of fio's report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bench import fio, page, picture, report
from bench.contenders import Contenders
from bench.results import Results, Sample
from bench.rows import BY_NAME, ROWS, Row, at_depth
from bench.run import PARTS, QUICK_ROWS, parse
from bench.targets import TARGETS, Target


def results(**values: list[float]) -> Results:
    """``system__row=[…]`` of each round."""
    samples = []
    for name, found in values.items():
        system, _, row = name.replace("_", "-").partition("--")
        samples += [Sample(system, row, value, "/s", n, p50_us=10 * n) for n, value in enumerate(found, 1)]
    return Results({"date": "today", "cores": 2}, samples)


def test_medians_ratios_and_spread() -> None:
    found = results(ukai__rand_read_1=[30.0, 10.0, 20.0], glusterfs__rand_read_1=[5.0, 4.0])
    assert found.median("ukai", "rand-read-1") == 20
    assert found.median("ukai", "rand-read-1", "p50_us") == 20
    assert found.spread("ukai", "rand-read-1") == (10, 30)
    assert found.ratio("ukai", "glusterfs", "rand-read-1") == pytest.approx(20 / 4.5)
    assert found.systems(["rand-read-1"]) == ["ukai", "glusterfs"]


def test_what_was_not_measured_is_none() -> None:
    found = results(ukai__rand_read_1=[30.0], glusterfs__rand_read_1=[0.0])
    assert found.median("moosefs", "rand-read-1") is None
    assert found.spread("moosefs", "rand-read-1") is None
    assert found.ratio("ukai", "moosefs", "rand-read-1") is None
    assert found.ratio("ukai", "glusterfs", "rand-read-1") is None


def test_processes_have_the_median_of_their_time_and_the_highest_peak() -> None:
    found = Results()
    for number, (cores, peak) in enumerate([(0.1, 50.0), (0.5, 80.0), (0.3, 60.0)], 1):
        found.samples.append(
            Sample("ukai", "rand-read-1", 1, "/s", number, cores={"blockd1": cores}, peak_mb={"blockd1": peak})
        )
    assert found.processes("ukai", "rand-read-1") == {"blockd1": (0.3, 80.0)}


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    before = results(ukai__seq_read=[1.5, 2.5])
    before.failures.append("moosefs: no")
    before.save(tmp_path / "deep" / "results.json")
    assert Results.load(tmp_path / "deep" / "results.json") == before
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["results.json"]


def test_results_of_before_steal_was_looked_at_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results(ukai__seq_read=[1.5]).save(file)
    raw = json.loads(file.read_text())
    for name in ("stolen", "attempts"):
        del raw["samples"][0][name]
    file.write_text(json.dumps(raw))
    (sample,) = Results.load(file).samples
    assert (sample.value, sample.stolen, sample.attempts) == (1.5, 0, 1)


def test_the_run_and_the_page_tell_what_was_measured_again() -> None:
    found = results(ukai__seq_read=[1.5])
    found.samples += [
        Sample("ukai", "seq-read", 1, "MB/s", 2, stolen=0.02, attempts=2),
        Sample("ukai", "seq-read", 1, "MB/s", 3, stolen=0.021, attempts=3),
        Sample("plain", "seq-read", 1, "MB/s", stolen=0.001, attempts=3),
    ]
    assert found.repeated() == (3, 1)
    told = "since the host took more than 2 % of the cores' time: 3; kept though it took more: 1."
    out = io.StringIO()
    report.show(found, Console(file=out, width=160))
    assert told in out.getvalue()
    (line,) = (line for line in page.markdown(found).splitlines() if line.startswith("Measured"))
    assert told in line


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("ukai", "rand-read-1", 3, "glusterfs"), ("3.5×", "pass")),
        (Target("ukai", "rand-read-1", 4, "glusterfs"), ("3.5×", "FAIL")),
        (Target("metad", "start", 3, at_most=True, unit="s"), ("2", "pass")),
        (Target("metad", "start", 1, at_most=True, unit="s"), ("2", "FAIL")),
        (Target("ukai", "seq-read", 1, "glusterfs"), ("–", "not measured")),
    ],
)
def test_verdicts(target: Target, expected: tuple[str, str]) -> None:
    found = results(ukai__rand_read_1=[700.0], glusterfs__rand_read_1=[200.0], metad__start=[2.0])
    assert report.verdict(target, found) == expected


def test_targets_name_rows_and_systems_that_exist(tmp_path: Path) -> None:
    systems = Contenders(tmp_path, Results()).table.keys()
    for target in TARGETS:
        if target.base:
            assert target.row in BY_NAME
            assert {target.system, target.base} <= systems
    assert len({(t.system, t.row, t.base) for t in TARGETS}) == len(TARGETS)
    assert set(QUICK_ROWS) <= BY_NAME.keys()


def job(**read: Any) -> dict[str, Any]:
    percentile = {"50.000000": 90_000, "99.000000": 400_000}
    side = {"total_ios": 100, "iops": 50.0, "bw_bytes": 3_000_000, "clat_ns": {"percentile": percentile}}
    return {"read": {**side, **read}, "write": {"total_ios": 0, "iops": 20.0}, "sync": {"lat_ns": {}}}


def test_outcome_of_a_job() -> None:
    assert fio.outcome(job(), BY_NAME["rand-read-1"]) == fio.Outcome(50.0, 90.0, 400.0, 70.0)
    assert fio.outcome(job(), BY_NAME["seq-read"]).value == 3.0


def test_a_job_without_a_request_is_an_error() -> None:
    with pytest.raises(fio.FioError, match="no request"):
        fio.outcome(job(total_ios=0), BY_NAME["rand-read-1"])


def test_every_row_has_its_options_once() -> None:
    for row in ROWS:
        line = fio.command(row, Path("/x"), 2**20, 2.5, 0.5)
        assert {"--direct=1", "--filename=/x", "--runtime=2500ms", "--ramp_time=500ms"} <= set(line)
        names = [word.partition("=")[0] for word in line]
        assert len(names) == len(set(names))
    assert [o for o in at_depth(BY_NAME["rand-read-1"], 8).options if "depth" in o] == ["--iodepth=8"]
    assert isinstance(at_depth(ROWS[0], 2), Row)


def test_the_command_line() -> None:
    usual = parse([], {})
    assert (usual.rounds, usual.minutes, usual.peers, usual.parts) == (5, 25, False, list(PARTS))
    quick = parse([], {"BENCH_QUICK": "1", "BENCH_PEERS": "0"})
    assert (quick.rounds, quick.peers, quick.rows) == (1, False, QUICK_ROWS)
    chosen = parse(["--rows", "seq-read", "--rounds", "2", "--systems", "ukai", "plain"], {"BENCH_PEERS": "1"})
    assert (chosen.rows, chosen.rounds, chosen.systems, chosen.peers) == (["seq-read"], 2, ["ukai", "plain"], True)


def test_report_and_picture_show_what_there_is() -> None:
    found = results(ukai__rand_read_1=[700.0, 800.0], glusterfs__rand_read_1=[200.0], resync__equal=[900.0])
    found.failures.append("moosefs: its setup: [no room]")
    out = io.StringIO()
    report.show(found, Console(file=out, width=160))
    for text in ("3.75", "700", "moosefs: its setup: [no room]", "900", "not measured", "pass"):
        assert text in out.getvalue()
    drawn = ElementTree.fromstring(picture.draw(found))
    words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "ukai rand-read-1 / glusterfs" in words
    assert "3.75×" in words
    assert not any("moosefs" in (word or "") for word in words)


def test_the_page_gets_new_figures_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n")
    for _ in range(2):
        page.update(results(ukai__rand_read_1=[700.0], glusterfs__rand_read_1=[200.0]), readme)
    text = readme.read_text()
    assert text.startswith("before\n\n<!-- figures")
    assert text.endswith("<!-- end of figures -->\n\nafter\n")
    assert "old" not in text
    assert text.count("| rand read 4 KiB qd1 | 700 | 200 |") == 1
    assert "| ukai rand-read-1 / glusterfs | ≥ 3× | 3.5× | pass |" in text
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no place"):
        page.update(Results(), readme)


def test_an_empty_run_can_be_shown() -> None:
    out = io.StringIO()
    report.show(Results(), Console(file=out, width=160))
    assert "not measured" in out.getvalue()
    ElementTree.fromstring(picture.draw(Results()))
