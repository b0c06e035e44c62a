"""The table of error codes in docs/http.md is complete."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import aiodisagg

PACKAGE = Path(aiodisagg.__file__).parent


def codes_in(path: Path) -> Iterator[str]:
    """What is given as ``code=``, is the default of a ``code``, or is the fifth argument of a Failure."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.keyword(arg="code", value=value):
                yield from strings(value)
            case ast.arguments(kwonlyargs=names, kw_defaults=defaults):
                for name, default in zip(names, defaults, strict=True):
                    if name.arg == "code" and default is not None:
                        yield from strings(default)
            case ast.Call(func=ast.Name(id="Failure"), args=[_, _, _, _, value, *_]):
                yield from strings(value)


def strings(value: ast.expr) -> Iterator[str]:
    match value:
        case ast.Constant(value=str(code)):
            yield code
        case ast.IfExp(body=one, orelse=other):
            yield from strings(one)
            yield from strings(other)


def test_the_table_has_the_codes_that_clients_get() -> None:
    sources = [PACKAGE / "errors.py", *(PACKAGE / "api").glob("*.py")]
    given = {code for path in sources for code in codes_in(path)}
    table = (PACKAGE.parent / "docs" / "http.md").read_text().split("| status | code |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", table)) == given
