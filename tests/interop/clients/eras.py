"""What the Python clients play against upstreams of either era: every kind of feature, by each upstream.

`eras.mjs` is its twin: the same checks, by the same names, in the same order, and the same environment.
"""

import json
import os
import random
import re
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import uuid4

import anyio
import mcp.types as t
from mcp import MCPError

from scenario import equal, innermost, pages, text, until

CHECK_LIMIT = 12
LOG_LEVEL = "io.modelcontextprotocol/logLevel"
STEPS = ["Tool execution started", "Tool processing data", "Tool execution completed"]
FEATURES = {}


def feature(name):
    def register(check):
        FEATURES[name] = check
        return check

    return register


class Scene:
    def __init__(self, expected):
        self.legacy = expected < "2026"
        self.asked = []
        self.peer = self.upstream = self.secret = None

    @property
    def client(self):
        return self.peer.client

    def own(self, name):
        return f"{self.upstream}_{name}"

    async def call(self, tool, arguments, meta=None):
        result = await self.client.call_tool(self.own(tool), arguments, meta=meta)
        assert not result.is_error, f"{tool} failed: {text(result)}"
        return result

    def once(self):
        assert len(self.asked) == 1, f"asked {len(self.asked)} times"
        return self.asked[0]

    # What the client answers by; the answers carry the check's secret.

    async def sample(self, _, params):
        self.asked.append(params)
        content = t.TextContent(type="text", text=self.secret)
        return t.CreateMessageResult(role="assistant", content=content, model="none", stop_reason="endTurn")

    async def elicit(self, _, params):
        self.asked.append(params)
        if params.mode == "url":
            return t.ElicitResult(action="accept")
        fields = params.requested_schema["properties"]
        return t.ElicitResult(action="accept", content=dict.fromkeys(fields, self.secret))

    async def roots(self, _):
        self.asked.append(None)
        return t.ListRootsResult(roots=[t.Root(uri=f"file:///{self.secret}", name="the root")])


async def play(label, url, expected, connect):
    upstreams = json.loads(os.environ["INTEROP_ERAS"])
    played = json.loads(os.environ["INTEROP_FEATURES"])
    scene = Scene(expected)
    failed = 0
    async with AsyncExitStack() as stack:
        try:
            scene.peer = await stack.enter_async_context(connect(url, scene))
            equal(scene.client.protocol_version, expected)
            broken = None
        except Exception as error:
            broken = AssertionError(f"not connected: {innermost(error)}")
        for upstream, era in upstreams.items():
            scene.upstream, scene.upstream_legacy = upstream, era == "legacy"
            for name, check in FEATURES.items():
                if name not in played[upstream]:
                    continue
                # Whatever is asked during a check must concern it; its answer carries this.
                scene.secret = str(uuid4())
                scene.asked.clear()
                try:
                    if broken:
                        raise broken
                    with anyio.fail_after(CHECK_LIMIT):
                        await check(scene)
                    print(f"ok {label} {upstream} {name}", flush=True)
                except Exception as error:
                    failed += 1
                    code = f" (code {error.code})" if isinstance(error, MCPError) else ""
                    reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {innermost(error)}")[:400]
                    print(f"not ok {label} {upstream} {name}: {reason}{code}", flush=True)
        print(f"done {label}", flush=True)
    return 1 if failed else 0


@feature("tools")
async def tools(scene):
    names = [tool.name for tool in await pages(scene.client.list_tools, "tools")]
    assert scene.own("echo") in names, f"{scene.own('echo')} is not listed"
    result = await scene.call("echo", {"message": scene.secret})
    equal(result.structured_content, {"message": scene.secret})


@feature("prompts")
async def prompts(scene):
    name = scene.own("test_prompt_with_arguments")
    names = [prompt.name for prompt in await pages(scene.client.list_prompts, "prompts")]
    assert name in names, f"{name} is not listed"
    prompt = await scene.client.get_prompt(name, {"arg1": scene.secret, "arg2": "b"})
    equal(prompt.messages[0].content.text, f"Prompt with arguments: arg1='{scene.secret}', arg2='b'")


@feature("resources")
async def resources(scene):
    uri = f"{scene.upstream}://static-text"
    uris = [str(resource.uri) for resource in await pages(scene.client.list_resources, "resources")]
    assert uri in uris, f"{uri} is not listed"
    content = (await scene.client.read_resource(uri)).contents[0]
    equal(str(content.uri), uri)
    equal(content.text, "This is the content of the static text resource.")


@feature("templates")
async def templates(scene):
    template = f"{scene.upstream}://template/{{id}}/data"
    listed = await pages(scene.client.list_resource_templates, "resource_templates")
    assert template in [one.uri_template for one in listed], f"{template} is not listed"
    content = (await scene.client.read_resource(template.replace("{id}", scene.secret))).contents[0]
    equal(json.loads(content.text)["id"], scene.secret)


@feature("completion")
async def completion(scene):
    prompt = t.PromptReference(type="ref/prompt", name=scene.own("test_prompt_with_arguments"))
    found = await scene.client.complete(prompt, {"name": "arg1", "value": "par"})
    equal(found.completion.values, ["paris", "park", "party"])
    template = t.ResourceTemplateReference(type="ref/resource", uri=f"{scene.upstream}://template/{{id}}/data")
    found = await scene.client.complete(template, {"name": "id", "value": "12"})
    equal(found.completion.values[0], "120")


