// The npm SDK 1.x, a legacy client over Streamable HTTP: `node sdk1.mjs scenario|eras URL`.

import { load, recorder } from "./scenario.mjs";

const { Client } = await load("@modelcontextprotocol/sdk/dist/esm/client/index.js");
const { StreamableHTTPClientTransport } = await load("@modelcontextprotocol/sdk/dist/esm/client/streamableHttp.js");
const types = await load("@modelcontextprotocol/sdk/dist/esm/types.js");

const [name, url] = process.argv.slice(2);
const { play } = await import(`./${name}.mjs`);

await play("sdk1", url, "2025-11-25", async (url, answers) => {
  const { wire, fetch } = recorder();
  const [logs, notes] = [[], []];
  const capabilities = answers ? { sampling: {}, elicitation: { form: {}, url: {} }, roots: {} } : {};
  const client = new Client({ name: "interop-sdk1", version: "1" }, { capabilities });
  client.setNotificationHandler(types.LoggingMessageNotificationSchema, ({ params }) => void logs.push(params));
  for (const kind of ["ResourceUpdated", "ToolListChanged", "ElicitationComplete"]) {
    client.setNotificationHandler(types[`${kind}NotificationSchema`], (note) => void notes.push(note));
  }
  if (answers) {
    client.setRequestHandler(types.CreateMessageRequestSchema, ({ params }) => answers.sample(params));
    client.setRequestHandler(types.ElicitRequestSchema, ({ params }) => answers.elicit(params));
    client.setRequestHandler(types.ListRootsRequestSchema, () => answers.roots());
  }
  const transport = new StreamableHTTPClientTransport(url, { fetch });
  await client.connect(transport);
  const call = (params, options) => client.callTool(params, undefined, options);
  return { client, transport, wire, logs, notes, call };
});
