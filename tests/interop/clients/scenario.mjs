// The scenario every JavaScript client plays with real servers; `sdk1.mjs` and `client2.mjs` only say how to
// connect. `scenario.py` is its twin: the same checks, by the same names, in the same order.
//
// The two npm clients have the same method names, so the adapter is small. What a scenario needs of it:
//   connect(url, answers) -> { client, transport, wire, logs, notes, call(params, options) }
// where `wire` is the HTTP traffic (see `recorder`), `logs` collects log messages and `notes` the other
// notifications. With `answers`, the client declares sampling, elicitation and roots, and answers by them.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const EVERY_UPSTREAM = ["everything", "everythingstdio", "files", "memory", "git", "time", "fixture"];
const CHECK_LIMIT_MS = 20_000;

// The packages live in .interop/, where Node's own lookup would not find them from here.
const home = process.env.INTEROP_HOME ?? join(import.meta.dirname, "../../../.interop");
export const load = (file) => import(pathToFileURL(join(home, "node_modules", file)).href);

// A `fetch` that notes every exchange. With INTEROP_TRACE=1 it also prints them.
export function recorder() {
  const wire = [];
  const fetch = async (url, init = {}) => {
    const sent = new Headers(init.headers);
    const body = init.body ? JSON.parse(init.body) : undefined;
    const exchange = { method: init.method ?? "GET", rpc: body?.method, session: sent.get("mcp-session-id") };
    wire.push(exchange);
    const response = await globalThis.fetch(url, init);
    exchange.status = response.status;
    exchange.given = response.headers.get("mcp-session-id");
    if (process.env.INTEROP_TRACE) {
      console.error(`> ${exchange.method} ${JSON.stringify(Object.fromEntries(sent))} ${init.body ?? ""}`);
      const text = response.headers.get("content-type")?.includes("json") ? await response.clone().text() : "";
      const kind = response.headers.get("content-type");
      console.error(`< ${response.status} ${kind} session=${exchange.given} ${text.slice(0, 400)}`);
    }
    return response;
  };
  return { wire, fetch };
}

// Runs the scenario and exits: 0 when every check held. The INTEROP_* variables narrow it for use
// against a single server: INTEROP_UPSTREAMS=everything INTEROP_NAMING=bare INTEROP_EXPECT=2025-11-25.
export async function play(label, url, version, connect) {
  const upstreams = process.env.INTEROP_UPSTREAMS?.split(",") ?? EVERY_UPSTREAM;
  const bare = process.env.INTEROP_NAMING === "bare";
  const scene = {
    url,
    connect,
    upstreams,
    bare,
    expected: process.env.INTEROP_EXPECT ?? version,
    name: (server, own) => (bare ? own : `${server}_${own}`),
    files: process.env.INTEROP_FILES,
    repository: process.env.INTEROP_REPOSITORY,
  };
  scene.legacy = scene.expected < "2026";

  let failed = 0;
  for (const [name, needs, check] of checks) {
    if (needs.era && needs.era !== (scene.legacy ? "legacy" : "modern")) continue;
    if (needs.upstream && !upstreams.includes(needs.upstream)) continue;
    if (needs.prefixed && bare) continue;
    try {
      if (!scene.peer && name !== "connect") throw new Error("not connected");
      await within(CHECK_LIMIT_MS, check(scene));
      console.log(`ok ${label} ${name}`);
    } catch (error) {
      failed += 1;
      const code = error.code === undefined ? "" : ` (code ${error.code})`;
      console.log(`not ok ${label} ${name}: ${String(error.message ?? error).replace(/\s+/g, " ").slice(0, 600)}${code}`);
    }
  }
  process.exit(failed ? 1 : 0);
}