# On a connection that callers share, a log message does not say whose it is. Another client's call at the same
# moment then costs both their messages, so there it may take a few tries.
@feature("logging")
async def logging(scene):
    log = lambda level: scene.call("test_tool_with_logging", {}, {LOG_LEVEL: level} if level else None)
    if scene.legacy:
        await scene.client.set_logging_level("debug")
    else:
        # A modern client asks with each request, or hears nothing.
        scene.peer.logs.clear()
        await log(None)
        await log("error")
        assert not scene.peer.logs, f"logged without being asked to: {scene.peer.logs}"
    said = lambda: [log.data for log in scene.peer.logs if log.logger == "fixture"]
    whole = lambda: all(step in said() for step in STEPS)
    shared = not scene.upstream.endswith("-http") or (scene.upstream_legacy and not scene.legacy)
    for _ in range(8 if shared else 1):
        scene.peer.logs.clear()
        await log(None if scene.legacy else "debug")
        for _ in range(random.randint(6, 16)):
            if whole():
                return
            await anyio.sleep(0.05)
    raise AssertionError(f"three messages were logged, and these came: {said()}")


@feature("progress")
async def progress(scene):
    seen = []

    async def on_progress(progress, total, message):
        seen.append((progress, total))

    await scene.client.call_tool(scene.own("test_tool_with_progress"), {}, progress_callback=on_progress)
    equal(seen, [(0, 100), (50, 100), (100, 100)])


# The upstream leaves a file when it learns that its caller no longer wants the answer.
@feature("cancellation")
async def cancellation(scene):
    mark = Path(os.environ["INTEROP_MARKS"], scene.secret)

    async def on_progress(*_):
        # The first step shows that the upstream is at it.
        scope.cancel()

    with anyio.CancelScope() as scope:
        arguments = {"ms": 10_000, "mark": str(mark)}
        await scene.client.call_tool(scene.own("slow"), arguments, progress_callback=on_progress)
    assert scope.cancelled_caught, "it was answered"
    await until(mark.exists, "the upstream to hear of it")


@feature("subscriptions")
async def subscriptions(scene):
    uri = f"{scene.upstream}://template/{scene.secret}/data"
    notes = scene.peer.notes
    async with subscribed(scene, uri):
        await scene.call("update_resource", {"uri": uri})
        updated = lambda note: isinstance(note, t.ResourceUpdatedNotification) and str(note.params.uri) == uri
        await until(lambda: any(updated(note) for note in notes), "the resource's update")

        notes.clear()
        name = f"added-{scene.secret}"[:20]
        await scene.call("add_tool", {"name": name})
        changed = lambda note: isinstance(note, t.ToolListChangedNotification)
        await until(lambda: any(changed(note) for note in notes), "the changed list")
        # The others change lists too, so the first notification need not be about this tool.
        for _ in range(50):
            names = [tool.name for tool in (await scene.client.list_tools(cache_mode="refresh")).tools]
            if scene.own(name) in names:
                break
            await anyio.sleep(0.1)
        assert scene.own(name) in names, "the added tool is not listed after the list changed"
        await scene.call("remove_tool", {"name": name})


@asynccontextmanager
async def subscribed(scene, uri):
    if not scene.legacy:
        async with scene.client.listen(tools_list_changed=True, resource_subscriptions=[uri]):
            yield
        return
    await scene.client.subscribe_resource(uri)
    try:
        yield
    finally:
        await scene.client.unsubscribe_resource(uri)


@feature("sampling")
async def sampling(scene):
    prompt = f"what of {scene.upstream}?"
    result = await scene.call("test_sampling", {"prompt": prompt})
    equal(text(result), f"LLM response: {scene.secret}")
    content = scene.once().messages[0].content
    equal((content[0] if isinstance(content, list) else content).text, prompt)


@feature("elicitation (form)")
async def elicitation_form(scene):
    message = f"who uses {scene.upstream}?"
    said = text(await scene.call("test_elicitation", {"message": message}))
    assert "action=accept" in said and scene.secret in said, said
    asked = scene.once()
    assert message in asked.message, asked.message
    equal(sorted(asked.requested_schema["properties"]), ["email", "username"])


@feature("elicitation (URL)")
async def elicitation_url(scene):
    page = f"https://example.com/{scene.secret}"
    said = text(await scene.call("test_elicitation_url", {"url": page}))
    assert "action=accept" in said, said
    asked = scene.once()
    equal((asked.mode, asked.url), ("url", page))
    if not scene.legacy:
        return
    assert asked.elicitation_id, "a legacy client needs an elicitationId"
    # Only a legacy server says that the page is done with, and only a legacy client may hear of it.
    if scene.upstream_legacy:
        about = lambda note: isinstance(note, t.ElicitCompleteNotification) and note.params.elicitation_id
        heard = lambda: any(about(note) == asked.elicitation_id for note in scene.peer.notes)
        await until(heard, "notifications/elicitation/complete")


# A tool is not all that may ask.
@feature("elicitation (prompt, resource)")
async def elicitation_elsewhere(scene):
    prompt = await scene.client.get_prompt(scene.own("test_input_required_result_prompt"))
    equal(prompt.messages[0].content.text, f"In this context: {scene.secret}")
    scene.once()
    scene.asked.clear()
    content = (await scene.client.read_resource(f"{scene.upstream}://input-required")).contents[0]
    equal(content.text, f"read because: {scene.secret}")
    scene.once()


@feature("roots")
async def roots(scene):
    said = text(await scene.call("test_input_required_result_list_roots", {}))
    assert f"file:///{scene.secret}" in said, said
    scene.once()
