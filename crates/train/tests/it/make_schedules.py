"""Learning rates of Transformers' schedulers: the reference of tests/it/arguments.rs.

    python make_schedules.py > schedules.json

Needs torch and transformers. For each scheduler, number of warm-up steps and number of steps: the rates of all steps for a peak of 1.
"""
import json
import sys

import torch
from transformers import get_scheduler

out = []
for name in ["linear", "cosine", "constant", "constant_with_warmup"]:
    for warmup, total in [(0, 7), (3, 10), (1, 1), (5, 5), (4, 23)]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        rates = []
        for _ in range(total):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        out.append({"name": name, "warmup": warmup, "total": total, "rates": rates})
json.dump(out, sys.stdout)
