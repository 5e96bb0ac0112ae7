"""The site: everything public is in the reference, pages and links fit together, and a browser opens all of it."""

import http.server
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from lightning.pytorch import LightningModule

import lightning_ema

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("material", "mkdocstrings")),
    reason="MkDocs is not installed; `make docs` does that",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def public_modules():
    return [value for name in lightning_ema.__all__ if inspect.ismodule(value := getattr(lightning_ema, name))]


def public():
    """Everything public by its dotted name: exports, the functions of exported modules, methods and properties."""
    found = {name: getattr(lightning_ema, name) for name in lightning_ema.__all__}
    for module in public_modules():
        short = module.__name__.removeprefix("lightning_ema.")
        names = getattr(module, "__all__", None) or [
            n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        found |= {f"{short}.{n}": getattr(module, n) for n in names if not n.startswith("_")}
    for name, value in list(found.items()):
        if inspect.isclass(value):
            members = {n: v for n, v in vars(value).items() if callable(v) or isinstance(v, property)}
            found |= {f"{name}.{n}": getattr(value, n) for n in members if not n.startswith("_")}
    return found


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: lightning_ema\.(\w+)$", pages, re.MULTILINE)) == sorted(lightning_ema.__all__)


def test_every_public_name_says_what_it_is():
    hooks = LightningModule  # what overrides one of its hooks does what the hook is for
    silent = [name for name, value in public().items() if not (inspect.getdoc(value) or "").strip()]
    assert not [name for name in silent if not hasattr(hooks, name.rpartition(".")[2])]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Page(HTMLParser):
    """The ids and links of a page, the text of its code, and the entries of its navigation."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given.get("id")}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@needs_mkdocs
def test_all_links_lead_somewhere_in_the_site_and_nothing_is_fetched_from_elsewhere(site):
    found = pages(site)
    assert len(found) > 30
    for path, page in found.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert not link.endswith((".js", ".css")), (path, link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (path, link)
            if parts.fragment and target in found:
                assert unquote(parts.fragment) in found[target].ids, (path, link)


@needs_mkdocs
def test_public_names_have_an_anchor(site):
    anchors = set().union(*(page.ids for page in pages(site).values()))
    modules = {module.__name__.removeprefix("lightning_ema.") for module in public_modules()}
    names = {
        name for name in public() if name.count(".") == 0 or (name.count(".") == 1 and name.split(".")[0] in modules)
    }
    exported = {id(value): name for name, value in public().items() if "." not in name}
    shown = {exported.get(id(public()[name]), name) for name in names}  # of a wing and of the package: there alone
    assert not [name for name in shown if f"lightning_ema.{name}" not in anchors]


@needs_mkdocs
def test_roles_of_docstrings_became_links_or_code(site):
    html = (site / "reference" / "average" / "index.html").read_text()
    assert 'href="../schedules/#lightning_ema.Schedule"' in html
    assert not [path for path in site.rglob("*.html") if re.search(r":(class|meth|func|mod):", path.read_text())]


@needs_mkdocs
def test_the_messages_stand_on_their_page_as_code(site):
    html = (site / "messages" / "index.html").read_text()
    assert "<code>&lt;name&gt; is &lt;value&gt;; it must be True or False.</code>" in html


@needs_mkdocs
def test_navigation_takes_pages_that_nobody_named():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    nav = ["index.md", {"How": ["how/b.md", "how/*"]}, {"Why": ["why/*"]}, {"Last": "z.md"}]
    named = set(hooks.uris(nav))
    assert hooks.written_out(nav, {"index.md", "how/b.md", "how/c.md", "how/a.md", "z.md"}, named) == [
        "index.md",
        {"How": ["how/b.md", "how/a.md", "how/c.md"]},
        {"Last": "z.md"},
    ]


class Server(http.server.ThreadingHTTPServer):
    """Serves the site, and browser.html beside it; keeps what that page posts."""

    def __init__(self, site):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(site)))
        self.posted, self.arrived = None, threading.Event()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/browser.html"):
            body = Path(__file__).with_name("browser.html").read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def do_POST(self):
        self.server.posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.arrived.set()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def seen(site, tmp_path_factory):
    """What browser.html found in Chromium, on a screen of 400 pixels, and what the console said."""
    paths = sorted(f"/{path.parent.relative_to(site)}/".replace("/./", "/") for path in pages(site))
    (site / "paths.json").write_text(json.dumps(paths))
    server = Server(site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--enable-logging=stderr"]
    url = f"http://127.0.0.1:{server.server_port}/browser.html"
    log = tmp_path_factory.mktemp("log") / "stderr"
    with log.open("w") as stderr:
        browser = subprocess.Popen([CHROMIUM, *flags, url], stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            assert server.arrived.wait(timeout=300), log.read_text()[-3000:]
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    console = [line for line in log.read_text().splitlines() if ":CONSOLE" in line]
    return paths, server.posted, console


@needs_mkdocs
@needs_chromium
def test_every_page_opens_in_a_browser_and_fits_a_narrow_screen(seen):
    paths, found, console = seen
    assert not console
    assert [page["path"] for page in found["pages"]] == paths
    for page in found["pages"]:
        assert page["heading"], page
        assert page["width"] == 400 and page["needs"] <= 400, page


@needs_mkdocs
@needs_chromium
def test_code_can_be_copied_and_search_finds_pages(seen):
    _, found, _ = seen
    assert sum(page["blocks"] for page in found["pages"]) > 100
    assert not [page for page in found["pages"] if page["buttons"] != page["blocks"]]
    assert found["copied"].startswith("pip install")
    assert any("checkpoints" in link for link in found["resume"]), found["resume"]
