"""qemu-img: what ``image import`` and ``image export`` use to read and write other formats."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ukai.config import Config
from ukai.ctl.schema import Map
from ukai.errors import NotFound, Refused, UkaiError, UsageError
from ukai.node import own_address

PROGRESS = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")
REQUESTS_IN_FLIGHT = 8
INFO_TIMEOUT_S = 60
FORMATS = ("raw", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")
SUFFIXES = {".qcow2": "qcow2", ".qed": "qed", ".vdi": "vdi", ".vhdx": "vhdx", ".vmdk": "vmdk", ".vhd": "vpc"}


@dataclass(frozen=True)
class FileInfo:
    """What qemu-img says about a file: its format and the bytes that a guest would see."""

    format: str
    virtual_size_bytes: int
    refers_to: str
    """Another file that it takes data from, or nothing."""


def program() -> str:
    """The path of qemu-img.  Raises UkaiError when there is none."""
    path = shutil.which("qemu-img")
    if path is None:
        raise UkaiError("qemu-img is not installed here; install it (Debian: apt install qemu-utils)")
    return path


def info(file: Path, image_format: str | None) -> FileInfo:
    """Raises UkaiError with what qemu-img says when it can't read the file."""
    forced = ["-f", image_format] if image_format else []
    try:
        result = subprocess.run(
            [program(), "info", "--output=json", *forced, "--", str(file)],
            capture_output=True,
            timeout=INFO_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UkaiError(f"qemu-img could not read {file} within {INFO_TIMEOUT_S} s") from None
    if result.returncode:
        raise UkaiError(_reason(result.stderr, f"qemu-img can't read {file}"))
    try:
        found = json.loads(result.stdout)
        kind, virtual = str(found["format"]), int(found["virtual-size"])
        data_file = found.get("format-specific", {}).get("data", {}).get("data-file", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UkaiError(f"qemu-img said nothing that can be understood about {file}") from None
    return FileInfo(kind, virtual, str(found.get("backing-filename") or data_file or ""))


def check_source(file: Path, image_format: str | None) -> FileInfo:
    """What is to be imported.

    Raises UkaiError, and Refused for a file that takes data from another one where its format was guessed: a guest
    can write such a header into a raw disk, to have any file of the host copied.
    """
    if not file.exists():
        raise NotFound(f"{file} does not exist")
    if file.is_dir():
        raise UsageError(f"{file} is a directory, not a disk image")
    found = info(file, image_format)
    if found.refers_to and image_format is None:
        raise Refused(
            f"{file} looks like {found.format} and takes data from {found.refers_to}; "
            f"if that is meant, add --format {found.format}"
        )
    return found


def check_mount(config: Config, name: str, hypervisors: Sequence[str]) -> None:
    """Whether the image is, or will be, below the mount point of this machine.  Raises UkaiError."""
    if not os.path.ismount(config.mount_point):
        raise UkaiError(
            f"{config.mount_point} is not mounted here; run this on a hypervisor of {name}, with ukai-frontend running"
        )
    here = own_address(config)
    if here not in hypervisors:
        raise Refused(
            f"this node, {here}, is no hypervisor of {name}, so {name} is not below {config.mount_point}; "
            f"run this on {', '.join(hypervisors) or 'one'}, or add it as a hypervisor"
        )


def mounted_file(config: Config, image: Map) -> Path:
    """The image's file below the mount point of this hypervisor.

    Raises NotFound while it is not there, UkaiError where it never will be.
    """
    check_mount(config, image["name"], image["hypervisors"])
    file = Path(config.mount_point, str(image["name"]))
    try:
        size_bytes = file.stat().st_size
    except FileNotFoundError:
        why = "is ukai-frontend in touch with metad?" if image["online"] else f"ukai-ctl add_image {image['name']}"
        raise NotFound(f"{file} is not there; {why}") from None
    except OSError as e:
        raise UkaiError(f"{file}: {e.strerror}; is ukai-frontend running?") from None
    if size_bytes != image["size"]:
        raise UkaiError(f"{file} has {size_bytes} bytes and the image {image['size']}: another cluster's mount?")
    return file


def convert(arguments: Sequence[str], progress: Callable[[float], None]) -> None:
    """Run ``qemu-img convert -p`` and report its percentage.

    Raises UkaiError with qemu-img's own reason.  On any other exception, Ctrl-C too, qemu-img is ended first.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [program(), "convert", "-p", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C comes to us alone, and we end it in order
        )
        try:
            if process.stdout is not None:
                _follow(process.stdout, progress)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            if process.stdout is not None:
                process.stdout.close()
        if code:
            errors.seek(0)
            ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            raise UkaiError(_reason(errors.read(), f"qemu-img {ended}"))


def _follow(stream: IO[bytes], progress: Callable[[float], None]) -> None:
    rest = b""
    while chunk := os.read(stream.fileno(), 4096):
        parts = (rest + chunk).split(b"\r")
        rest = parts[-1][-100:]
        found = PROGRESS.findall(b"\r".join(parts))
        if found:
            progress(float(found[-1]))


def _reason(stderr: bytes, otherwise: str) -> str:
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else otherwise
