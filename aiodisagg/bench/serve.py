"""``bench serve``: measures any server of OpenAI's chat API, or several replicas of one behind a balancer.

1. Ask what the model is called, and how many tokens one of our words is.
2. Warm up; then send some requests of each group one at a time: the latency of an unloaded server.
3. Run the workload at each rate or concurrency, for each seed. Every run has pictures and texts of its own, drawn
   before it begins, so that nothing of an earlier run is in a cache unless the workload itself reuses pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import msgspec

from aiodisagg.bench.chat_body import BodyStyle, make_bodies, make_body, make_text
from aiodisagg.bench.chat_client import Balance, Balancer, ChatClient, Clock, ServerError, open_session
from aiodisagg.bench.counters import grown, parse_counters
from aiodisagg.bench.pictures import PictureFormat
from aiodisagg.bench.serve_load import ClientCost, Load, watch_client
from aiodisagg.bench.serve_metrics import Outcome, Summary, Unloaded, by_group, group_of, summarize
from aiodisagg.bench.workload import Arrivals, Closed, Gamma, Mix, WorkloadRequest, check, generate
from aiodisagg.errors import ConfigError

Say = Callable[[str, int, int], None]
"""``say(what, done, total)``: how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What to send where. Raises ConfigError."""

    urls: tuple[str, ...]
    mix: Mix | None = None
    trace: tuple[WorkloadRequest, ...] = ()
    """Instead of a mix: these requests, at their times unless ``concurrencies`` are given."""
    workload: str = ""
    """What the workload is called in the report."""
    rates: tuple[float, ...] = ()
    concurrencies: tuple[int, ...] = ()
    cv: float = 1.0
    requests: int = 100
    """Of each run."""
    seeds: tuple[int, ...] = (0,)
    warmup: int = 2
    probes: int = 5
    """Requests of each group that are sent alone; 0: no unloaded latency, and so no goodput."""
    slo: tuple[float, ...] = (5.0, 10.0)
    balance: Balance = "least-outstanding"
    model: str = ""
    """Empty: the first one that the server names."""
    api_key: str | None = field(default=None, repr=False)
    extra: Mapping[str, object] = field(default_factory=dict)
    form: PictureFormat = "jpeg"
    timeout_s: float = 600.0
    metrics: tuple[str, ...] = ()
    """URLs of pages in Prometheus' text format, of any peers; what their counters grow by is part of a run."""

    def __post_init__(self) -> None:
        for key, urls in (("url", self.urls), ("metrics", self.metrics)):
            for url in urls:
                if not url.startswith(("http://", "https://")):
                    raise ConfigError(key, f"{url!r} is not an http(s) URL")
        if (self.mix is None) == (not self.trace):
            raise ConfigError("trace", "give either a mix or a trace")
        if self.trace and (self.rates or len(self.seeds) > 1):
            raise ConfigError("trace", "a trace has its own arrival times: neither rates nor seeds can be given")
        if not self.trace and not self.rates and not self.concurrencies:
            raise ConfigError("rates", "give rates or concurrencies")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", f"at least one is needed, and each once, not {list(self.seeds)}")
        check("rates", self.rates, above=0)
        check("concurrency", self.concurrencies, least=1)
        check("requests", (self.requests,), least=1)
        check("warmup", (self.warmup,), least=0)
        check("probes", (self.probes,), least=0)
        check("slo", self.slo, above=0)
        check("cv", (self.cv,), least=0)
        check("timeout-s", (self.timeout_s,), above=0)

    @property
    def loads(self) -> list[tuple[str, Arrivals | None]]:
        """One for each run, and what it is called, which no other one is; None: as the trace says."""
        given: list[Arrivals] = [Gamma(rate, self.cv) for rate in self.rates]
        given += [Closed(many) for many in self.concurrencies]
        found: list[tuple[str, Arrivals | None]] = []
        for number, arrivals in enumerate(given):
            before = given[:number].count(arrivals)
            exact = f"{repr(arrivals.rate_per_s).removesuffix('.0')}/s" if isinstance(arrivals, Gamma) else ""
            found.append(((exact or _name(arrivals)) + (f" ({before + 1})" if before else ""), arrivals))
        return found or [("trace", None)]


def _name(arrivals: Arrivals | None) -> str:
    match arrivals:
        case Gamma(rate):
            return f"{rate:.3g}/s"
        case Closed(concurrency):
            return f"{concurrency} at a time"
    return "trace"


class Client(msgspec.Struct, frozen=True):
    """The load generator itself. ``late``: how long after they were due requests were sent; ``lag``: of its loop."""

    cpu_share: float
    lag_p99_ms: float
    lag_max_ms: float
    late_max_ms: float


class Run(msgspec.Struct, frozen=True):
    """One load and seed. ``rate_per_s`` is 0 unless it was an open loop, ``concurrency`` unless a closed one."""

    load: str
    rate_per_s: float
    concurrency: int
    seed: int
    all: Summary
    groups: dict[str, Summary]
    replicas: dict[str, int]
    """Requests that each URL got."""
    client: Client
    counters: dict[str, float] = {}
    """What the counters of ``ServeOptions.metrics`` grew by, those of one name and labels together."""


class ServeReport(msgspec.Struct, frozen=True):
    urls: list[str]
    model: str
    workload: str
    tokens_per_word: float
    unloaded: dict[str, Unloaded]
    runs: list[Run]


