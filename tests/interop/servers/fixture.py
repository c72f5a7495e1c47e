"""A server on the PyPI package mcp 2.x with every kind of feature, pinned to one protocol era.

`fixture.py http|sse|stdio legacy|modern SCHEME`: over HTTP its first line names its URL. It is the twin of the
rmcp fixture as far as `eras.py` goes: the same names and the same texts, with resources under SCHEME. It does
everything the way the library's own documentation does, because that is what a gateway meets: roots, for one,
are asked for outside of the request that needs them.
"""

import json
import sys
import warnings
from pathlib import Path

import anyio
import mcp.types as t
import uvicorn
from mcp.server.lowlevel import NotificationOptions, Server
from mcp.server.runner import serve_loop
from mcp.server.sse import SseServerTransport
from mcp.server.stdio import stdio_server
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler
from mcp.shared.exceptions import MCPError
from mcp.shared.subscriptions import ResourceUpdated, ToolsListChanged
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

# Sampling, roots and logging are deprecated, and servers still offer them.
warnings.simplefilter("ignore")

MODERN = "2026-07-28"
WORDS = ["paris", "park", "party", "test", "testing", "tested"]
STEPS = 10

transport, era, scheme = sys.argv[1:4]

added = {}
uris = []  # (session, uri) of legacy subscribers
sessions = []  # every legacy session
bus = InMemorySubscriptionBus()


def tool(name, description, /, **properties):
    schema = {"type": "object", "properties": properties, "required": [one for one in properties if one != "mark"]}
    return t.Tool(name=name, description=description, input_schema=schema)


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
TOOLS = [
    t.Tool(name="echo", description="Returns its arguments, as text and structured.", input_schema={"type": "object"}),
    tool("test_tool_with_logging", "Sends three log messages while it runs."),
    tool("test_tool_with_progress", "Sends three progress notifications, if asked to."),
    tool("slow", "Takes so long; can be cancelled, and then leaves a file `mark`.", ms=WHOLE, mark=TEXT),
    tool("add_tool", "Adds a tool to the list.", name=TEXT),
    tool("remove_tool", "Removes an added tool from the list.", name=TEXT),
    tool("update_resource", "Tells the resource's subscribers of an update.", uri=TEXT),
    tool("test_sampling", "Asks the client's model.", prompt=TEXT),
    tool("test_elicitation", "Asks the user for a name and an address.", message=TEXT),
    tool("test_elicitation_url", "Asks the user to open a page.", url=TEXT),
    tool("test_input_required_result_list_roots", "Asks for the client's roots."),
]


async def list_tools(ctx, params):
    return t.ListToolsResult(tools=[*TOOLS, *added.values()])


async def call_tool(ctx, params):
    arguments = params.arguments or {}
    match params.name:
        case "echo":
            return t.CallToolResult(content=[line(json.dumps(arguments))], structured_content=arguments)
        case "test_tool_with_logging":
            for said in ("Tool execution started", "Tool processing data", "Tool execution completed"):
                await ctx.session.send_log_message("info", said, "fixture", related_request_id=ctx.request_id)
                await anyio.sleep(0.02)
            return text("Logged three messages.")
        case "test_tool_with_progress":
            for done in (0, 50, 100):
                await ctx.session.report_progress(done, 100)
                await anyio.sleep(0.02)
            return text("Went through three steps.")
        case "slow":
            return await slow(ctx, arguments)
        case "add_tool":
            added[arguments["name"]] = tool(arguments["name"], "Added by a test.")
            await changed()
            return text(f"added {arguments['name']}")
        case "remove_tool":
            added.pop(arguments["name"])
            await changed()
            return text(f"removed {arguments['name']}")
        case "update_resource":
            await updated(arguments["uri"])
            return text(f"updated {arguments['uri']}")
        case "test_sampling":
            message = t.SamplingMessage(role="user", content=line(arguments["prompt"]))
            question = t.CreateMessageRequest(params=t.CreateMessageRequestParams(messages=[message], max_tokens=100))
            answer = await ask(ctx, params, question, "sampling")
            return pending(answer) or text(f"LLM response: {answer['content']['text']}")
        case "test_elicitation":
            answer = await ask(ctx, params, form(arguments["message"], "username", "email"), "elicitation")
            return pending(answer) or described(answer)
        case "test_elicitation_url":
            answer = await ask(ctx, params, page(arguments["url"]), "elicitation")
            return pending(answer) or described(answer)
        case "test_input_required_result_list_roots":
            answer = await ask(ctx, params, t.ListRootsRequest(), "roots")
            return pending(answer) or text(f"The client has these roots: {json.dumps(answer['roots'])}")
        case name if name in added:
            return text("Here, for now.")
    raise MCPError(t.INVALID_PARAMS, f"unknown tool: {params.name}")


