"""The file of ``simulate --times``, which ``bench times`` writes."""

from __future__ import annotations

import msgspec

Points = tuple[tuple[float, float], ...]


class ServiceTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device and one model, in milliseconds; the file of ``--times``. Each list of points is (size, ms)."""

    name: str
    source: str
    """Where the numbers come from, and which of them nobody measured."""
    row_bytes: int
    tower: Points
    """(patches, ms) of one image alone in a batch."""
    tower_base_ms: float
    prefill: Points
    """(tokens, ms) of one prompt in one step."""
    prefill_base_ms: float
    decode: Points
    """(requests, ms) of a step that decodes with a short context."""
    beside: Points = ()
    """(requests, ms) that decodes with a short context add to a step with a prompt; empty: as many prompt tokens do."""
    decode_context_us: float = 0.0
    """Microseconds a step takes longer for each token of all its contexts."""
    prepare: Points = ()
    """(patches, ms) to decode and preprocess one image on one CPU thread; empty: nothing."""
    prepare_threads: int = 2
    prompt_tokens: int = 0
    """Of every prompt, beside its text and its images."""
    image_tokens: int = 0
    """Of every image, beside its rows."""
    least_rows: int = 1
    """Of the smallest image: smaller ones are enlarged."""
    request_ms: float = 0.0
    """Of every request before anything of it may be encoded or computed: reading, planning, admitting. On no device."""
    image_ms: float = 0.0
    """The same for each of its images."""
    local_bytes_per_s: float = 0.0
    """Rows of a peer's own tower, from the end of a batch until the engine may compute with them; 0: at once."""
    reads_ms: float = 0.0
    """Reading all experts of all layers once, of which a token reads ``reads_part``: see ``engine.pace.Reads``."""
    reads_part: float = 1.0
    link_bytes_per_s: float = 10e9
    link_rtt_ms: float = 0.05
    shared_speed: float = 1.0
    """What a device does with its engine and its tower at work at once, as a multiple of one of them alone."""
    kv_tokens: int = 100_000
    """Tokens whose keys and values fit."""
    token_budget: int = 8192
    max_running: int = 256
    batch_patches: int = 4096
    """Of a batch of a tower by itself; an image with more goes alone."""
    inline_patches: int = 32768
    """The same of a monolith, which encodes inside the engine's loop."""
