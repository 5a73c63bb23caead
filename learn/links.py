"""
Links from the lessons into the code, with line numbers that follow the code.

    python -m learn.links --fix      # write today's line numbers into learn/*.md, learn/cards/*.md and AGENTS.md

A link is [`attend`](../model.py#L123): a function or class, Class.method too, or a piece of a line that stands in the
file exactly once, like [`scores.softmax(-1) @ v`](tiny.py#L78). A test holds every link to its line.
"""
import ast
import glob
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LINK = re.compile(r"\[`([^`\n]+)`\]\(([\w./]+\.(?:py|sh))#L(\d+)\)")


def documents():
    """Return the paths of the lessons."""
    found = [*glob.glob(f"{ROOT}/learn/*.md"), *glob.glob(f"{ROOT}/learn/cards/*.md"), f"{ROOT}/AGENTS.md"]
    return sorted(path for path in found if os.path.exists(path))


def line_of(name, path):
    """Return the line of a definition, or of the one line that holds the text `name`; 0 where there is none."""
    if not os.path.exists(path):
        return 0
    with open(path, encoding="utf-8") as f:
        source = f.read()
    if re.fullmatch(r"\w+(\.\w+)?", name) and path.endswith(".py"):
        for node in ast.parse(source).body:
            if getattr(node, "name", None) == name:
                return node.lineno
            for inner in getattr(node, "body", []):
                if isinstance(node, ast.ClassDef) and f"{node.name}.{getattr(inner, 'name', None)}" == name:
                    return inner.lineno
    lines = [number for number, line in enumerate(source.splitlines(), 1) if name in line]
    return lines[0] if len(lines) == 1 else 0


def wrong_links(document):
    """Return [(name, path, line in the document's link, line today)] of the links that do not hold."""
    with open(document, encoding="utf-8") as f:
        text = f.read()
    wrong = []
    for name, path, line in LINK.findall(text):
        today = line_of(name, os.path.normpath(os.path.join(os.path.dirname(document), path)))
        if today != int(line) or today == 0:
            wrong.append((name, path, int(line), today))
    return wrong


def fix(document):
    """Write today's line numbers into a document; print the links that point to nothing."""
    with open(document, encoding="utf-8") as f:
        text = f.read()
    for name, path, line, today in wrong_links(document):
        text = text.replace(f"[`{name}`]({path}#L{line})", f"[`{name}`]({path}#L{today})")
        if today == 0:
            print(f"{os.path.relpath(document, ROOT)}: {path} has no line for {name!r}, or several")
    with open(document, "w", encoding="utf-8") as f:
        f.write(text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__)
    for lesson in documents():
        fix(lesson)