async def slow(ctx, arguments):
    try:
        for done in range(1, STEPS + 1):
            await anyio.sleep(arguments["ms"] / 1000 / STEPS)
            await ctx.session.report_progress(done, STEPS)
    except anyio.get_cancelled_exc_class():
        if "mark" in arguments:
            Path(arguments["mark"]).write_text("cancelled")
        raise
    return text(f"took {arguments['ms']} ms")


async def ask(ctx, params, request, capability):
    """The client's answer; in the modern era first a result that asks for it, and the answer on the retry."""
    about = getattr(params, "name", None) or params.uri
    if not getattr(ctx.session.client_capabilities, capability, None):
        raise MCPError(t.INVALID_REQUEST, f"the client does not support {capability}")
    if ctx.protocol_version >= MODERN:
        responses = params.input_responses or {}
        if "answer" not in responses:
            return t.InputRequiredResult(input_requests={"answer": request}, request_state=f"asked {about}")
        if params.request_state != f"asked {about}":
            raise MCPError(t.INVALID_PARAMS, f"the request state is not this server's: {params.request_state}")
        answer = responses["answer"]
        return answer if isinstance(answer, dict) else wire(answer)
    return wire(await ask_now(ctx, request))


async def ask_now(ctx, request):
    session, about = ctx.session, ctx.request_id
    match request:
        case t.CreateMessageRequest(params=params):
            return await session.create_message(
                params.messages, max_tokens=params.max_tokens, related_request_id=about
            )  # fmt: skip
        case t.ElicitRequest(params=t.ElicitRequestURLParams() as params):
            answer = await session.elicit_url(params.message, params.url, params.elicitation_id, about)
            await session.send_elicit_complete(params.elicitation_id, about)
            return answer
        case t.ElicitRequest(params=params):
            return await session.elicit_form(params.message, params.requested_schema, about)
    return await session.list_roots()


def form(message, *fields):
    schema = {"type": "object", "properties": dict.fromkeys(fields, TEXT), "required": list(fields)}
    return t.ElicitRequest(params=t.ElicitRequestFormParams(message=message, requested_schema=schema))


def page(url):
    identity = {"elicitation_id": url} if era == "legacy" else {}
    return t.ElicitRequest(params=t.ElicitRequestURLParams(message="Please open this page", url=url, **identity))


def pending(answer):
    return answer if isinstance(answer, t.InputRequiredResult) else None


def described(answer):
    return text(f"User response: action={answer['action']}, content={json.dumps(answer.get('content'))}")


async def list_prompts(ctx, params):
    arguments = [t.PromptArgument(name=name, required=True) for name in ("arg1", "arg2")]
    prompts = [
        t.Prompt(name="test_prompt_with_arguments", arguments=arguments),
        t.Prompt(name="test_input_required_result_prompt", description="Asks the user for its context."),
    ]
    return t.ListPromptsResult(prompts=prompts)


async def get_prompt(ctx, params):
    if params.name == "test_input_required_result_prompt":
        answer = await ask(ctx, params, form("What context should the prompt use?", "context"), "elicitation")
        if pending(answer):
            return answer
        said = f"In this context: {answer['content']['context']}"
    elif params.name == "test_prompt_with_arguments":
        said = "Prompt with arguments: arg1='{arg1}', arg2='{arg2}'".format(**params.arguments)
    else:
        raise MCPError(t.INVALID_PARAMS, f"unknown prompt: {params.name}")
    return t.GetPromptResult(messages=[t.PromptMessage(role="user", content=line(said))])


async def list_resources(ctx, params):
    own = lambda name: t.Resource(uri=f"{scheme}://{name}", name=name, mime_type="text/plain")
    return t.ListResourcesResult(resources=[own("static-text"), own("input-required")])


async def list_templates(ctx, params):
    template = t.ResourceTemplate(uri_template=f"{scheme}://template/{{id}}/data", name="template-data")
    return t.ListResourceTemplatesResult(resource_templates=[template])


async def read_resource(ctx, params):
    path = params.uri.removeprefix(f"{scheme}://")
    if path == "static-text":
        said = "This is the content of the static text resource."
    elif path == "input-required":
        answer = await ask(ctx, params, form("Why should this be read?", "reason"), "elicitation")
        if pending(answer):
            return answer
        said = f"read because: {answer['content']['reason']}"
    elif path.startswith("template/") and path.endswith("/data"):
        said = json.dumps({"id": path.split("/")[1]})
    else:
        raise MCPError(t.INVALID_PARAMS, "Resource not found", {"uri": params.uri})
    return t.ReadResourceResult(contents=[t.TextResourceContents(uri=params.uri, text=said)])


