"""Write docs/api-reference.md from signatures and docstrings: `python docs/api_page.py`."""

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import chimera

PAGE = ROOT / "docs/api-reference.md"
HEAD = """# Public names

What `import chimera` gives, by signature and docstring. [From Python](api.md) shows them at work. What is not here may
change from one version to the next.

This page is made from the code by `python docs/api_page.py`.
"""


def page() -> str:
    """The whole page: functions, then classes."""
    lines = [HEAD]
    trees: dict[str, tuple[ast.Module, str]] = {}
    for name in sorted(set(chimera.__all__) - {"__version__"}, key=lambda name: (name[0].isupper(), name)):
        module = chimera._MODULES[name]
        if module not in trees:
            text = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            trees[module] = ast.parse(text), text
        tree, text = trees[module]
        node = next(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
        lines += [f"## {name}\n", "```py", f"{signature(node, text)}", "```\n", f"{prose(node)}\n"]
    return "\n".join(lines).rstrip() + "\n"


def signature(node: ast.FunctionDef | ast.ClassDef, text: str) -> str:
    """How it is called; of a class of fields its fields, with their comments."""
    if isinstance(node, ast.FunctionDef):
        assert node.returns is not None
        return f"chimera.{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    head = f"class chimera.{node.name}({', '.join(map(ast.unparse, node.bases))})"
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return "\n".join(
        [head, *(f"    {line.strip()}" for n in fields for line in text.splitlines()[n.lineno - 1 : n.end_lineno])]
    )


def prose(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Its docstring, with lists and paragraphs as they are."""
    return re.sub(r"\n{3,}", "\n\n", inspect.cleandoc(ast.get_docstring(node) or ""))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
