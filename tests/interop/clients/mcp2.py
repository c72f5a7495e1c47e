"""The PyPI package mcp 2.x over Streamable HTTP: `mcp2.py URL auto|legacy|2026-07-28`.

In auto mode it asks `server/discover` first and would fall back to `initialize`; pinned to a version it
asks nothing and just speaks it.
"""

import sys
import warnings
from contextlib import asynccontextmanager
from types import SimpleNamespace

import anyio
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from scenario import Wire, play

# ping and logging/setLevel are deprecated since 2026-07-28; that they still work is the point here.
warnings.simplefilter("ignore")

url, mode = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "auto"


@asynccontextmanager
async def connect(url):
    wire, logs = Wire(), []

    async def on_log(params):
        logs.append(params)

    async with wire.http:
        transport = streamable_http_client(url, http_client=wire.http)
        async with Client(transport, mode=mode, logging_callback=on_log, read_timeout_seconds=20) as client:
            yield SimpleNamespace(client=client, wire=wire, logs=logs)


sys.exit(anyio.run(play, f"mcp2/{mode}", url, "2025-11-25" if mode == "legacy" else "2026-07-28", connect))