async def complete(ctx, params):
    prompt = isinstance(params.ref, t.PromptReference)
    candidates = WORDS if prompt else [str(number) for number in range(100, 130)]
    fitting = [one for one in candidates if one.startswith(params.argument.value)]
    return t.CompleteResult(completion=t.Completion(values=fitting, total=len(fitting), has_more=False))


async def set_level(ctx, params):
    return t.EmptyResult()


async def subscribe(ctx, params):
    uris.append((ctx.session, str(params.uri)))
    return t.EmptyResult()


async def unsubscribe(ctx, params):
    uris[:] = [(session, uri) for session, uri in uris if session is not ctx.session or uri != str(params.uri)]
    return t.EmptyResult()


async def changed():
    await bus.publish(ToolsListChanged())
    for session in list(sessions):
        await told(session, session.send_tool_list_changed())


async def updated(uri):
    await bus.publish(ResourceUpdated(uri=uri))
    for session in [session for session, wanted in uris if wanted == uri]:
        await told(session, session.send_resource_updated(uri))


async def told(session, telling):
    """A session that is over is forgotten the first time it cannot be told something."""
    try:
        await telling
    except Exception:
        sessions[:] = [one for one in sessions if one is not session]
        uris[:] = [(one, uri) for one, uri in uris if one is not session]


async def remember(ctx, call_next):
    if ctx.method == "notifications/initialized":
        sessions.append(ctx.session)
    return await call_next(ctx)


def line(said):
    return t.TextContent(type="text", text=said)


def text(said):
    return t.CallToolResult(content=[line(said)])


def wire(model):
    return model.model_dump(by_alias=True, mode="json", exclude_none=True)


class Fixture(Server):
    """Legacy clients hear of changed lists only when the options say so, and the HTTP transport asks for none."""

    def create_initialization_options(self, notification_options=None, *rest):
        everything = NotificationOptions(prompts_changed=True, resources_changed=True, tools_changed=True)
        return super().create_initialization_options(notification_options or everything, *rest)


server = Fixture(
    f"python-{era}",
    version="1",
    on_list_tools=list_tools,
    on_call_tool=call_tool,
    on_list_prompts=list_prompts,
    on_get_prompt=get_prompt,
    on_list_resources=list_resources,
    on_list_resource_templates=list_templates,
    on_read_resource=read_resource,
    on_completion=complete,
    on_set_logging_level=set_level,
    on_subscribe_resource=subscribe,
    on_unsubscribe_resource=unsubscribe,
    **({"on_subscriptions_listen": ListenHandler(bus)} if era == "modern" else {}),
)
server.middleware.append(remember)


def one_era(app):
    """Refuses the other era the way a server that never heard of it, or no longer knows it, does."""

    async def serve(scope, receive, send):
        if scope["type"] == "http":
            named = dict(scope["headers"]).get(b"mcp-protocol-version", b"").decode()
            error = None
            if era == "legacy" and named >= MODERN:
                error = t.ErrorData(code=-32600, message=f"Bad Request: Unsupported protocol version: {named}")
            elif era == "modern" and scope["method"] != "POST":
                return await Response(status_code=405)(scope, receive, send)
            elif era == "modern" and named < MODERN:
                data = {"supported": [MODERN], "requested": named or "2025-03-26"}
                error = t.ErrorData(code=-32022, message="Unsupported protocol version", data=data)
            if error:
                body = {"jsonrpc": "2.0", "id": None, "error": wire(error)}
                return await JSONResponse(body, 400)(scope, receive, send)
        await app(scope, receive, send)

    return serve


async def serve_streams(read, write):
    if era == "modern":
        await server.run(read, write, server.create_initialization_options())
        return
    async with server.lifespan(server) as state:
        options = server.create_initialization_options()
        await serve_loop(server, read, write, lifespan_state=state, init_options=options)


def sse_app():
    streams = SseServerTransport("/messages/")

    async def connect(request):
        async with streams.connect_sse(request.scope, request.receive, request._send) as (read, write):
            await serve_streams(read, write)
        return Response()

    return Starlette(routes=[Route("/sse", connect), Mount("/messages/", streams.handle_post_message)])


async def main():
    if transport == "stdio":
        async with stdio_server() as (read, write):
            await serve_streams(read, write)
        return
    app, path = (sse_app(), "sse") if transport == "sse" else (one_era(server.streamable_http_app()), "mcp")
    # Open streams do not hold the process back: whoever ends it means it.
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=0)
    web = uvicorn.Server(config)
    async with anyio.create_task_group() as group:
        group.start_soon(web.serve)
        while not web.started:
            await anyio.sleep(0.02)
        port = web.servers[0].sockets[0].getsockname()[1]
        print(f"listening on http://127.0.0.1:{port}/{path}", flush=True)


anyio.run(main)
