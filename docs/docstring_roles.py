"""Docstrings as the reference shows them: roles such as :class:`Name` become links, doctests and ``::`` blocks code."""

import re
import textwrap

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod):`~?([\w.]+)`")
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
LITERAL = re.compile(r"^(.*):(?::)\n\n((?:    .*\n|\n)*    .*)", re.MULTILINE)


class DocstringRoles(griffe.Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        self._public = {}
        for name in pkg.exports or ():
            target = pkg[str(name)]
            self._public[target.canonical_path] = f"{pkg.path}.{name}"
            if target.is_module:
                members = target.members.items()
                exported = target.exports or [n for n, m in members if not (m.is_alias or n.startswith("_"))]
                of_wing = {target[str(n)].canonical_path: f"{target.path}.{n}" for n in exported}
                self._public = of_wing | self._public  # what the package exports itself stands there under that name
        self._rewrite(pkg, set())

    def _rewrite(self, scope, seen):
        for member in list(scope.members.values()):
            if member.is_alias or member.path in seen:
                continue
            seen.add(member.path)
            if member.docstring:
                text = ROLE.sub(lambda found, at=member: self._link(found[1], at), member.docstring.value)
                text = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text)
                member.docstring.value = LITERAL.sub(lambda found: f"{found[1]}:\n\n{_python(found[2])}", text)
            if member.is_module or member.is_class:
                self._rewrite(member, seen)

    def _link(self, name, at):
        """A link to what the reference documents; code for everything else."""
        path = self._canonical(name, at)
        owner, _, last = path.rpartition(".")
        if path in self._public:
            return f"[`{name.rpartition('.')[2]}`][{self._public[path]}]"
        if owner in self._public:
            return f"[`{last}`][{self._public[owner]}.{last}]"
        return f"`{name}`"

    @staticmethod
    def _canonical(name, at):
        first, _, rest = name.partition(".")
        try:
            found = at.package if first == at.package.name else at.modules_collection[at.resolve(first)]
            for part in filter(None, rest.split(".")):
                found = found[part]
        except (griffe.NameResolutionError, KeyError):
            return name
        return found.canonical_path


def _python(indented):
    return f"```python\n{textwrap.dedent(indented)}\n```"
