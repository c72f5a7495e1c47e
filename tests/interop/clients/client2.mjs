// The npm client 2.x: `node client2.mjs URL auto|2026-07-28`. In auto mode it asks `server/discover` first
// and would fall back to `initialize`; with a version it insists on that version.

import { load, play, recorder } from "./scenario.mjs";

const { Client, StreamableHTTPClientTransport } = await load("@modelcontextprotocol/client/dist/index.mjs");

const mode = process.argv[3] ?? "auto";

await play(`client2/${mode}`, process.argv[2], "2026-07-28", async (url) => {
  const { wire, fetch } = recorder();
  const logs = [];
  const client = new Client(
    { name: "interop-client2", version: "1" },
    { versionNegotiation: { mode: mode === "auto" ? "auto" : { pin: mode } } },
  );
  client.setNotificationHandler("notifications/message", ({ params }) => void logs.push(params));
  const transport = new StreamableHTTPClientTransport(url, { fetch });
  await client.connect(transport);
  return { client, transport, wire, logs, call: (params, options) => client.callTool(params, options) };
});
