"""`import bitmill.hf`: transformers then reads packed checkpoints (`inference/hf_quantizer.py`)."""

from bitmill.formats.packed.config import QUANT_METHOD
from bitmill.inference import hf_quantizer as hf_quantizer

__all__ = ["QUANT_METHOD"]
