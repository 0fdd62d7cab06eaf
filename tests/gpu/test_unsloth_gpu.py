"""The kernels under a model of Unsloth's own making: loss and gradients against Unsloth's functions, and back again.

In a process of its own, since Unsloth patches what it finds. Never run yet where this was written: there was no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed"),
]

PROGRAM = """
import sys
import unsloth
from unsloth import FastLanguageModel
import torch
from pathlib import Path
from fastprice.benchmarking.random_models import model_config, random_nf4_model, save_model, seed_adapters
from fastprice_kernels import install, uninstall

layers = 3
made = random_nf4_model(model_config("llama-3.2-1b", layers=layers), "cuda", torch.bfloat16)
folder = str(save_model(made, Path(sys.argv[1])))
del made
model, _ = FastLanguageModel.from_pretrained(model_name=folder, max_seq_length=512, dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, lora_dropout=0, bias="none", random_state=0, use_gradient_checkpointing="unsloth",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
seed_adapters(model)
FastLanguageModel.for_training(model)
ids = torch.randint(3, 500, (2, 256), device="cuda")
labels = ids.masked_fill(torch.rand(2, 256, device="cuda") < 0.9, -100)

def step():
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(40, device="cuda")).loss
    loss.backward()
    return [loss.detach().float(), *(p.grad.float().clone() for p in model.parameters() if p.grad is not None)]

def far(got, want):
    return max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(got, want, strict=True))

want = step()
again = far(step(), want)
report = install(model, loss_head=True)
kernels = list(report.replaced.values())
print(report)
assert not report.skipped, report.skipped
assert [kernels.count(k) for k in ("lora_qkv", "lora_mlp", "lora_linear")] == [3 * layers, 3 * layers, layers]
apart = far(step(), want)
uninstall(model)
back = far(step(), want)
print(f"apart {apart}, Unsloth from itself {again}, after uninstall {back}")
assert apart < 6e-2
assert back <= 2 * again + 1e-6
"""


def test_a_model_of_unsloths_agrees_with_unsloths_own_functions(tmp_path: Path) -> None:
    environment = {**os.environ, "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
