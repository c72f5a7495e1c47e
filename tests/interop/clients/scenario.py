"""The scenario Python clients play with real servers; `mcp2.py` only says how to connect.

`scenario.mjs` is its twin: the same checks, by the same names, in the same order. A check is an async
function; its decorator says which upstream or era it needs.
"""

import json
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

import anyio
import httpx2
from mcp import MCPError
from mcp.types import PromptReference

EVERY_UPSTREAM = "everything,everythingstdio,files,memory,git,time,fixture"
CHECK_LIMIT = 20

ONE_TOOL_EACH = {
    "everything": "echo",
    "everythingstdio": "get-sum",
    "files": "read_text_file",
    "memory": "read_graph",
    "git": "git_status",
    "time": "convert_time",
    "fixture": "echo",
}

CHECKS = []


def check(name, upstream=None, era=None, prefixed=False):
    def register(function):
        CHECKS.append((name, upstream, era, prefixed, function))
        return function

    return register


class Scene:
    """What the checks share. INTEROP_* narrows it for use against a single server, as in `scenario.mjs`."""

    def __init__(self, url, version, connect):
        self.url = url
        self.connect = connect
        self.upstreams = os.environ.get("INTEROP_UPSTREAMS", EVERY_UPSTREAM).split(",")
        self.bare = os.environ.get("INTEROP_NAMING") == "bare"
        self.expected = os.environ.get("INTEROP_EXPECT", version)
        self.legacy = self.expected < "2026"
        self.files = Path(os.environ.get("INTEROP_FILES", "."))
        self.repository = os.environ.get("INTEROP_REPOSITORY")
        self.peer = None

    def name(self, server, own):
        return own if self.bare else f"{server}_{own}"

    async def raw(self, server, tool, arguments):
        return await self.peer.client.call_tool(self.name(server, tool), arguments)

    async def call(self, server, tool, arguments):
        result = await self.raw(server, tool, arguments)
        assert not result.is_error, f"{server} {tool} failed: {text(result)}"
        return result


class Wire:
    """An HTTP client that notes every exchange. With INTEROP_TRACE=1 it also prints them."""

    def __init__(self):
        self.exchanges = []
        hooks = {"request": [self.sent], "response": [self.answered]}
        # The 300 s between two reads are the SDK's own choice for long-lived streams.
        self.http = httpx2.AsyncClient(timeout=httpx2.Timeout(30, read=300), event_hooks=hooks)

    async def sent(self, request):
        if os.environ.get("INTEROP_TRACE"):
            print(f"> {request.method} {dict(request.headers)} {request.content.decode()}", file=sys.stderr)

    async def answered(self, response):
        request = response.request
        body = json.loads(request.content) if request.content else {}
        self.exchanges.append(
            {
                "method": request.method,
                "rpc": body.get("method"),
                "session": request.headers.get("mcp-session-id"),
                "given": response.headers.get("mcp-session-id"),
                "status": response.status_code,
            }
        )
        if os.environ.get("INTEROP_TRACE"):
            kind = response.headers.get("content-type")
            print(f"< {response.status_code} {kind} session={self.exchanges[-1]['given']}", file=sys.stderr)

    @property
    def session(self):
        return next((e["given"] for e in self.exchanges if e["given"]), None)


async def play(label, url, version, connect):
    """Runs the scenario; the exit code is 0 when every check held.

    `connect(url, answers=None)` is an async context manager that yields an object with `client`, `wire`, `logs`
    and `notes`. With `answers`, the client declares sampling, elicitation and roots, and answers by them.
    """
    scene = Scene(url, version, connect)
    failed = 0

    async def judge(name, work):
        nonlocal failed
        try:
            await work
            print(f"ok {label} {name}", flush=True)
        except Exception as error:
            failed += 1
            code = f" (code {error.code})" if isinstance(error, MCPError) else ""
            reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {innermost(error)}")[:600]
            print(f"not ok {label} {name}: {reason}{code}", flush=True)

    # Connecting and closing span the other checks, so they stand outside the per-check time limit; the
    # client's own request timeout bounds them.
    session = connect(url)

    async def open_session():
        scene.peer = await session.__aenter__()
        assert scene.peer.client.protocol_version == scene.expected, scene.peer.client.protocol_version

    async def close_session():
        assert scene.peer, "not connected"
        await session.__aexit__(None, None, None)
        await ended(scene)

    await judge("connect", open_session())
    for name, upstream, era, prefixed, function in CHECKS:
        if era and era != ("legacy" if scene.legacy else "modern"):
            continue
        if (upstream and upstream not in scene.upstreams) or (prefixed and scene.bare):
            continue

        async def bounded(function=function):
            assert scene.peer, "not connected"
            with anyio.fail_after(CHECK_LIMIT):
                await function(scene)

        await judge(name, bounded())
    await judge("close", close_session())
    return 1 if failed else 0


