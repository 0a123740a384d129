"""The runtimes that read a format's folders, by name and by how they load one. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """What reads folders of a format.

    name: as plans give it, with the package that it needs. loading: how it loads a folder, in
    Markdown for a model card; REPO stands for the folder's name on the Hub.
    """

    name: str
    loading: str


TRANSFORMERS = Runtime(
    "transformers",
    """transformers:
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("REPO")
```""",
)
VLLM = Runtime(
    "vLLM",
    """vLLM:
```sh
vllm serve REPO
```""",
)
