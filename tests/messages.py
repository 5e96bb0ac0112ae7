"""The texts that the package can say, read from its source, beside what docs/messages.md says of each.

``python tests/messages.py`` prints entries for those that have none yet; write below each what to do.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
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


def texts_of(node, functions):
    """What an expression says: a string, or what the function returns that it calls."""
    if (text := spelled(node)) is not None:
        return [text]
    if isinstance(node, ast.Call) and (function := functions.get(name_of(node.func))):
        returned = [found.value for found in ast.walk(function) if isinstance(found, ast.Return) and found.value]
        return [text for value in returned for text in [spelled(value)] if text is not None]
    return []


def said(source, functions):
    """The texts that a file raises, warns of or logs."""
    tree = ast.parse(source)
    functions = functions | {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and call.args and (call is not node or name_of(call.func) in SAYS):
            for text in texts_of(call.args[0], functions):
                if re.search(r"\w{3}", text.replace("EMACallback", "").replace("MeanTeacher", "")):  # no bare prefix
                    yield re.sub(r"\s+", " ", text).strip()


def messages():
    """Each text with the files that say it."""
    files = sorted((ROOT / "lightning_ema").glob("*.py"))
    advice = ast.parse((ROOT / "lightning_ema" / "advice.py").read_text())
    remarks = {f.name: f for f in advice.body if isinstance(f, ast.FunctionDef) and f.name != "horizon"}
    found = {}
    for path in files:
        for text in said(path.read_text(), remarks):
            found.setdefault(text, set()).add(path.name)
    for remark in remarks.values():  # some are kept in a variable before they are said
        for text in texts_of(ast.Call(ast.Name(remark.name), [], []), remarks):
            found.setdefault(re.sub(r"\s+", " ", text), {"advice.py"})
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
    """Enough of a message to know it by: its first sentence, without code that would end the entry's own."""
    return re.split(r"(?<=\w[.:;])\s|`", text)[0].strip().rstrip(".:;") if len(text) > 60 else text.replace("`", "")


def without_entry():
    known = entries(PAGE.read_text())
    return {text: files for text, files in messages().items() if not any(text.startswith(entry) for entry in known)}


if __name__ == "__main__":
    for text, files in without_entry().items():
        print(f"- `{beginning(text)}`<br>\n  ({', '.join(sorted(files))})\n")
