"""What a user types wrong is answered with one line, before anything is started."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from aiodisagg.bench.distributions import Ranges, exactly
from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.reuse import ReuseOptions
from aiodisagg.bench.shapes import Setting
from aiodisagg.bench.workload import Tenant
from aiodisagg.cli import main
from aiodisagg.cli.bench_serve import mix_of
from aiodisagg.cli.measuring import progress
from aiodisagg.errors import ConfigError

SERVE = ("serve", "--url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*SERVE, "--mix", "none"), "mix: 'none' is none of images-1-8"),
        ((*SERVE, "--images", "x"), "images: 'x' is no number"),
        ((*SERVE, "--tenants", "a:b"), "tenants: 'a:b' is no name:share:priority"),
        ((*SERVE, "--rates", "x"), "rates: 'x' is no list of numbers"),
        ((*SERVE, "--extra-body", "{"), "extra-body"),
        ((*SERVE, "--trace", "/nowhere"), "trace: /nowhere"),
        (SERVE, "Cannot connect"),
        ((*SERVE, "--rates", "5,0"), "rates: must be above 0, not 0"),
        ((*SERVE, "--concurrency", "0"), "concurrency: must be at least 1, not 0"),
        ((*SERVE, "--concurrency", ","), "rates: give rates or concurrencies"),
        ((*SERVE, "--seeds", ","), "seeds: at least one is needed, and each once, not []"),
        ((*SERVE, "--requests", "0"), "requests: must be at least 1, not 0"),
        ((*SERVE, "--warmup", "-1"), "warmup: must be at least 0, not -1"),
        ((*SERVE, "--probes", "-1"), "probes: must be at least 0, not -1"),
        ((*SERVE, "--slo", "5,-1"), "slo: must be above 0, not -1"),
        (("serve", "--url", "localhost:1"), "url: 'localhost:1' is not an http(s) URL"),
        ((*SERVE, "--metrics", "localhost:1/metrics"), "metrics: 'localhost:1/metrics' is not an http(s) URL"),
        (("system", "--shapes", "3+3", "--model", "/nowhere"), "shapes: '3+3' is none of single"),
        (("system", "--quick", "--shapes", ","), "shapes: at least one is needed"),
        (("system", "--mixes", "documents"), "mixes: 'documents' is none of"),
        (("system", "--capacity", "1,2,3"), "capacity: 2 mixes need as many, not 3"),
        (("control", "--cores", "0"), "cores: two are needed, not '0'"),
        (("overload", "--loads", "a"), "loads: 'a' is no list of numbers"),
        (("overload", "--loads", ","), "loads: at least one is needed"),
        (("overload", "--loads", "1,0"), "loads: must be above 0, not 0"),
        (("overload", "--loads", "nan"), "loads: must be above 0, not nan"),
        (("overload", "--loads", "-1"), "loads: must be above 0, not -1"),
        (("system", "--loads", "0.5,0"), "loads: must be above 0, not 0"),
        (("control", "--peers", ","), "peers: at least one is needed"),
        (("control", "--peers", "2,0"), "peers: must be at least 1, not 0"),
        (("control", "--requests", "1"), "requests: must be at least 2, not 1"),
        (("control", "--concurrency", "0"), "concurrency: must be at least 1, not 0"),
        (("reuse", "--scale", "nan"), "scale: must be above 0, not nan"),
        (("reuse", "--pool", "-1"), "pool: reuse needs a pool"),
        (("overlap", "--concurrency", "8,x"), "concurrency: '8,x' is no list of numbers"),
        (("overlap", "--concurrency", "0"), "concurrency: numbers of clients"),
    ],
)
def test_what_cannot_be_measured(arguments: tuple[str, ...], said: str) -> None:
    found = CliRunner().invoke(main, ["bench", *arguments])
    assert found.exit_code == 1 and isinstance(found.exception, SystemExit)
    assert said in found.output, found.output


def test_reuse_of_no_pool_is_refused_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match="pool: reuse needs a pool"):
        ReuseOptions(setting=Setting(model=""), pool=-1)


def test_a_mix_as_the_user_changed_it() -> None:
    mix, name = mix_of("images-1-8", "2", None, "100-200", "7", "9", 0.5, 20, "a:2,b")
    assert mix == replace(
        named_mix("images-1-8"), images=exactly(2), sizes=Ranges(((100, 200, 101.0),)), text_tokens=exactly(7),
        output_tokens=exactly(9), reuse=0.5, pool=20,
        tenants=(Tenant("a", 2.0), Tenant("b")),
    )  # fmt: skip
    assert name == "images-1-8, images 2, tokens 100-200, text 7, output 9, tenants a:2,b, reuse 0.5 of 20"
    mix, name = mix_of("servegen", None, "64x32", None, None, None, None, None, None)
    assert mix.sizes == ((64, 32),) and name == "servegen, sizes 64x32"


def test_a_log_file_gets_a_line_for_each_thing_that_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as say:
        for done in (1, 2):
            say("seed 0, 1+1, 4/s", done, 2)
        say("seed 1, 1+1, 4/s", 1, 2)
    assert capsys.readouterr().err == "seed 0, 1+1, 4/s: 2\n"


def test_what_is_not_given_stays_as_the_mix_has_it() -> None:
    named = named_mix("reuse")
    mix, name = mix_of("reuse", None, None, None, None, None, None, 50, None)
    assert mix == replace(named, pool=50) and name == f"reuse, reuse {named.reuse:g} of 50"
    mix, name = mix_of("reuse", None, None, None, None, None, 0.5, None, None)
    assert mix == replace(named, reuse=0.5) and name == f"reuse, reuse 0.5 of {named.pool}"
