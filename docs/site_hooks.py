"""What MkDocs does not do by itself: pages for linked files outside of docs/, and a navigation by folders.

It writes the list of messages into its page. It also warns, which ends a strict build, of public names that the
reference leaves out.
"""

import ast
import logging
import posixpath
import re
from pathlib import Path, PurePosixPath

import message_page  # MkDocs looks beside this file
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#\s])")
DIRECTIVE = re.compile(r"^::: lightning_ema\.(\w+)$", re.MULTILINE)
ORIGINS = {}  # of the pages made for files outside of docs/, by page
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def on_files(files, *, config):
    """Adds a page for each file outside of docs/ that a page links to, and writes the navigation out."""
    ORIGINS.clear()
    unread, documented = list(files.documentation_pages()), set()
    while unread:
        page = unread.pop()
        documented.update(DIRECTIVE.findall(page.content_string))
        for link in LINK.findall(page.content_string):
            path = in_repository(origin(page.src_uri), link)
            if path.parts[0] != "docs" and (ROOT / path).is_file() and uri_of(path) not in ORIGINS:
                ORIGINS[uri_of(path)] = path
                unread.append(File.generated(config, uri_of(path), content=content_of(path)))
                files.append(unread[-1])
    if missing := sorted(exported() - documented):
        logging.getLogger("mkdocs.hooks").warning("docs/reference has no place for %s", ", ".join(missing))
    config.nav = written_out(config.nav, {file.src_uri for file in files.documentation_pages()}, set(uris(config.nav)))
    return files


def exported():
    """The names in ``lightning_ema.__all__``, read without an import."""
    for node in ast.parse((ROOT / "lightning_ema" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    raise LookupError("lightning_ema/__init__.py has no __all__")


def on_page_markdown(markdown, *, page, config, files):
    """Leads links to files outside of docs/, and all links of such a file, to the pages of the site; lists messages."""
    uri = page.file.src_uri

    def rewritten(found):
        path = in_repository(origin(uri), found[0])
        target = uri_of(path) if path.parts[0] != "docs" else str(path.relative_to("docs"))
        known = files.get_file_from_path(target) is not None
        return posixpath.relpath(target, posixpath.dirname(uri) or ".") if known else found[0]

    linked = LINK.sub(rewritten, markdown)
    return message_page.filled(linked) if uri == "messages.md" else linked


def origin(uri):
    """The file of a page, seen from the repository's root."""
    return ORIGINS.get(uri, PurePosixPath("docs", uri))


def in_repository(page, link):
    """Where a relative link of a page leads, seen from the repository's root."""
    return PurePosixPath(posixpath.normpath(page.parent / link))


def uri_of(path):
    """The page of a file that lies outside of docs/: ``examples/cli.py`` becomes ``sources/examples/cli.py.md``."""
    name = str(path).lstrip(".")  # MkDocs leaves out names that begin with a dot
    return f"sources/{name}" if path.suffix == ".md" else f"sources/{name}.md"


def content_of(path):
    """A Markdown file as it is; any other text as a block of code under its path."""
    text = (ROOT / path).read_text()
    return text if path.suffix == ".md" else f"# {path}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"


def uris(nav):
    """All entries of a navigation."""
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from uris(value) if isinstance(value, list) else [value]


def written_out(nav, pages, named):
    """The navigation with each ``folder/*`` replaced by those pages of the folder that it does not name elsewhere."""
    result = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            below = written_out(value, pages, named) if isinstance(value, list) else value
            result += [{title: below}] if below else []
        elif entry.endswith("/*"):
            result += sorted(page for page in pages - named if page.startswith(entry[:-1]))
        else:
            result.append(entry)
    return result
