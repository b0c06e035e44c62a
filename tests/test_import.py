"""``import aiodisagg`` is for free: it loads none of the heavy packages, and the public names still are there."""

from __future__ import annotations

import statistics
import subprocess
import sys

import aiodisagg

HEAVY = ("torch", "transformers", "zmq", "aiohttp", "mooncake", "uvloop", "numpy")


def test_import_pulls_in_nothing_heavy() -> None:
    script = f"import sys, aiodisagg; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_import_takes_less_than_a_fifth_of_a_second() -> None:
    def seconds(script: str) -> float:
        """Of a processor: a machine may be busy."""
        script = f"import time; began = time.process_time(); {script}; print(time.process_time() - began)"
        return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)

    assert statistics.median(seconds("import aiodisagg") for _ in range(5)) < 0.2


def test_public_names_are_found_where_they_live() -> None:
    for name in aiodisagg.__all__:
        assert getattr(aiodisagg, name) is not None
    try:
        aiodisagg.nothing  # type: ignore[attr-defined]  # noqa: B018
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("an unknown name was found")
