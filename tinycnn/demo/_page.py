"""The page as one file."""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import tinycnn
from tinycnn import _check
from tinycnn._files import atomic_write
from tinycnn.demo._net import Net

FOLDER = Path(__file__).parent
SCRIPTS = (
    "layers.js", "digits.js", "net.js", "draw.js", "state.js", "pad.js", "stages.js", "explain.js", "answer.js",
    "training.js", "app.js",
)  # fmt: skip
STARTS = ("drawing", "training")


def write(nets: Sequence[Net], path: str | os.PathLike[str], start: str = "drawing") -> None:
    """Write a page that shows the networks to `path`, a name ending in .html.

    start  "drawing", or "training": the part that the page opens at

    Raises ValueError for another suffix or no network, OSError if the file cannot be written.
    """
    path, start = Path(path), _check.choice("start", start, STARTS)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path must be a file name ending in .html, got {str(path)!r}")
    if not isinstance(nets, Sequence) or not nets or not all(isinstance(net, Net) for net in nets):
        raise ValueError(f"nets must be one network or more, see from_run and from_model, got {nets!r}")
    with atomic_write(path) as file:
        file.write(page(nets, start).encode())


def page(nets: Sequence[Net], start: str = "drawing") -> str:
    """The page's HTML."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    data = json.dumps({"nets": [net.content() for net in nets], "start": start}, separators=(",", ":"))
    parts = {
        "csp": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'",
        "title": _escape(", ".join(net.title for net in nets)),
        "version": tinycnn.__version__,
        "style": style,
        "script": script,
        "data": data.replace("<", "\\u003c"),  # the parser of HTML looks for the end of the element
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8").split("@")
    return "".join(parts[part] if n % 2 else part for n, part in enumerate(template))


def _hash(text: str) -> str:
    """The source expression of a content security policy for an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
