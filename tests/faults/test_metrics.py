"""What an encode peer counts can be read over HTTP."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import pytest

from aiodisagg.errors import ConfigError
from aiodisagg.peer.http import MetricsServer

from .pair import ROW_BYTES, pair

pytestmark = pytest.mark.anyio


async def test_bytes_by_outcome_region_and_peer(tmp_path: Path, no_leaks: None) -> None:
    async with pair(tmp_path, "memory") as made:
        service = made.encoders[0]
        async with (
            MetricsServer(service.metrics, service.ready, "127.0.0.1", 0) as server,
            aiohttp.ClientSession() as session,
        ):
            await made.fetch([(1, 9), (1, 9), (2, 4)])
            await made.until(lambda: not service.sender.items)
            async with session.get(f"{server.url}/health") as response:
                assert await response.json() == {"status": "ok", "reason": "ok"}
            async with session.get(f"{server.url}/metrics") as response:
                text = await response.text()
            with pytest.raises(ConfigError, match="http_port"):
                port = int(server.url.rpartition(":")[2])
                async with MetricsServer(service.metrics, service.ready, "127.0.0.1", port):
                    pass
        found = dict(re.findall(r"^aiodisagg_(\S+) (\S+)$", text, re.M))
        rows = 22
        for region, part in (("input", 1), ("deepstack", 3)):
            key = f'row_bytes_total{{outcome="sent",peer="language",region="{region}"}}'
            assert float(found[key]) == rows * ROW_BYTES * part / 4
        assert (float(found["sources_started_total"]), float(found["source_hits_total"])) == (2, 1)
        assert (float(found["items_encoded_total"]), float(found["links"])) == (2, 1)
        assert float(found["source_bytes"]) == 13 * ROW_BYTES
