"""Golden values of DoRA and of label smoothing from Transformers + PEFT on the real SmolLM2-135M-Instruct, in float32.

    python make_dora_goldens.py DIR FILE.gguf > dora.json

Needs what make_goldens.py needs, and works like it. Three layers carry factors, so that the fixture stays small; the magnitudes are
the norms of the weights times 1 + u/10.
"""
import json
import sys

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM = "Classify the tweet as Positive, Neutral or Negative for the stock it is about."
TEXTS = [
    ("$QLTX closes the gap and holds 41, adding here", "Positive"),
    ("Harlow Foods to present at the consumer forum on 3 June", "Neutral"),
    ("so the new CFO sold again 🙃 great sign", "Negative"),
]
R, ALPHA = 4, 8
LAYERS = [0, 15, 29]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def philox(counter, key):
    c = [x.astype(np.uint64) for x in counter]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    mask = np.uint64(0xFFFFFFFF)
    for i in range(10):
        if i:
            k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & mask]
    return c[0]


def words(n, stream, seed):
    i = np.arange(n, dtype=np.uint64)
    zero = np.zeros(n, dtype=np.uint64)
    return philox([i, zero + np.uint64(stream), zero, zero], (seed, 0))


def uniform(n, stream, bound):
    return ((words(n, stream, 1) >> np.uint64(8)).astype(np.float32) / np.float32(2**23) - 1) * np.float32(bound)


def signs(n, stream, projection):
    return 1.0 - 2.0 * (words(n, stream, 100 + projection) & np.uint64(1)).astype(np.float64)


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


peft = get_peft_model(
    model,
    LoraConfig(
        r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=MODULES, layers_to_transform=LAYERS, use_dora=True,
        task_type="CAUSAL_LM",
    ),
)
factors = []
for layer in LAYERS:
    block = peft.base_model.model.model.layers[layer]
    for i, m in enumerate(MODULES):
        linear = getattr(block.self_attn if m in MODULES[:4] else block.mlp, m)
        stream = 3 * (7 * layer + i)
        a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
        magnitude = linear.lora_magnitude_vector["default"].weight
        a.data = torch.tensor(uniform(a.numel(), stream, 1 / np.sqrt(a.shape[1])).reshape(a.shape))
        b.data = torch.tensor(uniform(b.numel(), stream + 1, 0.02).reshape(b.shape))
        magnitude.data = magnitude.data * torch.tensor(1 + uniform(magnitude.numel(), stream + 2, 0.1))
        factors += [(stream, a), (stream + 1, b), (stream + 2, magnitude)]

out = {"system": SYSTEM, "texts": TEXTS, "r": R, "alpha": ALPHA, "layers": LAYERS}
for key, smoothing in (("plain", 0.0), ("smoothed", 0.1)):
    peft.zero_grad()
    total, count = 0, 0
    for text, label in TEXTS:
        prompt, full = encode(text, label)
        labels = torch.tensor([[-100] * len(prompt) + full[len(prompt):]])
        logits = peft(input_ids=torch.tensor([full])).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum", label_smoothing=smoothing
        )
        count += int((labels[0, 1:] != -100).sum())
    (total / count).backward()
    out[key] = {
        "loss": (total / count).item(),
        "tokens": count,
        "gradients": {
            s: [g.norm().item()] + [float((g.flatten().numpy().astype(np.float64) * signs(g.numel(), s, j)).sum()) for j in range(8)]
            for s, w in factors
            for g in [w.grad]
        },
    }
# For the test of files: PEFT's own adapter and the log-probabilities that it gives the labels' first tokens.
if len(sys.argv) > 3:
    peft.save_pretrained(sys.argv[3])
json.dump(out, sys.stdout)
