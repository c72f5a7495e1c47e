// The npm SDK 1.x, a legacy client over Streamable HTTP: `node sdk1.mjs URL`.

import { load, play, recorder } from "./scenario.mjs";

const { Client } = await load("@modelcontextprotocol/sdk/dist/esm/client/index.js");
const { StreamableHTTPClientTransport } = await load("@modelcontextprotocol/sdk/dist/esm/client/streamableHttp.js");
const { LoggingMessageNotificationSchema } = await load("@modelcontextprotocol/sdk/dist/esm/types.js");

await play("sdk1", process.argv[2], "2025-11-25", async (url) => {
  const { wire, fetch } = recorder();
  const logs = [];
  const client = new Client({ name: "interop-sdk1", version: "1" });
  client.setNotificationHandler(LoggingMessageNotificationSchema, ({ params }) => void logs.push(params));
  const transport = new StreamableHTTPClientTransport(url, { fetch });
  await client.connect(transport);
  return { client, transport, wire, logs, call: (params, options) => client.callTool(params, undefined, options) };
});
