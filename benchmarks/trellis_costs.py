"""Costs that a profile predicts of trellis codes, beside what encodings lose, on real linears.

    python benchmarks/trellis_costs.py SOURCE --blocks 2 10 20 28 [--rates 2 3 4] [--windows 8]

SOURCE is a Hugging Face folder. Of every linear of the blocks, one rate everywhere, the table has
the sum of `trellis_costs` over 1/2 sum_n q_n tr(R_n H R_n^T) of the linear's own encoding with the
feedback of the same H, weights of rows included: over 1 the profile expects too much. q and H are
those of a profile of these windows, without samples of rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.calibration.windows import calibration_tokens
from bitmill.config.quantization import Budget, Calibration, QuantizationConfig
from bitmill.models.dtypes import compute_dtype
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.plan.model_plan import make_plan
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.rotation import packed_rewrites
from bitmill.runtime.process import computing
from bitmill.runtime.ranks import SINGLE
from bitmill.sensitivity.fisher import BlockMoments
from bitmill.sensitivity.trellis import trellis_costs
from bitmill.solvers.factor import activation_order, factor
from bitmill.solvers.trellis import encode_siblings, refitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", required=True)
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    plan = make_plan(options.source, QuantizationConfig(budget=Budget(bits=16)))
    asked = Calibration(sequences=options.windows, length=options.length, held_out=1)
    tokens = calibration_tokens(asked, options.source, rows=plan.vocab_size).tokens
    device = torch.device(options.device)
    model = StreamedModel(options.source, plan, device=device, dtype=compute_dtype(device, plan))
    seen = {
        i: BlockMoments(
            plan.siblings(i),
            {linear.name: (linear.rows, linear.columns) for linear in plan.block_linears(i)},
            device,
        )
        for i in options.blocks
    }
    with computing():
        run = GradientPass(model, tokens, PassSettings(batch=2))
        run.run(seen.get)
        print(f"| linear | {' | '.join(f'rate {rate}' for rate in options.rates)} |")
        print("|---" * (len(options.rates) + 1) + "|")
        for i, moments in seen.items():
            moments.all_reduce(SINGLE)
            moments.fill()
            modules = model.linears(model.load_block(i), i)
            for names in plan.siblings(i):
                rewrites = packed_rewrites("trellis", activation_order(moments.energy(names[0])))
                for name in names:
                    W = weight_of(modules[name]).detach().float()
                    H = rewrites.hessian(moments.weighted(name))
                    q = moments.row_weight(name, run.predictions).to(device)
                    ratios = costs_over_losses(W, H, q, options.rates, rewrites)
                    cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
                    print(f"| {name} | {cells} |", flush=True)


def costs_over_losses(
    W: Tensor, H: Tensor, q: Tensor, rates: Sequence[int], rewrites: Rewrites
) -> list[float]:
    """Predicted over measured, of each rate; see above."""
    upper, inner = factor(H).upper, rewrites.weights(W)
    metric = torch.linalg.inv(upper.T.double() @ upper.double())
    predicted = trellis_costs(W, q, upper, rates, rewrites).sum(0)
    ratios = []
    for rate, cost in zip(rates, predicted, strict=True):
        [codes] = encode_siblings(
            [inner], upper, [(rate,) * -(-W.shape[1] // 128)], importance=[q.float()]
        )
        R = (inner - refitted(codes, inner, metric.float()).packed_values()).double()
        ratios.append(float(cost) / float(0.5 * q @ ((R @ metric) * R).sum(1)))
    return ratios


if __name__ == "__main__":
    main()
