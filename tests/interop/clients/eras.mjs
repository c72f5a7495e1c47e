// What the JavaScript clients play against upstreams of either era: every kind of feature, by each upstream.
// `eras.py` is its twin. INTEROP_ERAS maps the upstreams to their eras, INTEROP_FEATURES to what is played; an upstream's name is also the scheme of its
// resources. Prints `ok CLIENT UPSTREAM FEATURE`, or `not ok` with the reason.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { join } from "node:path";

import { all, text, until, version, within } from "./scenario.mjs";

const CHECK_LIMIT_MS = 12_000;
const LOG_LEVEL = "io.modelcontextprotocol/logLevel";
const STEPS = ["Tool execution started", "Tool processing data", "Tool execution completed"];

export async function play(label, url, expected, connect) {
  const upstreams = JSON.parse(process.env.INTEROP_ERAS);
  const played = JSON.parse(process.env.INTEROP_FEATURES);
  const scene = { legacy: expected < "2026", asked: [], secret: "" };
  let broken;
  try {
    scene.peer = await within(CHECK_LIMIT_MS, connect(new URL(url), answers(scene)));
    assert.equal(version(scene.peer), expected);
  } catch (error) {
    broken = new Error(`not connected: ${error.message}`);
  }

  let failed = 0;
  for (const [upstream, era] of Object.entries(upstreams)) {
    Object.assign(scene, { upstream, upstreamLegacy: era === "legacy" });
    for (const [feature, check] of Object.entries(features)) {
      if (!played[upstream].includes(feature)) continue;
      // Whatever is asked during a check must concern it; its answer carries this.
      scene.secret = randomUUID();
      scene.asked.length = 0;
      try {
        if (broken) throw broken;
        await within(CHECK_LIMIT_MS, check(scene));
        console.log(`ok ${label} ${upstream} ${feature}`);
      } catch (error) {
        failed += 1;
        const code = error.code === undefined ? "" : ` (code ${error.code})`;
        const reason = String(error.message ?? error).replace(/\s+/g, " ").slice(0, 400);
        console.log(`not ok ${label} ${upstream} ${feature}: ${reason}${code}`);
      }
    }
  }
  console.log(`done ${label}`);
  process.exit(failed ? 1 : 0);
}

const answers = (scene) => ({
  sample(params) {
    scene.asked.push(params);
    return { role: "assistant", content: { type: "text", text: scene.secret }, model: "none", stopReason: "endTurn" };
  },
  elicit(params) {
    scene.asked.push(params);
    if (params.mode === "url") return { action: "accept" };
    const content = Object.keys(params.requestedSchema.properties).map((field) => [field, scene.secret]);
    return { action: "accept", content: Object.fromEntries(content) };
  },
  roots() {
    scene.asked.push({});
    return { roots: [{ uri: `file:///${scene.secret}`, name: "the root" }] };
  },
});

