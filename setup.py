"""What every request passes is compiled by mypyc when UKAI is installed; UKAI_PURE=1 leaves it to the interpreter.

A class whose attributes others read on that way is compiled with them, or they would look it up by name each time.
What has a subclass in a test is not: a compiled class takes none that isn't.
"""

import os

from setuptools import setup


def sources(package: str, names: str) -> list[str]:
    return [f"{package}/{name}.py" for name in names.split()]


COORDINATING = sources(
    "ukai/blockd", "behind coordinator core flush frontends peer posted readable reads replica server writes"
)
OTHERS = [
    *sources("ukai", "faults messages page polling ranges sockets telemetry zmtp"),
    *sources("ukai/blockd", "files generations image_store store"),
    *sources("ukai/frontend", "client core files line posted shortcut"),
]

extensions = []
if os.environ.get("UKAI_PURE", "") in ("", "0"):
    from mypyc.build import mypycify

    extensions = mypycify(
        ["--config-file=", "--ignore-missing-imports", *COORDINATING, *OTHERS],
        opt_level="2",
        separate=[(COORDINATING, "ukai_coordinating"), (OTHERS, "ukai_others")],  # two compilers at work
    )
setup(ext_modules=extensions, options={"build_ext": {"parallel": os.cpu_count()}})
