"""
Where the tests of tools/page.py run a page: plain node, and Chromium. Not a test file.

Both hosts answer ask([request, …]) in the same way: {"encode": [texts]} gives ids, {"chat": [messages, opens]} the chat
template, {"filter": [logits, settings]} probabilities, in node {"matmul": [rows, columns, W, x]} W x in two ways, and any other request is a job of the page's worker, whose parts
come back in a list.
"""
import base64
import contextlib
import glob
import json
import os
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import torch

ASK = """async requests => {
  const answers = [];
  for (const { kind, ...job } of requests) {
    if (job.encode) answers.push(job.encode.map(text => T.encode(text)));
    else if (job.decode) answers.push(job.decode.map(ids => T.decode(ids)));
    else if (job.chat) answers.push(T.chat(...job.chat));
    else if (job.filter) answers.push(filter(...job.filter));
    else if (job.matmul) answers.push(bothMatmuls(...job.matmul));
    else {
      const parts = [];
      await call(kind, job, part => parts.push(part));
      answers.push(parts);
    }
  }
  return JSON.stringify(answers, (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value);
}"""

NODE = """
// W x in JavaScript, in WebAssembly, or null where the shape is none for it
const bothMatmuls = (rows, columns, W, x) => {
  const plain = matmul(Array(rows), W, x, rows, columns);
  const tensors = [["before", 3, 4], ["W", rows, columns], ["bias", rows]];
  const fast = FastMatmul.orNull(tensors);
  if (!fast) return [plain, null];
  fast.room(12);
  const inside = fast.room(W.length);
  inside.set(W);
  return [plain, fast.matmul(new Float32Array(rows), inside, Float32Array.from([...x, 9, 9, 9, 9]), rows, columns)];
};
const fs = require("fs"), vm = require("vm");
const [htmlPath, requests, out] = process.argv.slice(2);
const html = fs.readFileSync(htmlPath, "utf8");
const block = id => html.match(new RegExp(`<script[^>]* ?id="${id}">([^]*?)</script>`))[1];
vm.runInThisContext(block("engine"));
const about = JSON.parse(block("about-runs"));
globalThis.T = new Tokenizer(about.vocabulary);
// a worker in this thread
const scope = { postMessage: data => {
  if (data.error) throw Error(data.error);
  if (data.part) heard(structuredClone(data.part));  // as between two threads
} };
let heard, number = 0;
serve(scope);
globalThis.call = (kind, job, onPart = () => {}) => {
  heard = onPart;
  return scope.onmessage({ data: { number: number++, kind, ...job } });
};
(async () => {
  await call("start", { ...about, packed: about.runs.map((_, i) => block("weights-" + i)) });
  fs.writeFileSync(out, await (ASK)(JSON.parse(fs.readFileSync(requests))));
  process.exit();
})();
"""


def find_node():
    """Return the path of a node: the machine's, or the one inside playwright."""
    try:
        from playwright._impl._driver import compute_driver_executable
        inside = compute_driver_executable()[0]
    except ImportError:
        inside = None
    return shutil.which("node") or inside


class Node:
    def __init__(self, folder):
        self.node = find_node() or pytest.skip("neither node nor playwright is installed")
        self.folder = folder

    def open(self, path):
        self.path = path
        return self

    def ask(self, requests):
        files = {name: os.path.join(self.folder, name) for name in ("host.js", "requests.json", "answers.json")}
        with open(files["host.js"], "w", encoding="utf-8") as f:
            f.write(NODE.replace("(ASK)", f"({ASK})"))
        with open(files["requests.json"], "w") as f:
            json.dump(requests, f)
        words = [self.node, files["host.js"], self.path, files["requests.json"], files["answers.json"]]
        subprocess.run(words, check=True)
        with open(files["answers.json"], encoding="utf-8") as f:
            return json.load(f)


def find_chromium():
    """Return the path of a Chromium or Chrome, or None."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if shutil.which(name):
            return shutil.which(name)
    own = glob.glob(os.path.expanduser("~/.cache/ms-playwright/chromium-*/chrome-linux*/chrome"))
    return own[0] if own else None


@contextlib.contextmanager
def chromium():
    """A headless browser, or a skipped test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    path = find_chromium() or pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Chromium:
    """Pages without a network. What one says to the console, and whom one asks, is written down."""

    def __init__(self, browser, **context):
        self.context = browser.new_context(**{"offline": True, "viewport": {"width": 1280, "height": 900}, **context})
        self.said = []
        self.asked = []

    def open(self, path, wait_for="#app:not([hidden])"):
        self.page = self.context.new_page()
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path if "://" in path else f"file://{os.path.abspath(path)}")
        self.page.wait_for_selector(wait_for)
        return self

    def hear(self, message):
        if message.type in ("error", "warning", "log"):  # not a browser's advice on passwords
            self.said.append(message.text)

    def ask(self, requests):
        return json.loads(self.page.evaluate(ASK, requests))

    def close(self):
        self.context.close()


# ---------------------------------------------------------------------------- what lies in the file


def read_page(path):
    """Return (what the page says of its runs, the state_dict of each as the page computes it)."""
    with open(path, encoding="utf-8") as f:
        html = f.read()

    def block(name):
        return html.split(f'id="{name}">')[1].split("</script>")[0]

    about = json.loads(block("about-runs"))
    packed = [zlib.decompress(base64.b64decode(block(f"weights-{i}"))) for i in range(len(about["runs"]))]
    base = unpack(about["runs"][about["base"]], packed[about["base"]], None)
    dicts = []
    for meta, data in zip(about["runs"], packed):
        read = unpack(meta, data, base)
        trunk = "trunk." if meta["stage"] == "reward" else ""
        weights = {}
        for name, (q, scale) in read.items():
            full = q if scale is None else q.astype(np.float32) * scale[:, None]
            if name == "head.weight":
                full = full[None]
            weights[name if name.startswith("head.") else trunk + name] = torch.from_numpy(np.array(full))
        dicts.append(weights)
    return about, dicts


def unpack(meta, data, base):
    """Return {name: (q, scale of each row)}, and {name: (vector, None)}."""
    at = 0
    read = {}
    for name, rows, *rest in meta["tensors"]:
        if rest and rest[1]:
            read[name] = (None, base[name][1])
            continue
        vector = np.frombuffer(data, "<f4", rows, at)
        at += 4 * rows
        read[name] = (None, vector) if rest else (vector, None)
    for name, rows, *rest in meta["tensors"]:
        if rest:
            q = np.frombuffer(data, np.int8, rows * rest[0], at).reshape(rows, rest[0])
            at += q.size
            if rest[1]:
                q = q + base[name][0]
            read[name] = (q, read[name][1])
    assert at == len(data)
    return read
