"""Bitmill: mixed-precision quantization of language models."""
