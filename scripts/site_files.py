"""A hook of mkdocs: what pages link to outside docs/ becomes part of the site.

`../benchmarks/results/reuse.md` in a page is the file of that name in the repository. Pages among
these are rendered, other files are copied. `../benchmarks/results/` is a page that lists what was
recorded. A link to what is not there is left as it is, so that `mkdocs build --strict` fails.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"\]\((?:\.\./)+([^)#]+)(#[^)]*)?\)")
_LIST = "results.md"
_RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add the list of results, the files that pages name, and those that these name."""
    files.append(File.generated(config, _LIST, content=_results_page()))
    texts = [page.content_string for page in files.documentation_pages()]
    while texts:
        for path, _ in _OUTSIDE.findall(texts.pop()):
            source = ROOT / path
            if not source.is_file() or files.get_file_from_path(path) is not None:
                continue
            text = _at_top(source.read_text(), path) if source.suffix == ".md" else None
            if text is None:
                files.append(File.generated(config, path, abs_src_path=str(source)))
            else:
                files.append(File.generated(config, path, content=text))
                texts.append(text)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that lead out of docs/ lead into the site."""
    up = "../" * page.file.src_uri.count("/")

    def inside(match: re.Match[str]) -> str:
        path = _LIST if ROOT / match[1] == _RESULTS else match[1]
        return f"]({up}{path}{match[2] or ''})"

    return _OUTSIDE.sub(inside, markdown)


def _at_top(text: str, path: str) -> str:
    """Links of a page outside docs/ to files beside it, as if they were from the root."""
    folder = path.rpartition("/")[0]

    def moved(match: re.Match[str]) -> str:
        target = match[1]
        if re.match(r"[a-z]+:|#|\.\./", target):
            return match[0]
        return f"](../{folder}/{target})"

    return re.sub(r"\]\(([^)]+)\)", moved, text)


def _results_page() -> str:
    """A line for every recorded result, with its title."""
    lines = [
        "# Results",
        "Every number in these pages was measured; here is what was recorded.",
        "",
    ]
    for file in sorted(_RESULTS.glob("*.md")):
        title = next(
            (x[2:] for x in file.read_text().splitlines() if x.startswith("# ")), file.stem
        )
        lines.append(f"- [{title}](../benchmarks/results/{file.name})")
    return "\n".join(lines) + "\n"