const checks = [
  ["connect", {}, async (scene) => {
    scene.peer = await scene.connect(url(scene));
    assert.equal(version(scene.peer), scene.expected);
  }],

  ["tools-list", {}, async (scene) => {
    const names = (await all(scene.peer, "listTools", "tools")).map((tool) => tool.name);
    unique(names);
    for (const [server, own] of ONE_TOOL_EACH) {
      const name = scene.name(server, own);
      if (scene.upstreams.includes(server)) assert.ok(names.includes(name), `${name} is not listed`);
    }
  }],

  ["everything-echo", { upstream: "everything" }, async (scene) => {
    const said = `hello ${randomUUID()}`;
    assert.equal(text(await call(scene, "everything", "echo", { message: said })), `Echo: ${said}`);
  }],
  ["everything-structured", { upstream: "everything" }, async (scene) => {
    const result = await call(scene, "everything", "get-structured-content", { location: "Chicago" });
    assert.deepEqual(result.structuredContent, { temperature: 36, conditions: "Light rain / drizzle", humidity: 82 });
  }],
  ["everythingstdio-echo", { upstream: "everythingstdio" }, async (scene) => {
    const said = `stdio ${randomUUID()} ünïcödé`;
    assert.equal(text(await call(scene, "everythingstdio", "echo", { message: said })), `Echo: ${said}`);
  }],
  ["everythingstdio-sum", { upstream: "everythingstdio" }, async (scene) => {
    assert.equal(text(await call(scene, "everythingstdio", "get-sum", { a: 40, b: 2 })), "The sum of 40 and 2 is 42.");
  }],

  ["files-write", { upstream: "files" }, async (scene) => {
    scene.note = { path: join(scene.files, `${randomUUID()}.txt`), content: `first line\nsecond line ${randomUUID()}\n` };
    await call(scene, "files", "write_file", scene.note);
    assert.equal(await readFile(scene.note.path, "utf8"), scene.note.content);
  }],
  ["files-read", { upstream: "files" }, async (scene) => {
    assert.equal(text(await call(scene, "files", "read_text_file", { path: scene.note.path })), scene.note.content);
  }],
  ["files-list", { upstream: "files" }, async (scene) => {
    const listing = text(await call(scene, "files", "list_directory", { path: scene.files }));
    assert.match(listing, new RegExp(`\\[FILE\\] ${scene.note.path.split("/").pop()}`));
  }],

  ["memory-create", { upstream: "memory" }, async (scene) => {
    scene.entity = { name: `entity ${randomUUID()}`, entityType: "test", observations: ["seen once"] };
    const result = await call(scene, "memory", "create_entities", { entities: [scene.entity] });
    assert.deepEqual(result.structuredContent, { entities: [scene.entity] });
  }],
  ["memory-read", { upstream: "memory" }, async (scene) => {
    const { entities } = (await call(scene, "memory", "read_graph", {})).structuredContent;
    assert.deepEqual(entities.find((entity) => entity.name === scene.entity.name), scene.entity);
  }],

  ["git-status", { upstream: "git" }, async (scene) => {
    const status = text(await call(scene, "git", "git_status", { repo_path: scene.repository }));
    assert.match(status, /Repository status:[^]*untracked\.txt/);
  }],
  ["git-log", { upstream: "git" }, async (scene) => {
    assert.match(text(await call(scene, "git", "git_log", { repo_path: scene.repository, max_count: 1 })), /the only commit/);
  }],

  ["time-now", { upstream: "time" }, async (scene) => {
    const now = (await call(scene, "time", "get_current_time", { timezone: "Europe/Paris" })).structuredContent;
    assert.equal(now.timezone, "Europe/Paris");
    assert.ok(Math.abs(Date.parse(now.datetime) - Date.now()) < 60_000, `${now.datetime} is not now`);
  }],
  ["time-convert", { upstream: "time" }, async (scene) => {
    const times = { source_timezone: "Asia/Tokyo", time: "12:00", target_timezone: "Asia/Kathmandu" };
    const { target, time_difference } = (await call(scene, "time", "convert_time", times)).structuredContent;
    assert.match(target.datetime, /T08:45:00\+05:45$/);
    assert.equal(time_difference, "-3.25h");
  }],

  ["fixture-structured", { upstream: "fixture" }, async (scene) => {
    const said = `structured ${randomUUID()}`;
    const result = await call(scene, "fixture", "echo", { message: said });
    assert.deepEqual(result.structuredContent, { message: said });
  }],
  ["fixture-text", { upstream: "fixture" }, async (scene) => {
    assert.match(text(await call(scene, "fixture", "test_simple_text", {})), /simple text/);
  }],

  // A failure inside a tool is a result the model reads, not a protocol error.
  ["tool-error", {}, async (scene) => {
    const result = scene.upstreams.includes("files")
      ? await raw(scene, "files", "read_text_file", { path: join(scene.files, "no such file") })
      : await raw(scene, "everything", "get-sum", { a: "one" });
    assert.equal(result.isError, true);
    assert.notEqual(text(result), "");
  }],
  // Not against a server alone: server-everything answers an unknown tool with an `isError` result.
  ["unknown-tool", { prefixed: true }, async (scene) => {
    for (const name of ["everything_no-such-tool", "nowhere_nothing"]) {
      await assert.rejects(scene.peer.call({ name, arguments: {} }), (error) => {
        assert.equal(error.code, -32602, `${name}: ${error.message}`);
        return true;
      });
    }
  }],

  ["prompts-list", { upstream: "everything" }, async (scene) => {
    const names = (await all(scene.peer, "listPrompts", "prompts")).map((prompt) => prompt.name);
    unique(names);
    for (const own of ["simple-prompt", "args-prompt", "completable-prompt", "resource-prompt"]) {
      assert.ok(names.includes(scene.name("everything", own)), `${own} of everything is not listed`);
    }
  }],
  ["prompts-get", { upstream: "everything" }, async (scene) => {
    const name = scene.name("everything", "args-prompt");
    const prompt = await scene.peer.client.getPrompt({ name, arguments: { city: "Gent", state: "Flanders" } });
    assert.equal(prompt.messages[0].content.text, "What's weather in Gent, Flanders?");
  }],
  // The listed URI is read as listed: whether a gateway rewrites URIs is its own affair.
  ["resources-list", { upstream: "everything" }, async (scene) => {
    const uris = (await all(scene.peer, "listResources", "resources")).map((resource) => resource.uri);
    unique(uris);
    scene.document = uris.find((uri) => uri.includes("architecture.md"));
    assert.ok(scene.document, `no architecture.md among ${uris}`);
  }],
  ["resources-read", { upstream: "everything" }, async (scene) => {
    const { contents } = await scene.peer.client.readResource({ uri: scene.document });
    assert.equal(contents[0].uri, scene.document);
    assert.match(contents[0].text, /Everything Server/);
  }],
  ["resource-templates", { upstream: "everything" }, async (scene) => {
    const listed = await all(scene.peer, "listResourceTemplates", "resourceTemplates");
    const templates = listed.map((template) => template.uriTemplate);
    unique(templates);
    const template = templates.find((uri) => uri.includes("resource/dynamic/text"));
    assert.ok(template, `no dynamic text resource among ${templates}`);
    const { contents } = await scene.peer.client.readResource({ uri: template.replace("{resourceId}", "7") });
    assert.match(contents[0].text, /^Resource 7: /);
  }],
  ["completion", { upstream: "everything" }, async (scene) => {
    const ref = { type: "ref/prompt", name: scene.name("everything", "completable-prompt") };
    const { completion } = await scene.peer.client.complete({ ref, argument: { name: "department", value: "S" } });
    assert.deepEqual(completion.values, ["Sales", "Support"]);
    const dependent = await scene.peer.client.complete({
      ref, argument: { name: "name", value: "" }, context: { arguments: { department: "Sales" } },
    });
    assert.deepEqual(dependent.completion.values, ["David", "Eve", "Frank"]);
  }],

  ["progress", { upstream: "everything" }, async (scene) => {
    const seen = [];
    const request = { name: scene.name("everything", "trigger-long-running-operation"), arguments: { duration: 1, steps: 4 } };
    const result = await scene.peer.call(request, { onprogress: ({ progress, total }) => seen.push(`${progress}/${total}`) });
    assert.match(text(result), /completed/);
    assert.deepEqual(seen, ["1/4", "2/4", "3/4", "4/4"]);
  }],
  ["parallel-calls", { upstream: "everything" }, async (scene) => {
    const slow = call(scene, "everything", "trigger-long-running-operation", { duration: 1, steps: 1 });
    const quick = Array.from({ length: 20 }, (_, i) => call(scene, "everything", "echo", { message: `no ${i}` }));
    assert.deepEqual((await Promise.all(quick)).map(text), quick.map((_, i) => `Echo: no ${i}`));
    assert.match(text(await slow), /completed/);
  }],

  ["ping", { era: "legacy" }, async (scene) => {
    await scene.peer.client.ping();
  }],
  ["logging-in-call", { era: "legacy", upstream: "fixture" }, async (scene) => {
    await scene.peer.client.setLoggingLevel("debug");
    scene.peer.logs.length = 0;
    await call(scene, "fixture", "test_tool_with_logging", {});
    await until(() => scene.peer.logs.length >= 3, "three log messages");
  }],
  // These messages belong to no request: they come over the session's own GET stream.
  ["logging-between-calls", { era: "legacy", upstream: "everything" }, async (scene) => {
    await scene.peer.client.setLoggingLevel("debug");
    scene.peer.logs.length = 0;
    await call(scene, "everything", "toggle-simulated-logging", {});
    try {
      await until(() => scene.peer.logs.some((log) => /level[ -]message/i.test(log.data)), "a log message");
    } finally {
      await call(scene, "everything", "toggle-simulated-logging", {});
    }
  }],

  ["second-session", {}, async (scene) => {
    const second = await scene.connect(url(scene));
    assert.equal(version(second), scene.expected);
    const said = (who) => who.call({ name: scene.name("everything", "echo"), arguments: { message: "both" } });
    const [mine, other] = await Promise.all([said(scene.peer), said(second)]);
    assert.equal(text(mine), text(other));
    if (scene.legacy) assert.notEqual(second.transport.sessionId, scene.peer.transport.sessionId);
    await end(second);
    assert.equal(text(await said(scene.peer)), "Echo: both");
  }],

  ["stateless", { era: "modern" }, async (scene) => {
    const given = scene.peer.wire.filter((exchange) => exchange.given || exchange.session);
    assert.deepEqual(given, [], "a modern exchange carried a session id");
    assert.deepEqual(scene.peer.wire.filter((exchange) => exchange.rpc === "initialize"), []);
  }],
  ["close", {}, async (scene) => {
    const session = scene.peer.transport.sessionId;
    await end(scene.peer);
    if (!scene.legacy) return;
    const bye = scene.peer.wire.find((exchange) => exchange.method === "DELETE");
    assert.ok(bye && bye.status >= 200 && bye.status < 300, `DELETE was answered ${bye?.status}`);
    const late = await fetch(scene.url, {
      method: "POST",
      headers: {
        "content-type": "application/json",
        accept: "application/json, text/event-stream",
        "mcp-session-id": session,
        "mcp-protocol-version": scene.expected,
      },
      body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list" }),
    });
    await late.body?.cancel();
    // Against a server alone this is looser: server-everything says 400 where the specification says 404.
    const gone = late.status === 404 || (late.status === 400 && scene.bare);
    assert.ok(gone, `the ended session was answered ${late.status}`);
  }],
];