@check("tools-list")
async def tools_list(scene):
    names = [tool.name for tool in await pages(scene.peer.client.list_tools, "tools")]
    unique(names)
    for server in scene.upstreams:
        name = scene.name(server, ONE_TOOL_EACH[server])
        assert name in names, f"{name} is not listed"


@check("everything-echo", upstream="everything")
async def everything_echo(scene):
    said = f"hello {uuid4()}"
    equal(text(await scene.call("everything", "echo", {"message": said})), f"Echo: {said}")


@check("everything-structured", upstream="everything")
async def everything_structured(scene):
    result = await scene.call("everything", "get-structured-content", {"location": "Chicago"})
    equal(result.structured_content, {"temperature": 36, "conditions": "Light rain / drizzle", "humidity": 82})


@check("everythingstdio-echo", upstream="everythingstdio")
async def everythingstdio_echo(scene):
    said = f"stdio {uuid4()} ünïcödé"
    equal(text(await scene.call("everythingstdio", "echo", {"message": said})), f"Echo: {said}")


@check("everythingstdio-sum", upstream="everythingstdio")
async def everythingstdio_sum(scene):
    equal(text(await scene.call("everythingstdio", "get-sum", {"a": 40, "b": 2})), "The sum of 40 and 2 is 42.")


@check("files-write", upstream="files")
async def files_write(scene):
    scene.note = scene.files / f"{uuid4()}.txt"
    scene.content = f"first line\nsecond line {uuid4()}\n"
    await scene.call("files", "write_file", {"path": str(scene.note), "content": scene.content})
    equal(scene.note.read_text(), scene.content)


@check("files-read", upstream="files")
async def files_read(scene):
    equal(text(await scene.call("files", "read_text_file", {"path": str(scene.note)})), scene.content)


@check("files-list", upstream="files")
async def files_list(scene):
    listing = text(await scene.call("files", "list_directory", {"path": str(scene.files)}))
    assert f"[FILE] {scene.note.name}" in listing, listing


@check("memory-create", upstream="memory")
async def memory_create(scene):
    scene.entity = {"name": f"entity {uuid4()}", "entityType": "test", "observations": ["seen once"]}
    result = await scene.call("memory", "create_entities", {"entities": [scene.entity]})
    equal(result.structured_content, {"entities": [scene.entity]})


@check("memory-read", upstream="memory")
async def memory_read(scene):
    entities = (await scene.call("memory", "read_graph", {})).structured_content["entities"]
    assert scene.entity in entities, entities


@check("git-status", upstream="git")
async def git_status(scene):
    status = text(await scene.call("git", "git_status", {"repo_path": scene.repository}))
    assert "Repository status:" in status and "untracked.txt" in status, status


@check("git-log", upstream="git")
async def git_log(scene):
    log = text(await scene.call("git", "git_log", {"repo_path": scene.repository, "max_count": 1}))
    assert "the only commit" in log, log


@check("time-now", upstream="time")
async def time_now(scene):
    now = (await scene.call("time", "get_current_time", {"timezone": "Europe/Paris"})).structured_content
    equal(now["timezone"], "Europe/Paris")
    apart = abs((datetime.fromisoformat(now["datetime"]) - datetime.now(timezone.utc)).total_seconds())
    assert apart < 60, f"{now['datetime']} is not now"


