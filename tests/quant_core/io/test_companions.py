"""Which files travel with a model's weights."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bitmill.io.companions import companions, is_companion

LICENCES = [
    "LICENSE",
    "LICENCE",
    "License.md",
    "license.txt",
    "LICENSE-2.0",
    "LICENSE-MODEL",
    "LICENSE_CODE.txt",
    "LICENSE.pdf",
    "UNLICENSE",
    "COPYING",
    "copyright.rst",
    "Notice",
    "NOTICE.TXT",
    "USE_POLICY.md",
    "acceptable_use_policy.md",
    "ThirdPartyNotices.txt",
    "third-party-licenses.md",
    "LICENSES/Apache-2.0.txt",
    "licenses/llama",
]
CODE = [
    "tokenizer_x.py",
    "tokenizer.py",
    "LICENSE.py",
    "license.so",
    "NOTICE.pkl",
    "copying.sh",
    "LICENSES/run.py",
    "licenses/a/b.txt",
    "additional_chat_templates/x.py",
    "additional_chat_templates/a/b.jinja",
    "chat_template.py",
    "modeling_x.py",
    "custom_generate/generate.py",
    "requirements.txt",
    "pytorch_model.bin",
    "tokenizer.pkl",
    "tokenizer.model.py",
    "vocab.pt",
    "training_args.bin",
]
OTHERS = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "licensee_list.csv",
    "noticeboard.txt",
    "onnx/tokenizer.json",
    "original/params.json",
    "optimizer.safetensors",
]


@pytest.mark.parametrize("path", LICENCES)
def test_licences_travel_under_any_usual_name(path: str) -> None:
    assert is_companion(path)


@pytest.mark.parametrize("path", CODE)
def test_what_can_run_code_never_travels(path: str) -> None:
    assert not is_companion(path)


@pytest.mark.parametrize("path", OTHERS)
def test_other_files_are_no_companions(path: str) -> None:
    assert not is_companion(path)


def test_every_file_that_transformers_tokenizers_are_saved_as_travels() -> None:
    import transformers

    names: set[str] = set()
    for source in Path(transformers.__path__[0]).rglob("tokenization_*.py"):
        for node in ast.parse(source.read_text()).body:
            target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
            if isinstance(target, ast.Name) and target.id == "VOCAB_FILES_NAMES":
                names |= {v.value for v in node.value.values if isinstance(v, ast.Constant)}
    assert len(names) > 20
    assert {name for name in names if not is_companion(name)} == set()


def test_a_saved_tokenizer_travels_whole(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = {"default": "D", "tool_use": "T", "rag": "R"}
    tokenizer.save_pretrained(tmp_path)
    saved = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert companions(tmp_path) == saved
    assert "additional_chat_templates/rag.jinja" in saved


def test_folder_is_listed_without_code_and_weights(tmp_path: Path) -> None:
    for path in (*LICENCES[:3], *CODE, *OTHERS, "tekken.json", "qwen.tiktoken"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    (tmp_path / "LICENSE.md").mkdir()
    (tmp_path / "NOTICE").symlink_to(tmp_path / "LICENSE")
    expected = {*LICENCES[:3], "NOTICE", "tekken.json", "qwen.tiktoken"}
    assert set(companions(tmp_path)) == expected
