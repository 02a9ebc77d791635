"""Chromium without a window: opens a page, acts on it, and tells what is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CHROMIUM", "WHY_NOT", "act"]

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WHY_NOT = "no chromium on this machine (apt-get install chromium)"

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--enable-logging=stderr", "--virtual-time-budget=3000",
)  # fmt: skip
RESULT = "result-of-the-test"

HELPERS = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
function mouse(selector, type, x, y) {
  const element = one(selector), box = element.getBoundingClientRect();
  const where = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  const how = { bubbles: true, button: 0, movementX: 9, movementY: 9, ...where };
  (type === "mouseup" ? document : element).dispatchEvent(new MouseEvent(type, how));
}
function drag(selector, from, to) {
  mouse(selector, "mouseenter", ...from); mouse(selector, "mousemove", ...from);
  mouse(selector, "mousedown", ...from); mouse(selector, "mousemove", ...to);
  mouse(selector, "mouseup", ...to);
}
"""


def act(page: Path, script: str, folder: Path, *, width: int = 1440) -> tuple[Any, list[str]]:
    """Open a page, run the body of an async function in it, and return what that returns.

    Also returned is what the page wrote to the console, errors among it. The page's own policy
    would forbid the script, so that it is taken out of the copy that is opened.

    Args:
        page: the HTML file.
        script: JavaScript; ``wait``, ``one``, ``all``, ``mouse`` and ``drag`` are there.
        folder: for the copy and for the browser's profile.
        width: of the window in pixels, at least 500.
    """
    assert CHROMIUM is not None
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    tail = (
        f"<script>{HELPERS}addEventListener('load', async () => {{ await wait(100);"
        f" let result; try {{ result = await (async () => {{ {script} }})(); }}"
        " catch (error) { result = {error: String(error)}; }"
        f" const pre = document.createElement('pre'); pre.id = '{RESULT}';"
        " pre.textContent = JSON.stringify(result); document.body.append(pre); });</script></body>"
    )
    copy = folder / f"{page.stem}-under-test.html"
    copy.write_text(text.replace("</body>", tail), "utf-8")
    size = f"--window-size={width},1200"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", size, "--dump-dom"]
    done = subprocess.run(
        [*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(rf'<pre id="{RESULT}">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    console = re.findall(r'CONSOLE:\d+\] "(.*?)", source', done.stderr)
    return json.loads(unescape(found.group(1))), console