async def bench_serve(
    options: ServeOptions,
    say: Say = lambda what, done, total: None,
    keep: Callable[[Run, list[Outcome]], None] = lambda run, outcomes: None,
    clock: Clock | None = None,
) -> ServeReport:
    """Measures. ``keep`` gets every run's outcomes. Raises ServerError if the server cannot be used at all."""
    clock = clock or Clock()
    async with open_session(options.api_key) as session:
        bench = Bench(options, ChatClient(session, clock, timeout_s=options.timeout_s), clock, say)
        await bench.meet()
        await bench.warm()
        unloaded = await bench.alone()
        runs = []
        for name, arrivals in options.loads:
            for seed in options.seeds:
                run, outcomes = await bench.measure(arrivals, seed, unloaded, name)
                runs.append(run)
                keep(run, outcomes)
    return ServeReport(
        list(options.urls), bench.style.model, options.workload, bench.style.tokens_per_word, unloaded, runs
    )


class Bench:
    """The steps of a measurement, in the order of the methods."""

    def __init__(self, options: ServeOptions, client: ChatClient, clock: Clock, say: Say) -> None:
        self._options, self._client, self._clock, self._say = options, client, clock, say
        self.style = BodyStyle(model=options.model, form=options.form, extra=options.extra)

    async def meet(self) -> None:
        """Finds the model's name and the tokens of a word; sees that every replica answers. Raises ServerError."""
        options = self._options
        model = options.model or (await self._client.models(options.urls[0]) or [""])[0]
        words = BodyStyle(model=model, form=options.form, extra=options.extra)
        asked, tokens = WorkloadRequest(0.0, (), 1, 1), []
        for count in (50, 250):
            body = make_body(asked, make_text(count, words, "words"), (), words)
            for url in options.urls:
                answer = await self._client.ask(url, body)
                if answer.error:
                    said = f" ({answer.said})" if answer.said else ""
                    raise ServerError(url, f"does not answer: {answer.error}{said}")
            tokens.append(answer.prompt_tokens)
        self.style = replace(words, tokens_per_word=(tokens[1] - tokens[0]) / 200 or 1.0)

    async def warm(self) -> None:
        """Sends every replica some requests that do not count."""
        options, replicas = self._options, len(self._options.urls)
        some = list(islice(cycle(self._sample()), options.warmup * replicas))
        await self._send("warming up", some, Closed(replicas), f"warm/{options.seeds[0]}")

    async def alone(self) -> dict[str, Unloaded]:
        """Measures each group of the workload with nothing beside it."""
        options, sample = self._options, self._sample()
        found = {}
        for group in sorted({group_of(request) for request in sample}):
            own = [request for request in sample if group_of(request) == group][: options.probes]
            outcomes, _ = await self._send(f"alone, {group}", own, Closed(1), f"alone/{group}/{options.seeds[0]}")
            if (alone := Unloaded.of(outcomes)) is not None:
                found[group] = alone
        return found

    def _sample(self) -> Sequence[WorkloadRequest]:
        """Where groups are looked for: in the first run, or in more where that is short."""
        options = self._options
        if options.mix is None:
            return options.trace
        return generate(options.mix, Closed(1), max(options.requests, 20 * options.probes), options.seeds[0])

    async def measure(
        self, arrivals: Arrivals | None, seed: int, unloaded: Mapping[str, Unloaded], name: str = ""
    ) -> tuple[Run, list[Outcome]]:
        """One run of the workload; ``arrivals`` None: of the trace, at its own times. Runs of equal names, arrivals and
        seeds send the same pictures and texts, others send others."""
        options, name = self._options, name or _name(arrivals)
        requests = options.trace
        if options.mix is not None and arrivals is not None:
            requests = generate(options.mix, arrivals, options.requests, seed)
        load = arrivals or Gamma(1.0)  # a trace's times are in its requests
        before = await self._counters()
        outcomes, cost = await self._send(name, requests, load, f"{name}/{arrivals}/{seed}")
        counters = grown(before, await self._counters())
        late = max((one.sent_s - one.due_s for one in outcomes), default=0.0)
        whole = summarize(outcomes, unloaded, options.slo)
        run = Run(
            load=name,
            rate_per_s=arrivals.rate_per_s if isinstance(arrivals, Gamma) else 0.0,
            concurrency=arrivals.concurrency if isinstance(arrivals, Closed) else 0,
            seed=seed,
            all=whole,
            groups={
                group: summarize(own, unloaded, options.slo, whole.seconds) for group, own in by_group(outcomes).items()
            },
            replicas={url: sum(1 for one in outcomes if one.url == url) for url in options.urls},
            client=Client(cost.cpu_share, cost.lag_p99_ms, cost.lag_max_ms, 1000 * late),
            counters=counters,
        )
        return run, outcomes

    async def _counters(self) -> dict[str, float]:
        return parse_counters([await self._client.metrics(url) for url in self._options.metrics])

    async def _send(
        self, what: str, requests: Sequence[WorkloadRequest], arrivals: Arrivals, salt: str
    ) -> tuple[list[Outcome], ClientCost]:
        total, ended = len(requests), 0
        bodies = await make_bodies(
            requests, self.style, salt, lambda done, many: self._say(f"{what}: drawing pictures", done, many)
        )

        def tell(outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            self._say(what, ended, total)

        balancer = Balancer(self._options.urls, self._options.balance)
        load = Load(self._client, balancer, self._clock, tell)
        with watch_client() as cost:
            outcomes = await load.run(list(zip(requests, bodies, strict=True)), arrivals)
        return outcomes, cost
