"""The PyPI package mcp 2.x over Streamable HTTP: `mcp2.py scenario|eras URL auto|legacy|2026-07-28`.

In auto mode it asks `server/discover` first and would fall back to `initialize`; pinned to a version it
asks nothing and just speaks it.
"""

import importlib
import sys
import warnings
from contextlib import asynccontextmanager
from types import SimpleNamespace

import anyio
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from scenario import Wire

# ping and logging/setLevel are deprecated since 2026-07-28; that they still work is the point here.
warnings.simplefilter("ignore")

name, url, mode = sys.argv[1:4]


@asynccontextmanager
async def connect(url, answers=None):
    wire, logs, notes = Wire(), [], []

    async def on_log(params):
        logs.append(params)

    async def on_message(message):
        notes.append(message)

    options = {"logging_callback": on_log, "message_handler": on_message}
    if answers:
        options["sampling_callback"] = answers.sample
        options["elicitation_callback"] = answers.elicit
        options["list_roots_callback"] = answers.roots
    async with wire.http:
        transport = streamable_http_client(url, http_client=wire.http)
        async with Client(transport, mode=mode, read_timeout_seconds=20, **options) as client:
            yield SimpleNamespace(client=client, wire=wire, logs=logs, notes=notes)


play = importlib.import_module(name).play
sys.exit(anyio.run(play, f"mcp2/{mode}", url, "2025-11-25" if mode == "legacy" else "2026-07-28", connect))
