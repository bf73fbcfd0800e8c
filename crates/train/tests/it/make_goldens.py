"""Golden values of the engine from Transformers + PEFT on the real SmolLM2-135M-Instruct, in float32.

    python make_goldens.py DIR FILE.gguf > engine.json

Needs torch, transformers, peft, gguf, numpy. DIR/FILE.gguf is what `cashtag pull smollm2-135m` keeps in its cache.
LoRA factors and the random signs on which gradients are projected come from Philox-4x32-10, which the test has too, so
that the fixture stays small: of each gradient it keeps the norm and eight projections, which bound the error of the whole
matrix (a random-sign projection of an error e has variance |e|²).
"""
import json
import sys

import numpy as np
import torch
from golden_noise import signs, uniform
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM = "Classify the tweet as Positive, Neutral or Negative for the stock it is about."
TEXTS = [
    ("$QLTX closes the gap and holds 41, adding here", "Positive"),
    ("Harlow Foods to present at the consumer forum on 3 June", "Neutral"),
    ("so the new CFO sold again 🙃 great sign", "Negative"),
    ("Brent slips under $70 as the storm turns away from the platforms", "Negative"),
    ("is anyone still short $MRVN after that print?", "Neutral"),
    ("Volumes doubled, margin up 3 points, and it trades at 9x. I'll take it.", "Positive"),
    ("Port strike enters second week; Calder Lines withdraws its outlook", "Negative"),
    ("Norvik Bank lifts payout to 55 % of profit", "Positive"),
]
R, ALPHA = 4, 8
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


folder, name = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager")
torch.set_num_threads(2)


def encode(text, label=None):
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(head).input_ids
    full = tokenizer(head + label + "<|im_end|>").input_ids if label else prompt
    assert full[: len(prompt)] == prompt
    return prompt, full


out = {"system": SYSTEM, "texts": TEXTS, "r": R, "alpha": ALPHA}
vocab_sample = [(i * 7919 + 13) % 49152 for i in range(64)]
with torch.no_grad():
    out["vocab_sample"] = vocab_sample
    out["logits"] = [model(torch.tensor([encode(t)[0]])).logits[0, -1][vocab_sample].tolist() for t, _ in TEXTS[:4]]
    out["tokens"] = [encode(t, l)[1] for t, l in TEXTS]

peft = get_peft_model(
    model, LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=MODULES, task_type="CAUSAL_LM")
)
layers = model.config.num_hidden_layers
factors = []
stream = 0
for layer in range(layers):
    block = peft.base_model.model.model.layers[layer]
    for m in MODULES:
        linear = getattr(block.self_attn if m in MODULES[:4] else block.mlp, m)
        for kind in ("lora_A", "lora_B"):
            w = getattr(linear, kind)["default"].weight
            bound = 1 / np.sqrt(w.shape[1]) if kind == "lora_A" else 0.02
            w.data = torch.tensor(uniform(w.numel(), stream, bound).reshape(w.shape))
            factors.append((stream, w))
            stream += 1


def loss_sum(indices, on_all):
    """Sum of the losses and number of tokens that carry one."""
    total, count = 0, 0
    for i in indices:
        prompt, full = encode(*TEXTS[i])
        labels = torch.tensor([full if on_all else [-100] * len(prompt) + full[len(prompt):]])
        logits = peft(input_ids=torch.tensor([full])).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    return total, count


for key, on_all in (("answer", False), ("all", True)):
    peft.zero_grad()
    total, count = loss_sum(range(len(TEXTS)), on_all)
    (total / count).backward()
    out[key] = {
        "loss": (total / count).item(),
        "tokens": count,
        "gradients": [
            [g.norm().item()] + [float((g.flatten().numpy().astype(np.float64) * signs(g.numel(), s, j)).sum()) for j in range(8)]
            for s, w in factors
            for g in [w.grad]
        ],
    }

optimizer = torch.optim.AdamW([w for _, w in factors], lr=1e-3, weight_decay=0.01)
curve = []
for step in range(10):
    optimizer.zero_grad()
    total, count = loss_sum(range(len(TEXTS)), False)
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_([w for _, w in factors], 1.0)
    optimizer.step()
    curve.append([(total / count).item(), norm.item()])
out["adamw"] = {"learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0, "curve": curve}
json.dump(out, sys.stdout)
