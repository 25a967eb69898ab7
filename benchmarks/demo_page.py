"""The page of `tinycnn demo` in a browser: the time from a pen's event to the drawn layers, at several speeds of the
processor.

    python -m benchmarks demo-page [--slowdown 1 2 4] [--json FILE]

Needs Playwright, and Chromium or Chrome.  The pen draws a 3 on the page of the networks that ship, forty times; the
result, a 3, is checked.  Chrome slows its processor down by the given factors.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _report
from tinycnn import demo
from tinycnn.hardware import git_revision

THREE = [(90, 60), (150, 45), (190, 75), (175, 115), (135, 135), (185, 155), (195, 200), (150, 235), (85, 220)]
PARTS = ("picture", "forward", "backward", "drawing", "all")
ROUNDS = 40


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo-page", description=__doc__.splitlines()[0])
    parser.add_argument("--slowdown", type=float, nargs="+", default=[1, 2, 4], help="factors (default: 1 2 4)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    result: dict[str, Any] = {"command": "demo-page", "hardware": _report.hardware(), "versions": _report.versions()}
    result |= {"rows": [], "git": git_revision()}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder) / "page.html"
        demo.write([demo.from_run(run) for run in sorted(demo.SHIPPED.iterdir())], path)
        result["page_kB"] = path.stat().st_size // 1000
        browser = driver.chromium.launch(executable_path=browser_path)
        page = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2)
        page.goto(path.as_uri())
        session = page.context.new_cdp_session(page)
        for slowdown in args.slowdown:
            session.send("Emulation.setCPUThrottlingRate", {"rate": slowdown})
            for n, net in enumerate(page.evaluate("data.nets.map((net) => net.title)")):
                page.evaluate(f"chooseNet({n})")
                result["rows"].append({"network": net, "slowdown": slowdown, **measure(page)})
        result["browser"] = f"Chromium {browser.version}"
        browser.close()
    machine = result["hardware"]
    print(f"{machine['processor']}, {machine['cores']} cores, {result['browser']}, page of {result['page_kB']} kB")
    print(f"milliseconds of {result['rows'][0]['events']} pen events: median (largest)")
    row = _report.table(["network", "slowed by", *PARTS], [16, 9, *(14 for _ in PARTS)])
    for entry in result["rows"]:
        row(entry["network"], f"{entry['slowdown']:g}", *("{:.1f} ({:.1f})".format(*entry[part]) for part in PARTS))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(page):
    """{part: (median, largest)} in milliseconds over the events of some drawings."""
    times = page.evaluate(
        """async ([points, rounds]) => {
            const times = [];
            for (let n = 0; n < rounds; n++) {
                clearDrawing();
                for (const point of points) {
                    if (point === points[0]) {
                        startStroke(point);
                    } else {
                        extendStroke([point]);
                    }
                    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
                    times.push([...state.laps]);
                }
            }
            return times;
        }""",
        [THREE, ROUNDS],
    )
    assert page.evaluate("state.net.classes[state.best]") == "3"
    columns = dict(zip(PARTS, zip(*([*row, sum(row)] for row in times), strict=True), strict=True))
    return {"events": len(times)} | {name: (statistics.median(v), max(v)) for name, v in columns.items()}
