"""The texts that the package can say, read from its source, beside what docs/messages.md says of each.

``python tests/messages.py`` prints entries for those that have none yet; write below each what to do.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "messages.md"
SAYS = {"warn", "warning", "rank_zero_warn", "rank_zero_info", "_warn", "_say"}
GAP = "…"


def spelled(node):
    """The text of a string with ``…`` for what is filled in; None for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%\w", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = spelled(node.left), spelled(node.right)
        return None if sides == (None, None) else "".join(side or GAP for side in sides)
    return None


def name_of(function):
    return getattr(function, "attr", getattr(function, "id", None))


def texts_of(node, functions, assigned):
    """What an expression says: a string, what the function returns that it calls, or what a variable was given."""
    if (text := spelled(node)) is not None:
        return [text]
    if isinstance(node, ast.IfExp):
        return [text for side in (node.body, node.orelse) for text in texts_of(side, functions, assigned)]
    if isinstance(node, ast.Name):
        return [text for value in assigned.get(node.id, []) for text in texts_of(value, functions, {})]
    if isinstance(node, ast.Call) and (function := functions.get(name_of(node.func))):
        returned = [found.value for found in ast.walk(function) if isinstance(found, ast.Return) and found.value]
        return [text for value in returned for text in texts_of(value, functions, {})]
    return []


def assignments(tree):
    found = {}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.NamedExpr) else []:
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(node.value)
    return found


def said(tree, functions):
    """The texts that a file raises, warns of or logs."""
    assigned = assignments(tree)
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and call.args and (call is not node or name_of(call.func) in SAYS):
            for text in texts_of(call.args[0], functions, assigned):
                if re.search(r"\w{3}", re.sub("EMACallback|MeanTeacher", "", text)):  # else it is a bare prefix
                    yield re.sub(r"\s+", " ", text.replace("`", "")).strip()


def messages():
    """Each text with the files that say it."""
    trees = {path.name: ast.parse(path.read_text()) for path in sorted((ROOT / "lightning_ema").glob("*.py"))}
    everywhere = {f.name: f for tree in trees.values() for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    found = {}
    for name, tree in trees.items():
        here = {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
        for text in said(tree, {**everywhere, **here}):
            found.setdefault(text, set()).add(name)
    return found


def entries(page):
    """The texts that the page has advice for, each the beginning of a message, with that advice."""
    result = {}
    for block in re.split(r"\n(?=- `)", page):
        if block.startswith("- `"):
            block = block.split("\n\n")[0].split("\n#")[0]
            texts = re.findall(r"^(?:- |  )`([^`]+)`(?:<br>)?$", block, re.MULTILINE)
            advice = re.sub(r"^(?:- |  )`([^`]+)`(?:<br>)?$", "", block, flags=re.MULTILINE).strip()
            result |= dict.fromkeys(texts, advice)
    return result


def beginning(text):
    """Enough of a message to know it by: its first sentence, or the part of it before a semicolon."""
    return re.split(r"(?<=\w[.;])\s", text)[0].rstrip(".;")


def without_entry():
    known = entries(PAGE.read_text())
    return {text: files for text, files in messages().items() if not any(text.startswith(entry) for entry in known)}


if __name__ == "__main__":
    for text, files in without_entry().items():
        print(f"- `{beginning(text)}`<br>\n  ({', '.join(sorted(files))})\n")
