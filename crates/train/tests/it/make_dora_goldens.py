"""Golden values of DoRA from PEFT on the real SmolLM2-135M-Instruct, in float32.

    python make_dora_goldens.py DIR FILE.gguf > dora.json

Needs torch, transformers, peft, gguf, numpy. As make_goldens.py: factors are Philox words, of each gradient it keeps the norm
and eight projections. Magnitudes are the norms that PEFT begins with, moved by up to a fifth, so that magnitude and norm differ.
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
    ("is anyone still short $MRVN after that print?", "Neutral"),
]
R, ALPHA, LAYERS = 4, 8, [0, 9, 29]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

folder, name = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager")
torch.set_num_threads(2)


def encode(text, label):
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    prompt, full = tokenizer(head).input_ids, tokenizer(head + label + "<|im_end|>").input_ids
    assert full[: len(prompt)] == prompt
    return prompt, full


config = LoraConfig(
    r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=MODULES, layers_to_transform=LAYERS, use_dora=True,
    task_type="CAUSAL_LM",
)
peft = get_peft_model(model, config)
parameters = []
for layer in LAYERS:
    block = peft.base_model.model.model.layers[layer]
    for index, m in enumerate(MODULES):
        linear = getattr(block.self_attn if index < 4 else block.mlp, m)
        stream = 3 * (7 * layer + index)
        a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
        magnitude = linear.lora_magnitude_vector["default"].weight
        a.data = torch.tensor(uniform(a.numel(), stream, 1 / np.sqrt(a.shape[1])).reshape(a.shape))
        b.data = torch.tensor(uniform(b.numel(), stream + 1, 0.05).reshape(b.shape))
        magnitude.data *= torch.tensor(1 + uniform(magnitude.numel(), stream + 2, 0.2))
        parameters += [(stream, a), (stream + 1, b), (stream + 2, magnitude)]


def loss():
    total, count = 0, 0
    for text, label in TEXTS:
        prompt, full = encode(text, label)
        labels = torch.tensor([[-100] * len(prompt) + full[len(prompt):]])
        logits = peft(input_ids=torch.tensor([full])).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def fingerprint(stream, values):
    flat = values.flatten().numpy().astype(np.float64)
    return [float(np.linalg.norm(flat))] + [float((flat * signs(flat.size, stream, j)).sum()) for j in range(8)]


out = {"system": SYSTEM, "texts": TEXTS, "r": R, "alpha": ALPHA, "layers": LAYERS}
first = loss()
first.backward()
out["loss"] = first.item()
out["gradients"] = {str(stream): fingerprint(stream, p.grad) for stream, p in parameters}
optimizer = torch.optim.AdamW([p for _, p in parameters], lr=1e-3, weight_decay=0.01)
curve = []
for step in range(6):
    optimizer.zero_grad()
    value = loss()
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
    optimizer.step()
    curve.append([value.item(), norm.item()])
out["adamw"] = {"learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0, "curve": curve}
json.dump(out, sys.stdout)
print()