const features = {
  async tools(scene) {
    const names = (await all(scene.peer, "listTools", "tools")).map((tool) => tool.name);
    assert.ok(names.includes(own(scene, "echo")), `${own(scene, "echo")} is not listed`);
    const result = await call(scene, "echo", { message: scene.secret });
    assert.deepEqual(result.structuredContent, { message: scene.secret });
  },

  async prompts(scene) {
    const name = own(scene, "test_prompt_with_arguments");
    const names = (await all(scene.peer, "listPrompts", "prompts")).map((prompt) => prompt.name);
    assert.ok(names.includes(name), `${name} is not listed`);
    const prompt = await scene.peer.client.getPrompt({ name, arguments: { arg1: scene.secret, arg2: "b" } });
    assert.equal(prompt.messages[0].content.text, `Prompt with arguments: arg1='${scene.secret}', arg2='b'`);
  },

  async resources(scene) {
    const uri = `${scene.upstream}://static-text`;
    const uris = (await all(scene.peer, "listResources", "resources")).map((resource) => resource.uri);
    assert.ok(uris.includes(uri), `${uri} is not listed`);
    const { contents } = await scene.peer.client.readResource({ uri });
    assert.equal(contents[0].uri, uri);
    assert.equal(contents[0].text, "This is the content of the static text resource.");
  },

  async templates(scene) {
    const template = `${scene.upstream}://template/{id}/data`;
    const listed = await all(scene.peer, "listResourceTemplates", "resourceTemplates");
    assert.ok(listed.some((one) => one.uriTemplate === template), `${template} is not listed`);
    const { contents } = await scene.peer.client.readResource({ uri: template.replace("{id}", scene.secret) });
    assert.equal(JSON.parse(contents[0].text).id, scene.secret);
  },

  async completion(scene) {
    const prompt = { type: "ref/prompt", name: own(scene, "test_prompt_with_arguments") };
    const ofPrompt = await scene.peer.client.complete({ ref: prompt, argument: { name: "arg1", value: "par" } });
    assert.deepEqual(ofPrompt.completion.values, ["paris", "park", "party"]);
    const template = { type: "ref/resource", uri: `${scene.upstream}://template/{id}/data` };
    const ofTemplate = await scene.peer.client.complete({ ref: template, argument: { name: "id", value: "12" } });
    assert.equal(ofTemplate.completion.values[0], "120");
  },

  // On a connection that callers share, a log message does not say whose it is. Another client's call at the same
  // moment then costs both their messages, so there it may take a few tries.
  async logging(scene) {
    const log = (level) => call(scene, "test_tool_with_logging", {}, level ? { _meta: { [LOG_LEVEL]: level } } : {});
    if (scene.legacy) {
      await scene.peer.client.setLoggingLevel("debug");
    } else {
      // A modern client asks with each request, or hears nothing.
      scene.peer.logs.length = 0;
      await log(undefined);
      await log("error");
      assert.deepEqual(scene.peer.logs, [], "logged without being asked to");
    }
    const said = () => scene.peer.logs.filter((log) => log.logger === "fixture").map((log) => log.data);
    const whole = () => STEPS.every((step) => said().includes(step));
    const shared = !scene.upstream.endsWith("-http") || (scene.upstreamLegacy && !scene.legacy);
    for (let tries = shared ? 8 : 1; tries > 0 && !whole(); tries -= 1) {
      scene.peer.logs.length = 0;
      await log(scene.legacy ? undefined : "debug");
      await until(whole, "three log messages", 300 + 500 * Math.random()).catch(() => {});
    }
    assert.ok(whole(), `three messages were logged, and these came: ${JSON.stringify(said())}`);
  },

  async progress(scene) {
    const seen = [];
    const request = { name: own(scene, "test_tool_with_progress"), arguments: {} };
    await scene.peer.call(request, { onprogress: ({ progress, total }) => seen.push(`${progress}/${total}`) });
    assert.deepEqual(seen, ["0/100", "50/100", "100/100"]);
  },

  // The upstream leaves a file when it learns that its caller no longer wants the answer.
  async cancellation(scene) {
    const mark = join(process.env.INTEROP_MARKS, scene.secret);
    const stop = new AbortController();
    const request = { name: own(scene, "slow"), arguments: { ms: 10_000, mark } };
    // The first step shows that the upstream is at it.
    const slow = scene.peer.call(request, { signal: stop.signal, onprogress: () => stop.abort("not wanted") });
    await assert.rejects(slow);
    await until(() => existsSync(mark), "the upstream to hear of it");
  },

  async subscriptions(scene) {
    const { client, notes } = scene.peer;
    const uri = `${scene.upstream}://template/${scene.secret}/data`;
    const filter = { toolsListChanged: true, resourceSubscriptions: [uri] };
    const subscription = scene.legacy ? await client.subscribeResource({ uri }) : await client.listen(filter);
    try {
      await call(scene, "update_resource", { uri });
      const updated = (note) => note.method === "notifications/resources/updated" && note.params.uri === uri;
      await until(() => notes.some(updated), "the resource's update");

      notes.length = 0;
      const name = `added-${scene.secret}`.slice(0, 20);
      await call(scene, "add_tool", { name });
      await until(() => notes.some((note) => note.method === "notifications/tools/list_changed"), "the changed list");
      // The others change lists too, so the first notification need not be about this tool.
      let names = [];
      for (let tries = 0; tries < 50 && !names.includes(own(scene, name)); tries += 1) {
        if (tries) await new Promise((resolve) => setTimeout(resolve, 100));
        const { tools } = await client.listTools(undefined, { cacheMode: "refresh" });
        names = tools.map((tool) => tool.name);
      }
      assert.ok(names.includes(own(scene, name)), "the added tool is not listed after the list changed");
      await call(scene, "remove_tool", { name });
    } finally {
      if (scene.legacy) await client.unsubscribeResource({ uri });
      else await subscription.close();
    }
  },

  async sampling(scene) {
    const result = await call(scene, "test_sampling", { prompt: `what of ${scene.upstream}?` });
    assert.equal(text(result), `LLM response: ${scene.secret}`);
    const [asked] = once(scene).messages;
    const content = Array.isArray(asked.content) ? asked.content[0] : asked.content;
    assert.equal(content.text, `what of ${scene.upstream}?`);
  },

  "elicitation (form)": async (scene) => {
    const result = await call(scene, "test_elicitation", { message: `who uses ${scene.upstream}?` });
    assert.match(text(result), /action=accept/);
    assert.ok(text(result).includes(scene.secret), text(result));
    const asked = once(scene);
    assert.ok(asked.message.includes(`who uses ${scene.upstream}?`), asked.message);
    assert.deepEqual(Object.keys(asked.requestedSchema.properties).sort(), ["email", "username"]);
  },

  "elicitation (URL)": async (scene) => {
    const page = `https://example.com/${scene.secret}`;
    const result = await call(scene, "test_elicitation_url", { url: page });
    assert.match(text(result), /action=accept/);
    const asked = once(scene);
    assert.deepEqual([asked.mode, asked.url], ["url", page]);
    if (!scene.legacy) return;
    assert.ok(asked.elicitationId, "a legacy client needs an elicitationId");
    // Only a legacy server says that the page is done with, and only a legacy client may hear of it.
    if (!scene.upstreamLegacy) return;
    const complete = (note) =>
      note.method === "notifications/elicitation/complete" && note.params.elicitationId === asked.elicitationId;
    await until(() => scene.peer.notes.some(complete), "notifications/elicitation/complete");
  },

  // A tool is not all that may ask.
  "elicitation (prompt, resource)": async (scene) => {
    const name = own(scene, "test_input_required_result_prompt");
    const prompt = await scene.peer.client.getPrompt({ name });
    assert.equal(prompt.messages[0].content.text, `In this context: ${scene.secret}`);
    once(scene);
    scene.asked.length = 0;
    const { contents } = await scene.peer.client.readResource({ uri: `${scene.upstream}://input-required` });
    assert.equal(contents[0].text, `read because: ${scene.secret}`);
    once(scene);
  },

  async roots(scene) {
    const result = await call(scene, "test_input_required_result_list_roots", {});
    assert.ok(text(result).includes(`file:///${scene.secret}`), text(result));
    once(scene);
  },
};

const own = (scene, name) => `${scene.upstream}_${name}`;

function once(scene) {
  assert.equal(scene.asked.length, 1, `asked ${scene.asked.length} times`);
  return scene.asked[0];
}

async function call(scene, tool, args, more = {}) {
  const result = await scene.peer.call({ name: own(scene, tool), arguments: args, ...more });
  assert.ok(!result.isError, `${tool} failed: ${text(result)}`);
  return result;
}
