"""Makes the calibration mixture that ships with the library.

    pip download --no-deps chatterbot-corpus==1.3.3 && unzip chatterbot_corpus-*.whl -d CORPUS
    python scripts/mixture.py CORPUS quant_core/bitmill/texts/mixture_calibration.txt

Pieces of about 4,000 characters of prose, code, technical documents, dialogue in English and
dialogue in sixteen other languages stand in turn, so that windows of any length see all of them.
Code comes from the standard library of the Python that runs this (3.11.7 for the shipped text).
Sources and licences are named in `quant_core/bitmill/texts/README.md`.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PIECE = 4000
PROSE = 105
MODULES = (
    "textwrap heapq statistics csv fractions graphlib shlex dataclasses calendar random queue "
    "json/decoder json/encoder bisect string sched"
)
DOCUMENTS = "architecture format kernels operations omniquant refinement reliability"
TOPICS = (
    "conversations greetings computers science food literature trivia coding tech_support health "
    "money"
)
LANGUAGES = (
    "italian spanish portuguese dutch german french russian ukrainian japanese korean chinese "
    "persian indonesian turkish hindi bengali"
)
LEFT_OUT = ("gossip", "politics")
PIECES_OF_A_LANGUAGE = 3


def pieces(text: str) -> list[str]:
    """The text in parts of about `PIECE` characters, divided between paragraphs."""
    found, current = list[str](), ""
    for paragraph in re.split(r"\n{2,}", text):
        if current and len(current) + len(paragraph) > PIECE:
            found.append(current.strip("\n"))
            current = ""
        current += paragraph.rstrip() + "\n\n"
    return [*found, current.strip("\n")] if current.strip() else found


def dialogues(file: Path) -> str:
    """Conversations of a corpus file, a line a turn."""
    talks = yaml.safe_load(file.read_text())["conversations"]
    lines = [[f"- {str(turn).strip()}".replace("\n", " ") for turn in talk] for talk in talks]
    return "\n\n".join("\n".join(talk) for talk in lines if talk)


def of_language(folder: Path) -> list[str]:
    """The first pieces of a language's dialogues."""
    files = [f for f in sorted(folder.glob("*.y*ml")) if f.stem not in LEFT_OUT]
    return pieces("\n\n".join(map(dialogues, files)))[:PIECES_OF_A_LANGUAGE]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    data = options.corpus / "chatterbot_corpus/data"
    library = Path(sysconfig.get_paths()["stdlib"])
    wiki = pieces((ROOT / "quant_core/bitmill/texts/wiki_calibration.txt").read_text())
    kinds = [
        [wiki[i * len(wiki) // PROSE] for i in range(PROSE)],
        [p for m in MODULES.split() for p in pieces((library / f"{m}.py").read_text())],
        [p for d in DOCUMENTS.split() for p in pieces((ROOT / f"docs/{d}.md").read_text())],
        [p for t in TOPICS.split() for p in pieces(dialogues(data / f"english/{t}.yml"))],
        [p for name in LANGUAGES.split() for p in of_language(data / name)],
    ]
    placed = [
        ((i + 0.5) / len(kind), k, p) for k, kind in enumerate(kinds) for i, p in enumerate(kind)
    ]
    text = "\n\n".join(piece for _, _, piece in sorted(placed)) + "\n"
    options.target.write_text(text, encoding="utf-8")
    print([sum(map(len, kind)) for kind in kinds], len(text))


if __name__ == "__main__":
    main()
