"""What MkDocs does not do by itself: pages for linked files outside of docs/, and a navigation by folders.

It also warns, which ends a strict build, of public names that the reference leaves out.
"""

import ast
import logging
import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#\s])")
DIRECTIVE = re.compile(r"^::: lightning_ema\.(\w+)$", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def on_files(files, *, config):
    """Adds a page for each file outside of docs/ that a page links to, and writes the navigation out."""
    made, documented = {}, set()
    for page in list(files.documentation_pages()):
        documented.update(DIRECTIVE.findall(page.content_string))
        for link in LINK.findall(page.content_string):
            path = in_repository(PurePosixPath("docs", page.src_uri), link)
            if path.parts[0] != "docs" and (ROOT / path).is_file():
                made[path] = File.generated(config, uri_of(path), content=content_of(path))
    for file in made.values():
        files.append(file)
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
    """Turns links to files outside of docs/ into links to their pages."""
    here = PurePosixPath("docs", page.file.src_uri)

    def rewritten(found):
        path = in_repository(here, found[0])
        if path.parts[0] == "docs" or not (ROOT / path).is_file():
            return found[0]
        return posixpath.relpath(uri_of(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)


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
