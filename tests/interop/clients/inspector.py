"""The npm Inspector's command line over Streamable HTTP: `inspector.py eras URL legacy|auto|modern`.

It speaks one method a run, so each check is a process; what is listed is asked for once. Of the features in
`eras.py` it has those of `OFFERED`; its roots come from a configuration file, and it declares neither sampling nor
elicitation. INTEROP_INSPECTOR is the command to run. The environment is otherwise that of `eras.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from uuid import uuid4

RUN_LIMIT = 30
LISTS = {}
url, mode = sys.argv[2:4]
label = f"inspector/{mode}"


def main():
    upstreams = json.loads(os.environ["INTEROP_ERAS"])
    failed = 0
    with tempfile.TemporaryDirectory(prefix="portcullis-inspector-") as folder:
        for upstream in upstreams:
            for feature, check in OFFERED.items():
                try:
                    check(Inspector(Path(folder)), upstream)
                    print(f"ok {label} {upstream} {feature}", flush=True)
                except (AssertionError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
                    failed += 1
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                    print(f"not ok {label} {upstream} {feature}: {reason}", flush=True)
    print(f"done {label}")
    return 1 if failed else 0


class Inspector:
    """One check: its runs share a root, which nothing else knows."""

    def __init__(self, folder):
        self.secret = str(uuid4())
        self.folder = folder
        gateway = {"type": "streamable-http", "url": url, "protocolEra": mode}
        gateway["roots"] = [{"uri": f"file:///{self.secret}", "name": "the root"}]
        (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"gateway": gateway}}))

    def run(self, method, **options):
        command = [*os.environ["INTEROP_INSPECTOR"].split("\n"), "--config", self.folder / "mcp.json"]
        command += ["--server", "gateway", "--format", "json", "--quiet", "--method", method]
        for option, value in options.items():
            values = value if isinstance(value, list) else [value]
            command += [f"--{option.replace('_', '-')}", *values]
        # It keeps state at home, and nobody's home is its to write in.
        environment = {**os.environ, "HOME": str(self.folder)}
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=RUN_LIMIT
        )  # fmt: skip
        assert done.returncode == 0, f"{method} ended with {done.returncode}: {done.stderr or done.stdout}"
        told = json.loads(done.stdout)
        return told.get("result", told)

    def listed(self, method, of, key):
        if method not in LISTS:
            LISTS[method] = [one[key] for one in self.run(method)[of]]
        return LISTS[method]

    def call(self, tool, arguments):
        result = self.run("tools/call", tool_name=tool, tool_args_json=json.dumps(arguments))
        assert not result.get("isError"), result
        return result


def tools(inspector, upstream):
    assert f"{upstream}_echo" in inspector.listed("tools/list", "tools", "name")
    result = inspector.call(f"{upstream}_echo", {"message": inspector.secret})
    assert result["structuredContent"] == {"message": inspector.secret}, result


def prompts(inspector, upstream):
    name = f"{upstream}_test_prompt_with_arguments"
    assert name in inspector.listed("prompts/list", "prompts", "name")
    result = inspector.run("prompts/get", prompt_name=name, prompt_args=[f"arg1={inspector.secret}", "arg2=b"])
    said = result["messages"][0]["content"]["text"]
    assert said == f"Prompt with arguments: arg1='{inspector.secret}', arg2='b'", said


def resources(inspector, upstream):
    uri = f"{upstream}://static-text"
    assert uri in inspector.listed("resources/list", "resources", "uri")
    content = inspector.run("resources/read", uri=uri)["contents"][0]
    assert content["uri"] == uri and content["text"] == "This is the content of the static text resource.", content


def templates(inspector, upstream):
    template = f"{upstream}://template/{{id}}/data"
    assert template in inspector.listed("resources/templates/list", "resourceTemplates", "uriTemplate")
    content = inspector.run("resources/read", uri=template.replace("{id}", inspector.secret))["contents"][0]
    assert json.loads(content["text"])["id"] == inspector.secret, content


def roots(inspector, upstream):
    result = inspector.call(f"{upstream}_test_input_required_result_list_roots", {})
    said = result["content"][0]["text"]
    assert f"file:///{inspector.secret}" in said, said


OFFERED = {"tools": tools, "prompts": prompts, "resources": resources, "templates": templates, "roots": roots}

if __name__ == "__main__":
    sys.exit(main())
