// The npm client 2.x: `node client2.mjs scenario|eras URL legacy|auto|2026-07-28`. In auto mode it asks
// `server/discover` first and would fall back to `initialize`; with a version it insists on that version.

import { load, recorder } from "./scenario.mjs";

const { Client, StreamableHTTPClientTransport } = await load("@modelcontextprotocol/client/dist/index.mjs");

const [name, url, mode] = process.argv.slice(2);
const { play } = await import(`./${name}.mjs`);

const expected = mode === "legacy" ? "2025-11-25" : "2026-07-28";
await play(`client2/${mode}`, url, expected, async (url, answers) => {
  const { wire, fetch } = recorder();
  const [logs, notes] = [[], []];
  const client = new Client(
    { name: "interop-client2", version: "1" },
    {
      versionNegotiation: { mode: mode.startsWith("2") ? { pin: mode } : mode },
      capabilities: answers ? { sampling: {}, elicitation: { form: {}, url: {} }, roots: {} } : {},
    },
  );
  client.setNotificationHandler("notifications/message", ({ params }) => void logs.push(params));
  for (const kind of ["resources/updated", "tools/list_changed", "elicitation/complete"]) {
    client.setNotificationHandler(`notifications/${kind}`, (note) => void notes.push(note));
  }
  if (answers) {
    client.setRequestHandler("sampling/createMessage", ({ params }) => answers.sample(params));
    client.setRequestHandler("elicitation/create", ({ params }) => answers.elicit(params));
    client.setRequestHandler("roots/list", () => answers.roots());
  }
  const transport = new StreamableHTTPClientTransport(url, { fetch });
  await client.connect(transport);
  return { client, transport, wire, logs, notes, call: (params, options) => client.callTool(params, options) };
});
