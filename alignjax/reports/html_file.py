"""The report page as one HTML file that needs nothing else: no library, font or request."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "page"
# They make one script, in this order.
SCRIPTS = ("elements.js", "results.js", "curves.js", "samples.js", "config.js", "main.js")


def html_page(content: dict) -> str:
    """Return the HTML file that shows what `content.page_content` has collected.

    Text of a run is in the file only as JSON without a "<", so it cannot become HTML. The file's
    content security policy lets only the page's own script run, which it knows by its hash.
    """
    title = ", ".join(run["title"] for run in content["runs"])
    data = json.dumps(content, allow_nan=False, separators=(",", ":"))
    script = "\n\n".join(map(template, SCRIPTS))
    digest = hashlib.sha256(f"\n{script}\n".encode()).digest()
    parts = {
        "css": template("page.css"),
        "js": script,
        "data": data.replace("<", "\\u003c"),
        "title": html.escape(title),
        "hash": f"sha256-{base64.b64encode(digest).decode()}",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template("page.html"))


def template(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8").strip()
