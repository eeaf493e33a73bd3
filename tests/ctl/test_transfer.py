"""image import and image export with the real qemu-img and a directory in the mount's place."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ctl.conftest import Run
from tests.ctl.fake_metad import IMAGE, SUMMARY, FakeMetad, replica

MIB = 2**20
SIZE = 8 * MIB
SIZES = {"size": SIZE, "block_size": MIB, "blocks": 8, "open": {}}


def placement(generation: int) -> list[dict[str, Any]]:
    return [{"first": 0, "last": 7, "replicas": {"127.0.0.1": replica(0, generation=generation)}}]


@pytest.fixture
def mount(metad: FakeMetad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that holds image01: 8 MiB of ones, written before."""
    directory = tmp_path / "mount"
    directory.mkdir()
    (directory / "image01").write_bytes(b"\1" * SIZE)
    monkeypatch.setenv("UKAI_MOUNT_POINT", str(directory))
    monkeypatch.setenv("UKAI_NODE_ADDRESS", "127.0.0.1")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == directory)
    metad.answers["image.show"] = {"image": IMAGE | SIZES | {"placement": placement(3)}}
    metad.answers["image.create"] = {"image": SUMMARY | SIZES, "notes": []}
    return directory


def disk(path: Path, size_bytes: int, image_format: str = "raw", data: bytes = b"data" * 1024) -> Path:
    """A disk image whose second MiB begins with ``data``; the rest are holes."""
    raw = path.with_suffix(".made")
    with raw.open("wb") as file:
        file.truncate(size_bytes)
        file.seek(MIB)
        file.write(data)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, str(raw), str(path)], check=True)
    raw.unlink()
    return path


def expected(data: bytes = b"data" * 1024) -> bytes:
    return bytes(MIB) + data + bytes(SIZE - MIB - len(data))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size_bytes", [SIZE, 4 * MIB, SIZE - 512])
def test_import(image_format: str, size_bytes: int, mount: Path, run: Run, tmp_path: Path) -> None:
    """What the image held is gone, behind the end of a smaller disk too; zeros take no space."""
    file = disk(tmp_path / "disk", size_bytes, image_format)
    result = run("image", "import", "image01", str(file))
    assert result.exit_code == 0, result.output
    assert f"imported {size_bytes // MIB}" in result.stdout or size_bytes % MIB
    assert "100 %" in result.stderr
    assert (mount / "image01").read_bytes() == expected()
    assert (mount / "image01").stat().st_blocks * 512 <= 2 * MIB


