"""Lines of product Python without blank lines, comments and docstrings, by package.

    python benchmarks/count_lines.py [CHECKOUT]

A line counts where a token lies on it that is neither a comment nor the docstring of a module, a
class or a function.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

PRODUCT = ("kernels", "quant_core", "workers", "service")
_EMPTY = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def code_lines(source: str) -> int:
    """Number of lines of this source that hold code."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _EMPTY:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def count(checkout: Path) -> dict[str, Counter[str]]:
    """Folder of the product -> package inside it -> lines."""
    found: dict[str, Counter[str]] = {}
    for folder in PRODUCT:
        found[folder] = Counter()
        for file in sorted((checkout / folder).rglob("*.py")):
            parts = file.relative_to(checkout / folder).parts[:-1]
            found[folder][".".join(parts[:2])] += code_lines(file.read_text())
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("checkout", type=Path, nargs="?", default=here)
    found = count(parser.parse_args().checkout)
    print("| folder | package | lines |\n|---|---|---:|")
    for folder, packages in found.items():
        for package, lines in sorted(packages.items()):
            print(f"| `{folder}` | `{package}` | {lines} |")
        print(f"| `{folder}` | | **{packages.total()}** |")
    print(f"| all | | **{sum(packages.total() for packages in found.values())}** |")


if __name__ == "__main__":
    main()
