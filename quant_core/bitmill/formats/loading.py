"""How runtimes load a folder, in Markdown for a model card; REPO stands for its name on the Hub."""

TRANSFORMERS = """transformers:
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("REPO")
```"""
VLLM = """vLLM:
```sh
vllm serve REPO
```"""
