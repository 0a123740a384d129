#!/usr/bin/env bash
# Keras 3.15.1: `model.quantize("gptq")` and `model.quantize("awq")` never see an activation; both are plain rounding.
#
# Layers are given their quantized form before calibration starts. From then on a layer computes by `quantized_call`,
# but calibration listens at `call` (gptq_core.py, awq_core.py), which nobody calls any more. GPTQ's Hessian stays zero
# and is taken for the identity, AWQ's magnitudes stay zero and all of its scales are 1. All samples are run, it takes
# the time that it should, and whatever they say, the codes are the same, bit for bit. The classes behind it, handed
# the same inputs by hand, leave less than half of that error (GPTQ, inputs that hang together) and a third (AWQ,
# inputs of which a few are large). Nothing is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install keras==3.15.1 jax==0.10.2 numpy
KERAS_BACKEND=jax "$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import keras
import numpy as np
from keras.src.quantizers.awq import AWQ
from keras.src.quantizers.gptq import GPTQ

keras.utils.disable_interactive_logging()
rng = np.random.default_rng(0)
tokens, inputs, outputs, samples, length = 500, 128, 64, 8, 128
kernel = (0.05 * rng.normal(size=(inputs, outputs))).astype(np.float32)
directions = np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
gaussian = rng.normal(size=(tokens, inputs))
tables = {
    "gptq": gaussian * np.arange(1, inputs + 1) ** -1.0 @ directions.T,  # inputs that hang together
    "awq": gaussian * np.where(np.arange(inputs) % 32, 1, 30),  # four large inputs of 128
}
various, equal = rng.integers(0, tokens, samples * length), np.full(samples * length, 7)


class Numbers:
    """A tokenizer for texts that are numbers."""

    def tokenize(self, text):
        return np.array(text.split(), np.int32)


def quantized(mode: str, ids: np.ndarray, by_hand: bool = False) -> keras.layers.Dense:
    """The Dense layer behind an embedding, calibrated on `ids`: by the model's method or by the class behind it."""
    embedding = keras.layers.Embedding(tokens, inputs)
    dense = keras.layers.Dense(outputs, use_bias=False)
    block = keras.Sequential([dense])
    model = keras.Sequential([keras.Input((length,), dtype="int32"), embedding, block])
    embedding.embeddings.assign(tables[mode])
    dense.kernel.assign(kernel)
    made = {"gptq": keras.quantizers.GPTQConfig, "awq": keras.quantizers.AWQConfig}[mode]
    config = made(
        [" ".join(map(str, ids))],
        Numbers(),
        num_samples=samples,
        sequence_length=length,
        quantization_layer_structure={"pre_block_layers": [embedding], "sequential_blocks": [block]},
    )
    if not by_hand:
        model.quantize(mode, config=config, filters=lambda layer: isinstance(layer, keras.layers.Dense))
    elif mode == "gptq":
        dense.quantize(mode, config=config)
        gptq = GPTQ(dense, config)
        gptq.update_hessian_with_batch(embedding(ids))
        gptq.quantize_and_correct_layer()
    else:
        dense.quantize(mode, config=config)
        awq = AWQ(dense, config)
        awq.update_activation_magnitudes(embedding(ids))
        awq.quantize_layer()
    return dense


def lost(mode: str, dense: keras.layers.Dense) -> float:
    """The squared error of the layer's outputs, of their energy."""
    true = tables[mode] @ kernel
    return round(float(((np.asarray(dense(tables[mode].astype(np.float32))) - true) ** 2).mean() / (true**2).mean()), 5)


for mode in ("gptq", "awq"):
    one, other, by_hand = quantized(mode, various), quantized(mode, equal), quantized(mode, various, by_hand=True)
    same = bool((np.asarray(one.quantized_kernel) == np.asarray(other.quantized_kernel)).all())
    print(f"Keras {keras.__version__}, {mode}: error {lost(mode, one)} calibrated on {samples * length} tokens,", end=" ")
    print(f"{lost(mode, other)} on one token again and again; by the class itself {lost(mode, by_hand)}; codes are equal: {same}")
    assert same and lost(mode, one) == lost(mode, other), "calibration sees activations now"
    assert lost(mode, by_hand) < 0.8 * lost(mode, one)
    if mode == "awq":
        print("AWQ's scales:", np.unique(np.asarray(one.awq_scales)), "; by the class itself up to", round(float(np.asarray(by_hand.awq_scales).max()), 1))
        assert (np.asarray(one.awq_scales) == 1).all()
PY
