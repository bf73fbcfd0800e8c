"""Learning rates of Transformers' own schedulers, step by step.

    python make_schedule_goldens.py > schedules.json

Needs torch and transformers. What a training step uses is the rate before `scheduler.step()`.
"""
import json
import math
import sys

import torch
from transformers import get_scheduler

cases = []
for kind in ("linear", "cosine", "constant", "constant_with_warmup"):
    for total, ratio, steps in ((1, 0.0, 0), (7, 0.0, 0), (7, 0.03, 0), (10, 0.25, 0), (40, 0.0, 5), (40, 0.1, 0), (6, 0.0, 6), (6, 0.0, 9)):
        # As TrainingArguments.get_warmup_steps.
        warmup = steps if steps > 0 else math.ceil(total * ratio)
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([parameter], lr=3e-4)
        scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        rates = []
        for _ in range(total):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        cases.append({"type": kind, "total": total, "warmup_ratio": ratio, "warmup_steps": steps, "warmup": warmup, "rates": rates})
sys.stdout.write("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
