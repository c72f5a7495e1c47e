// Plays what a scenario of the suite's client mode expects of a client, through the gateway that is under test:
// `node conformance.mjs URL`. The suite names the scenario and its revision in MCP_CONFORMANCE_*. The client in front
// is the npm SDK 1.x for legacy revisions and the npm client 2.x for the modern one; it fails when the gateway
// does not give it what the scenario's server gave the gateway.

import assert from "node:assert/strict";

import { all, load, text } from "./scenario.mjs";

const url = new URL(process.argv[2]);
const { MCP_CONFORMANCE_SCENARIO: scenario, MCP_CONFORMANCE_PROTOCOL_VERSION: revision } = process.env;
const context = JSON.parse(process.env.MCP_CONFORMANCE_CONTEXT ?? "{}");
const legacy = revision < "2026";

async function connect(capabilities = {}, elicit = undefined) {
  const info = { name: "interop-conformance", version: "1" };
  if (legacy) {
    const { Client } = await load("@modelcontextprotocol/sdk/dist/esm/client/index.js");
    const { StreamableHTTPClientTransport } = await load("@modelcontextprotocol/sdk/dist/esm/client/streamableHttp.js");
    const { ElicitRequestSchema } = await load("@modelcontextprotocol/sdk/dist/esm/types.js");
    const client = new Client(info, { capabilities });
    if (elicit) client.setRequestHandler(ElicitRequestSchema, elicit);
    await client.connect(new StreamableHTTPClientTransport(url));
    return client;
  }
  const { Client, StreamableHTTPClientTransport } = await load("@modelcontextprotocol/client/dist/index.mjs");
  const client = new Client(info, { capabilities, versionNegotiation: { mode: { pin: revision } } });
  if (elicit) client.setRequestHandler("elicitation/create", elicit);
  await client.connect(new StreamableHTTPClientTransport(url));
  return client;
}

const listed = async (client) => (await all({ client }, "listTools", "tools")).map((tool) => tool.name);

// A modern request without a client library, which would hide tools and add headers of its own.
async function raw(method, params) {
  const meta = {
    "io.modelcontextprotocol/protocolVersion": revision,
    "io.modelcontextprotocol/clientInfo": { name: "interop-conformance", version: "1" },
    "io.modelcontextprotocol/clientCapabilities": {},
  };
  const headers = {
    "content-type": "application/json",
    accept: "application/json, text/event-stream",
    "mcp-protocol-version": revision,
    "mcp-method": method,
    ...(params.name ? { "mcp-name": params.name } : {}),
  };
  const body = JSON.stringify({ jsonrpc: "2.0", id: 1, method, params: { ...params, _meta: meta } });
  return (await fetch(url, { method: "POST", headers, body })).json();
}

const plays = {
  async initialize() {
    assert.deepEqual(await listed(await connect()), []);
  },

  async tools_call() {
    const client = await connect();
    assert.deepEqual(await listed(client), ["add_numbers"]);
    const result = await client.callTool({ name: "add_numbers", arguments: { a: 5, b: 3 } });
    assert.equal(text(result), "The sum of 5 and 3 is 8");
  },

  // The SDK fills in the defaults that the handler leaves out.
  async "elicitation-sep1034-client-defaults"() {
    const elicit = () => ({ action: "accept", content: {} });
    const client = await connect({ elicitation: { form: { applyDefaults: true } } }, elicit);
    for (const name of await listed(client)) await client.callTool({ name, arguments: {} });
  },

  async "sse-retry"() {
    const client = await connect();
    await listed(client);
    const result = await client.callTool({ name: "test_reconnection", arguments: {} });
    assert.equal(text(result), "Reconnection test completed successfully");
  },

  async "request-metadata"() {
    assert.deepEqual(await listed(await connect({ elicitation: {}, sampling: {}, roots: {} })), []);
  },

  async "sep-2322-client-request-state"() {
    // Between the rounds of a call, another one must not get what belongs to it.
    const elicit = async () => {
      assert.equal(text(await client.callTool({ name: "test_mrtr_unrelated", arguments: {} })), "unrelated-ok");
      return { action: "accept", content: { confirmed: true } };
    };
    const client = await connect({ elicitation: { form: {} } }, elicit);
    await listed(client);
    for (const [name, said] of [
      ["test_mrtr_echo_state", "echo-state-ok"],
      ["test_mrtr_no_state", "no-state-ok"],
      ["test_mrtr_no_result_type", "no-result-type-test-ok"],
    ]) {
      assert.equal(text(await client.callTool({ name, arguments: {} })), said);
    }
  },

  async "http-standard-headers"() {
    const client = await connect();
    for (const name of await listed(client)) await client.callTool({ name, arguments: {} });
    for (const { uri } of await all({ client }, "listResources", "resources")) await client.readResource({ uri });
    for (const { name } of await all({ client }, "listPrompts", "prompts")) await client.getPrompt({ name });
  },

  async "http-custom-headers"() {
    const client = await connect();
    await listed(client);
    for (const call of context.toolCalls) await client.callTool(call);
  },

  // The tools a client must leave out are missing from the gateway's list, and nobody can call them by name.
  async "http-invalid-tool-headers"() {
    const { tools } = (await raw("tools/list", {})).result;
    assert.deepEqual(tools.map((tool) => tool.name), ["valid_tool"]);
    for (const name of ["invalid_empty_header", "invalid_object_header", "invalid_space_in_name"]) {
      const { error } = await raw("tools/call", { name, arguments: { value: "x", data: {} } });
      assert.ok(error, `${name} was answered`);
    }
    const client = await connect();
    assert.deepEqual(await listed(client), ["valid_tool"]);
    await client.callTool({ name: "valid_tool", arguments: { region: "us-west1" } });
  },

  async "json-schema-ref-no-deref"() {
    assert.equal((await listed(await connect())).length, 1);
  },

  // What comes through is what the server wrote.
  async "json-schema-2020-12-preservation"() {
    const client = await connect();
    const { tools } = legacy ? await client.listTools() : (await raw("tools/list", {})).result;
    const { inputSchema: schema } = tools.find((tool) => tool.name === "json_schema_2020_12_tool");
    await client.callTool({ name: "json_schema_echo", arguments: { schema } });
  },
};

assert.ok(plays[scenario], `nothing is known of the scenario ${scenario}`);
await plays[scenario]();
process.exit(0);