@check("time-convert", upstream="time")
async def time_convert(scene):
    times = {"source_timezone": "Asia/Tokyo", "time": "12:00", "target_timezone": "Asia/Kathmandu"}
    converted = (await scene.call("time", "convert_time", times)).structured_content
    assert converted["target"]["datetime"].endswith("T08:45:00+05:45"), converted
    equal(converted["time_difference"], "-3.25h")


@check("fixture-structured", upstream="fixture")
async def fixture_structured(scene):
    said = f"structured {uuid4()}"
    result = await scene.call("fixture", "echo", {"message": said})
    equal(result.structured_content, {"message": said})


@check("fixture-text", upstream="fixture")
async def fixture_text(scene):
    said = text(await scene.call("fixture", "test_simple_text", {}))
    assert "simple text" in said, said


# A failure inside a tool is a result the model reads, not a protocol error.
@check("tool-error")
async def tool_error(scene):
    if "files" in scene.upstreams:
        result = await scene.raw("files", "read_text_file", {"path": str(scene.files / "no such file")})
    else:
        result = await scene.raw("everything", "get-sum", {"a": "one"})
    equal(result.is_error, True)
    assert text(result)


# Not against a server alone: server-everything answers an unknown tool with an `isError` result.
@check("unknown-tool", prefixed=True)
async def unknown_tool(scene):
    for name in ["everything_no-such-tool", "nowhere_nothing"]:
        try:
            result = await scene.peer.client.call_tool(name, {})
        except MCPError as error:
            equal(error.code, -32602)
        else:
            raise AssertionError(f"{name} was answered: {result}")


@check("prompts-list", upstream="everything")
async def prompts_list(scene):
    names = [prompt.name for prompt in await pages(scene.peer.client.list_prompts, "prompts")]
    unique(names)
    for own in ["simple-prompt", "args-prompt", "completable-prompt", "resource-prompt"]:
        assert scene.name("everything", own) in names, f"{own} of everything is not listed"


@check("prompts-get", upstream="everything")
async def prompts_get(scene):
    name = scene.name("everything", "args-prompt")
    prompt = await scene.peer.client.get_prompt(name, {"city": "Gent", "state": "Flanders"})
    equal(prompt.messages[0].content.text, "What's weather in Gent, Flanders?")


# The listed URI is read as listed: whether a gateway rewrites URIs is its own affair.
@check("resources-list", upstream="everything")
async def resources_list(scene):
    uris = [str(resource.uri) for resource in await pages(scene.peer.client.list_resources, "resources")]
    unique(uris)
    scene.document = next((uri for uri in uris if "architecture.md" in uri), None)
    assert scene.document, f"no architecture.md among {uris}"


@check("resources-read", upstream="everything")
async def resources_read(scene):
    content = (await scene.peer.client.read_resource(scene.document)).contents[0]
    equal(str(content.uri), scene.document)
    assert "Everything Server" in content.text, content.text[:80]


@check("resource-templates", upstream="everything")
async def resource_templates(scene):
    listed = await pages(scene.peer.client.list_resource_templates, "resource_templates")
    templates = [template.uri_template for template in listed]
    unique(templates)
    template = next((uri for uri in templates if "resource/dynamic/text" in uri), None)
    assert template, f"no dynamic text resource among {templates}"
    result = await scene.peer.client.read_resource(template.replace("{resourceId}", "7"))
    assert result.contents[0].text.startswith("Resource 7: "), result.contents[0].text


@check("completion", upstream="everything")
async def completion(scene):
    ref = PromptReference(type="ref/prompt", name=scene.name("everything", "completable-prompt"))
    found = await scene.peer.client.complete(ref, {"name": "department", "value": "S"})
    equal(found.completion.values, ["Sales", "Support"])
    found = await scene.peer.client.complete(ref, {"name": "name", "value": ""}, {"department": "Sales"})
    equal(found.completion.values, ["David", "Eve", "Frank"])