def test_import_creates_the_image(mount: Path, metad: FakeMetad, run: Run, tmp_path: Path) -> None:
    """An image that was never written is not zeroed first."""
    image = mount / "image01"
    image.unlink()

    def create(request: dict[str, Any]) -> dict[str, Any]:
        with image.open("wb") as file:
            file.truncate(SIZE)
        return {"image": SUMMARY | SIZES, "notes": []}

    metad.answers["image.create"] = create
    metad.answers["image.show"] = {"image": IMAGE | SIZES | {"placement": placement(0)}}
    file = disk(tmp_path / "disk.qcow2", SIZE - 512, "qcow2")
    result = run("image", "import", "image01", str(file), "--location", "127.0.0.1", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert list(printed) == ["image", "file", "format", "virtual_size", "notes"]
    assert printed["format"] == "qcow2"
    assert "rounded up" in printed["notes"][0]
    assert result.stderr == ""
    assert metad.last("image.create")["size"] == SIZE - 512
    assert image.read_bytes() == expected()
    assert image.stat().st_blocks * 512 <= MIB


def test_import_that_fails_leaves_no_image(mount: Path, metad: FakeMetad, run: Run, tmp_path: Path) -> None:
    """The mount may hold the image open for a moment: removing is tried until it isn't busy any more."""
    (mount / "image01").unlink()
    (mount / "image01").mkdir()
    busy = iter([{"err": "busy", "msg": "open"}] * 2)
    metad.answers["image.remove"] = lambda request: next(busy, {"notes": []})
    file = disk(tmp_path / "disk", MIB * 2)
    result = run("image", "import", "image01", str(file), "--location", "127.0.0.1")
    assert result.exit_code == 1
    assert "the import failed, image01 was removed again" in result.stderr
    assert metad.ops().count("image.remove") == 3
    assert metad.last("image.remove") == {"name": "image01", "delete_data": True}


REFUSED = {
    "larger": "holds a disk of 16777216 bytes, and image image01 has only 8388608",
    "open": "image image01 is open on 127.0.0.1",
    "missing": "does not exist",
    "unmounted": "is not mounted here",
    "elsewhere": "this node, 127.0.0.9, is no hypervisor of image01",
    "offline": "ukai-ctl add_image image01",
    "foreign": "another cluster's mount",
    "backing": "takes data from",
    "no-qemu": "qemu-img is not installed here",
    "no-location": "add --location",
    "too-small": "has only 4194304",
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refused(
    case: str, mount: Path, metad: FakeMetad, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one line, before anything is created or written."""
    file = disk(tmp_path / "disk", 2 * SIZE if case == "larger" else SIZE)
    shown = IMAGE | SIZES | {"placement": placement(3)}
    extra: list[str] = []
    if case == "open":
        shown |= {"open": {"127.0.0.1": 1}}
    elif case == "missing":
        file.unlink()
    elif case == "unmounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: False)
    elif case == "elsewhere":
        monkeypatch.setenv("UKAI_NODE_ADDRESS", "127.0.0.9")
    elif case == "offline":
        (mount / "image01").unlink()
        shown |= {"online": False}
    elif case == "foreign":
        os.truncate(mount / "image01", MIB)
    elif case == "backing":
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", file, "-F", "raw", tmp_path / "top"], check=True
        )
        file = tmp_path / "top"
    elif case == "no-qemu":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif case == "no-location":
        extra = ["--block-size", "1M"]
    elif case == "too-small":
        extra = ["--location", "127.0.0.1", "--size", "4M"]
    metad.answers["image.show"] = {"image": shown}
    result = run("image", "import", "image01", str(file), *extra)
    assert result.exit_code == (2 if case == "no-location" else 1)
    assert REFUSED[case] in result.stderr
    assert result.stderr.count("\n") == 1
    assert set(metad.ops()) <= {"image.show"}
    if case not in ("offline", "foreign"):
        assert (mount / "image01").read_bytes() == b"\1" * SIZE


@pytest.mark.parametrize(("name", "image_format"), [("a.raw", "raw"), ("a.qcow2", "qcow2"), ("a", "raw")])
def test_export(name: str, image_format: str, mount: Path, run: Run, tmp_path: Path) -> None:
    """The format by the ending; sparse; nothing but the file is left."""
    (mount / "image01").write_bytes(expected())
    target = tmp_path / "out" / name
    target.parent.mkdir()
    result = run("image", "export", "image01", str(target), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "name": "image01",
        "file": str(target),
        "format": image_format,
        "size": SIZE,
        "notes": [],
    }
    assert [path.name for path in target.parent.iterdir()] == [name]
    assert target.stat().st_blocks * 512 < 2 * MIB
    compare = ["qemu-img", "compare", "-f", "raw", "-F", image_format, str(mount / "image01"), str(target)]
    assert subprocess.run(compare, capture_output=True, check=False).returncode == 0


def test_export_never_replaces_unless_forced(mount: Path, metad: FakeMetad, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    target.write_text("precious")
    result = run("image", "export", "image01", str(target))
    assert result.exit_code == 1
    assert "add --force to replace it" in result.stderr
    assert target.read_text() == "precious"
    assert metad.ops() == []
    assert run("image", "export", "image01", str(target), "--force").exit_code == 0
    assert target.read_bytes() == b"\1" * SIZE


def test_export_that_fails_leaves_nothing(mount: Path, run: Run, tmp_path: Path) -> None:
    (mount / "image01").unlink()
    result = run("image", "export", "image01", str(tmp_path / "out.raw"))
    assert result.exit_code == 1
    assert not (tmp_path / "out.raw").exists()
    assert run("image", "export", "image01", str(tmp_path / "none" / "out.raw")).exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mount"]
