"""What the interop parts share: programs started and ended in order, a gateway, and its configuration.

Everything listens on 127.0.0.1, every wait has a limit, and nothing outlives the script: a `House` ends
what it started in reverse order, also when the script is interrupted.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".interop"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug"
GATEWAY = TARGET / "portcullis"
FIXTURE = TARGET / "examples" / "fixture-server"
# The suite and one of its packages need Node 22, so everything runs on the pinned one.
NODE = HOME / "node_modules" / "node" / "bin" / "node"
PYTHON = HOME / "venv" / "bin" / "python"
NPM_SCOPE = HOME / "node_modules" / "@modelcontextprotocol"

STOP_LIMIT = 10


class Broken(Exception):
    """A part that must work before anything can be checked did not."""


def build():
    """Makes sure the programs under test are the ones of this tree; does nothing when they are."""
    for missing in [path for path in (NODE, PYTHON) if not path.exists()]:
        raise Broken(f"{missing.relative_to(ROOT)} is missing; run scripts/setup")
    command = ["cargo", "build", "--quiet", "--bin", "portcullis", "--example", "fixture-server"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise Broken("cargo build failed")


class House:
    """A temporary folder and the programs started in it. Use it as a context manager."""

    def __init__(self):
        self.programs = []

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="portcullis-interop-"))
        # A terminated script must still run the clean-up below.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_):
        for program in reversed(self.programs):
            program.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name, *command, **environment):
        program = Program(name, [str(word) for word in command], environment, self.folder / f"{name}.log")
        self.programs.append(program)
        return program

    def everything(self):
        """The npm reference server over streamable HTTP; answers its URL."""
        port = free_port()
        self.start("everything", NODE, npm("server-everything"), "streamableHttp", PORT=str(port))
        url = f"http://127.0.0.1:{port}/mcp"
        # Any HTTP answer will do: without a session a GET is a 400.
        wait_for("server-everything to listen", 20, lambda: status(url) is not None)
        return url

    def fixture(self, transport="http"):
        """Our own fixture server over streamable HTTP or SSE; answers its URL."""
        return self.listening(f"fixture-{transport}", FIXTURE, transport, "--listen", "127.0.0.1:0")

    def listening(self, name, *command):
        """Starts a server whose first line names its URL."""
        program = self.start(name, *command)
        said = "listening on "
        wait_for(f"{name} to listen", 20, lambda: said in program.text() and "\n" in program.text())
        return program.text().split(said, 1)[1].splitlines()[0].strip()

    def gateway(self, servers, *options):
        """`portcullis serve` in front of these servers, answering."""
        config = self.folder / f"gateway-{len(self.programs)}.json"
        config.write_text(json.dumps({"mcpServers": servers}, indent=2))
        listen = f"127.0.0.1:{free_port()}"
        data = config.with_suffix(".data")
        data.mkdir()
        program = self.start(
            f"portcullis-{len(self.programs)}",
            *(GATEWAY, "serve", "--config", config, "--listen", listen, "--data-dir", data, *options),
        )
        program.data, program.url = data, f"http://{listen}/mcp"
        try:
            wait_for("/healthz to answer 200", 20, lambda: program.alive() and status(f"http://{listen}/healthz") == 200)
        except Broken:
            print(program.tail(), file=sys.stderr)
            raise
        return program


class Program:
    def __init__(self, name, command, environment, log):
        self.name, self.log = name, log
        with open(log, "wb") as sink:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=sink,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def alive(self):
        if self.process.poll() is not None:
            raise Broken(f"{self.name} ended early with {self.process.returncode}:\n{self.tail()}")
        return True

    def text(self):
        self.alive()
        return self.log.read_text(errors="replace")

    def tail(self, lines=40):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self):
        """Asks it to end and answers how it did: its exit code, or None when it had to be killed."""
        family = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        # A child may need a moment to see that its parent is gone.
        deadline = time.monotonic() + 2
        while (left := [one for one in family if one in processes()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.left = [f"{pid} {command_line(pid)}" for pid, _ in left]
        for pid, _ in left:
            os.kill(pid, signal.SIGKILL)
        return code


def npm(package):
    return NPM_SCOPE / package / "dist" / "index.js"


def processes():
    """Every process as (pid, start time), which together never name two; a zombie does not count."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is a name in parentheses that may hold anything, so split after it.
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(entry.parent.name), fields[19]] = int(fields[1])
    return found


def descendants(pid):
    parents, family, wanted = processes(), [], {pid}
    while children := [one for one, parent in parents.items() if parent in wanted and one not in family]:
        family += children
        wanted |= {child for child, _ in children}
    return family


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return "(gone)"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(url):
    """The status a GET is answered with, or None when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status
    except urllib.error.HTTPError as answer:
        return answer.code
    except OSError:
        return None


def tool_names(url):
    """What `tools/list` shows a modern client, page by page."""
    names, cursor = [], None
    while True:
        meta = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "interop-harness", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        params = {"_meta": meta, **({"cursor": cursor} if cursor else {})}
        request = urllib.request.Request(
            url,
            data=json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": params}).encode(),
            headers={
                "content-type": "application/json",
                "accept": "application/json, text/event-stream",
                "mcp-protocol-version": "2026-07-28",
                "mcp-method": "tools/list",
            },
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            body = answer.read().decode()
            if "event-stream" in answer.headers.get("content-type", ""):
                body = [line[5:] for line in body.splitlines() if line.startswith("data:")][-1]
        result = json.loads(body)["result"]
        names += [tool["name"] for tool in result["tools"]]
        cursor = result.get("nextCursor")
        if cursor is None:
            return names


def wait_for(what, limit, ready):
    deadline = time.monotonic() + limit
    while not ready():
        if time.monotonic() > deadline:
            raise Broken(f"waited {limit} s in vain for {what}")
        time.sleep(0.1)
