"""Asks Transformers, PEFT and llama.cpp what they make of our files. Reads one JSON object from standard input:

    {"model": GGUF, "work": DIR, "system": TEXT, "labels": [WORD…], "texts": [TEXT…],
     "adapters": {NAME: DIR}, "merged": {NAME: DIR}, "gguf": {NAME: FILE}, "lora": {NAME: FILE}, "state": FILE,
     "sums": {NAME: [WEIGHT, WEIGHT]}}

and prints one with the label probabilities of each, in the order of texts and labels. With "adapters" it first makes three
adapters with PEFT itself, in WORK/peft-lora, WORK/peft-rslora and WORK/peft-dora, with factors that are not zero, and has
Transformers train one, whose checkpoint is WORK/trainer/checkpoint-2. "state" is a trainer_state.json for Transformers to read.
"""

import contextlib
import json
import os
import sys

job = json.load(sys.stdin)
folder, name = os.path.split(job["model"])
out = {}

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
torch.manual_seed(0)


def prompts(tokenizer):
    def messages(text):
        return [{"role": "system", "content": job["system"]}, {"role": "user", "content": text}]

    rendered = [tokenizer.apply_chat_template(messages(t), tokenize=False, add_generation_prompt=True) for t in job["texts"]]
    return [
        [(tokenizer(r).input_ids, tokenizer(r + word).input_ids) for word in job["labels"]] for r in rendered
    ]


def normalise(rows):
    return torch.softmax(torch.tensor(rows, dtype=torch.float64), -1).tolist()


def probabilities(model, tokenizer):
    rows = []
    for labels in prompts(tokenizer):
        row = []
        for prompt, full in labels:
            assert full[: len(prompt)] == prompt
            with torch.no_grad():
                logits = torch.log_softmax(model(torch.tensor([full])).logits[0].float(), -1)
            row.append(sum(logits[i - 1, full[i]].item() for i in range(len(prompt), len(full))))
        rows.append(row)
    return normalise(rows)


if job.get("adapters") is not None:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    for kind, config in {
        "peft-lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        "peft-rslora": LoraConfig(
            r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=[0, 7, 29], task_type="CAUSAL_LM",
        ),
        "peft-dora": LoraConfig(
            r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "o_proj", "up_proj"],
            layers_to_transform=[0, 15, 29], task_type="CAUSAL_LM",
        ),
    }.items():
        model = get_peft_model(base, config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
            if "lora_magnitude" in key:
                parameter.data *= 0.9 + 0.2 * torch.rand_like(parameter)
        path = os.path.join(job["work"], kind)
        model.save_pretrained(path)
        base = model.unload()
        job["adapters"][kind] = path
    from transformers import Trainer, TrainerState, TrainingArguments

    # The weights are f32 since they were read, and Trainer refuses what says that it is quantised.
    base.is_quantized = False
    # Trainer prints its log, and standard output is the answer.
    with contextlib.redirect_stdout(sys.stderr):
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        data = [
            {"input_ids": full, "attention_mask": [1] * len(full), "labels": [-100] * len(prompt) + full[len(prompt) :]}
            for prompt, full in (labels[i % len(labels)] for i, labels in enumerate(prompts(tokenizer)))
        ]
        arguments = TrainingArguments(
            os.path.join(job["work"], "trainer"), max_steps=2, per_device_train_batch_size=1, learning_rate=2e-3,
            warmup_steps=0, logging_steps=1, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data).train()
        job["adapters"]["checkpoint"] = os.path.join(job["work"], "trainer", "checkpoint-2")
        base = model.unload()
    with open(os.path.join(job["adapters"]["checkpoint"], "trainer_state.json")) as file:
        out["keys"] = sorted(json.load(file))
    state = TrainerState.load_from_json(job["state"])
    out["state"] = [state.global_step, state.max_steps, len(state.log_history), state.train_batch_size]
    for kind, path in job["adapters"].items():
        model = PeftModel.from_pretrained(base, path)
        out[kind] = probabilities(model.eval(), tokenizer)
        base = model.unload()
    # The sum of two adapters, made by PEFT: {NAME: [weight of "lora", weight of "peft-lora"]}.
    for kind, weights in job.get("sums", {}).items():
        model = PeftModel.from_pretrained(base, job["adapters"]["lora"], adapter_name="lora")
        model.load_adapter(job["adapters"]["peft-lora"], adapter_name="peft-lora")
        model.add_weighted_adapter(["lora", "peft-lora"], weights, kind, combination_type="cat")
        model.set_adapter(kind)
        out[kind] = probabilities(model.eval(), tokenizer)
        base = model.unload()
    del base

for kind, path in job.get("merged", {}).items():
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    out[kind] = probabilities(model.eval(), tokenizer)

if job.get("gguf") or job.get("lora"):
    try:
        from llama_cpp import Llama
    except ImportError as error:
        out["skipped"] = f"llama-cpp-python is not here ({error})"
        job["gguf"] = job["lora"] = {}


def llama_cpp_probabilities(path, lora=None):
    import numpy as np

    llm = Llama(path, n_ctx=512, n_threads=2, logits_all=True, verbose=False, lora_path=lora)
    # The file's own tokenizer and template are what is asked.
    template = llm.metadata["tokenizer.chat_template"]
    import jinja2

    rows = []
    known = []
    for text in job["texts"]:
        messages = [{"role": "system", "content": job["system"]}, {"role": "user", "content": text}]
        rendered = jinja2.Template(template).render(
            messages=messages, add_generation_prompt=True, bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
        row = []
        for word in job["labels"]:
            prompt = llm.tokenize(rendered.encode(), add_bos=False, special=True)
            full = llm.tokenize((rendered + word).encode(), add_bos=False, special=True)
            assert full[: len(prompt)] == prompt
            # What it begins with is computed already.
            llm.n_tokens = len(os.path.commonprefix([known, full]))
            llm.eval(full[llm.n_tokens :])
            known = full
            logits = torch.log_softmax(torch.tensor(np.array(llm.scores[len(prompt) - 1 : len(full)])), -1)
            row.append(sum(logits[i, full[len(prompt) + i]].item() for i in range(len(full) - len(prompt))))
        rows.append(row)
    return normalise(rows)


for kind, path in (job.get("gguf") or {}).items():
    out[kind] = llama_cpp_probabilities(path)
for kind, path in (job.get("lora") or {}).items():
    out[kind] = llama_cpp_probabilities(job["model"], path)

print(json.dumps(out))