@check("progress", upstream="everything")
async def progress(scene):
    seen = []

    async def on_progress(progress, total, message):
        seen.append((progress, total))

    name = scene.name("everything", "trigger-long-running-operation")
    arguments = {"duration": 1, "steps": 4}
    result = await scene.peer.client.call_tool(name, arguments, progress_callback=on_progress)
    assert "completed" in text(result), text(result)
    equal(seen, [(1, 4), (2, 4), (3, 4), (4, 4)])


@check("parallel-calls", upstream="everything")
async def parallel_calls(scene):
    heard = {}

    async def echo(i):
        heard[i] = text(await scene.call("everything", "echo", {"message": f"no {i}"}))

    async with anyio.create_task_group() as group:
        group.start_soon(scene.call, "everything", "trigger-long-running-operation", {"duration": 1, "steps": 1})
        for i in range(20):
            group.start_soon(echo, i)
    equal(heard, {i: f"Echo: no {i}" for i in range(20)})


@check("ping", era="legacy")
async def ping(scene):
    await scene.peer.client.send_ping()


@check("logging-in-call", upstream="fixture", era="legacy")
async def logging_in_call(scene):
    await scene.peer.client.set_logging_level("debug")
    scene.peer.logs.clear()
    await scene.call("fixture", "test_tool_with_logging", {})
    await until(lambda: len(scene.peer.logs) >= 3, "three log messages")


# These messages belong to no request: they come over the session's own GET stream.
@check("logging-between-calls", upstream="everything", era="legacy")
async def logging_between_calls(scene):
    await scene.peer.client.set_logging_level("debug")
    scene.peer.logs.clear()
    await scene.call("everything", "toggle-simulated-logging", {})
    try:
        seen = lambda: any(re.search("level[ -]message", str(log.data), re.I) for log in scene.peer.logs)
        await until(seen, "a log message")
    finally:
        await scene.call("everything", "toggle-simulated-logging", {})


@check("second-session")
async def second_session(scene):
    echo = scene.name("everything", "echo")
    async with scene.connect(scene.url) as second:
        equal(second.client.protocol_version, scene.expected)
        heard = []

        async def say(client):
            heard.append(text(await client.call_tool(echo, {"message": "both"})))

        async with anyio.create_task_group() as group:
            group.start_soon(say, scene.peer.client)
            group.start_soon(say, second.client)
        equal(heard, ["Echo: both"] * 2)
        if scene.legacy:
            assert second.wire.session != scene.peer.wire.session, "both sessions have one id"
    await say(scene.peer.client)


@check("stateless", era="modern")
async def stateless(scene):
    exchanges = scene.peer.wire.exchanges
    assert not [e for e in exchanges if e["given"] or e["session"]], "a modern exchange carried a session id"
    assert not [e for e in exchanges if e["rpc"] == "initialize"], "initialize was sent"


async def ended(scene):
    """After the close: a legacy session was deleted, and is gone."""
    if not scene.legacy:
        return
    bye = [e["status"] for e in scene.peer.wire.exchanges if e["method"] == "DELETE"]
    assert bye and 200 <= bye[0] < 300, f"DELETE was answered {bye}"
    headers = {
        "accept": "application/json, text/event-stream",
        "mcp-session-id": scene.peer.wire.session,
        "mcp-protocol-version": scene.expected,
    }
    async with httpx2.AsyncClient() as http:
        late = await http.post(scene.url, headers=headers, json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    # Against a server alone this is looser: server-everything says 400 where the specification says 404.
    assert late.status_code == 404 or (scene.bare and late.status_code == 400), f"then {late.status_code}"


def innermost(error):
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def equal(left, right):
    assert left == right, f"{left!r} is not {right!r}"


def unique(names):
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    assert not twice, f"listed twice: {twice}"


def text(result):
    return "\n".join(block.text for block in result.content if block.type == "text")


async def pages(method, key):
    """Every page of a list."""
    items, cursor = [], None
    while True:
        page = await method(cursor=cursor)
        items += getattr(page, key)
        cursor = page.next_cursor
        if cursor is None:
            return items


async def until(ready, what):
    # server-everything repeats itself every five seconds, so eight are enough to see it once.
    for _ in range(160):
        if ready():
            return
        await anyio.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")