const ONE_TOOL_EACH = [
  ["everything", "echo"],
  ["everythingstdio", "get-sum"],
  ["files", "read_text_file"],
  ["memory", "read_graph"],
  ["git", "git_status"],
  ["time", "convert_time"],
  ["fixture", "echo"],
];

const url = (scene) => new URL(scene.url);

export const version = ({ client, transport }) => client.getNegotiatedProtocolVersion?.() ?? transport.protocolVersion;

async function end({ client, transport }) {
  if (transport.sessionId) await transport.terminateSession();
  await client.close();
}

async function raw(scene, server, tool, args) {
  return scene.peer.call({ name: scene.name(server, tool), arguments: args });
}

async function call(scene, server, tool, args) {
  const result = await raw(scene, server, tool, args);
  assert.ok(!result.isError, `${server} ${tool} failed: ${text(result)}`);
  return result;
}

// Every page of a list.
export async function all({ client }, method, key) {
  const items = [];
  let cursor;
  do {
    const page = await client[method](cursor === undefined ? undefined : { cursor });
    items.push(...page[key]);
    cursor = page.nextCursor;
  } while (cursor !== undefined);
  return items;
}

function unique(names) {
  const twice = names.filter((name, i) => names.indexOf(name) !== i);
  assert.deepEqual(twice, [], `listed twice: ${twice}`);
}

export function text(result) {
  return result.content.filter((block) => block.type === "text").map((block) => block.text).join("\n");
}

export async function until(ready, what, limit = 8_000) {
  // server-everything repeats itself every five seconds, so eight are enough to see it once.
  for (let waited = 0; waited < limit; waited += 50) {
    if (ready()) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`waited in vain for ${what}`);
}

export async function within(limit, work) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${limit / 1000} s`)), limit);
  });
  return Promise.race([work, late]).finally(() => clearTimeout(timer));
}
