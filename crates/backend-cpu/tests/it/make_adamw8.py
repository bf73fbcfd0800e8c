"""Ten steps of bitsandbytes' AdamW8bit on its CPU path: the reference of adamw8.rs.

    python make_adamw8.py > adamw8.json

Needs torch and bitsandbytes. Two tensors: one of 4396 elements (8-bit moments, the last block ragged) and one of 1000, which is below
`min_8bit_size` and keeps f32 moments. Values come from Philox-4x32-10, which the test has too. The codes are kept whole after steps
1 and 10 (base64), of the parameters every 37th.
"""
import base64
import json
import os
import sys

import bitsandbytes as bnb
import torch

# The same words as those of the trainer's golden values.
sys.path.append(os.path.join(os.path.dirname(__file__), "../../../train/tests/it"))
import golden_noise

SIZES = [4396, 1000]
STEPS = 10
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def uniform(n, stream):
    return torch.tensor(golden_noise.uniform(n, stream, 1))


parameters = [torch.nn.Parameter(0.02 * uniform(n, i)) for i, n in enumerate(SIZES)]
optimizer = bnb.optim.AdamW8bit(parameters, **HYPER)
out = {"sizes": SIZES, "steps": [], "signed": bnb.functional.create_dynamic_map(True).tolist(), "unsigned": bnb.functional.create_dynamic_map(False).tolist()}
for step in range(STEPS):
    for i, p in enumerate(parameters):
        # The square makes the elements of a block differ by orders of magnitude.
        u = uniform(p.numel(), 100 + 10 * step + i)
        p.grad = u * u * u
    optimizer.step()
    if step + 1 in (1, STEPS):
        state = optimizer.state[parameters[0]]
        assert state["state1"].dtype == torch.uint8
        assert optimizer.state[parameters[1]]["state1"].dtype == torch.float32
        out["steps"].append(
            {
                "step": step + 1,
                "m": base64.b64encode(state["state1"].numpy().tobytes()).decode(),
                "v": base64.b64encode(state["state2"].numpy().tobytes()).decode(),
                "absmax_m": state["absmax1"].tolist(),
                "absmax_v": state["absmax2"].tolist(),
                "parameters": [p.detach()[::37].tolist() for p in parameters],
            }
        )
json.dump(out, sys.stdout)
