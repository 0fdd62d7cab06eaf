"""The host's time for a Llama layer in this checkout beside another one, kernels stubbed: processes in turns.

    git worktree add ../before 2b806e2
    python scripts/compare_host_time.py ../before

Prints the fastest processor time of one forward and backward in each, and the ratio. What is stubbed and why it is
measured so: src/fastprice/benchmarking/host_time.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Runs in both checkouts, so it uses nothing of the benchmarks: it builds the layer, stubs every operator of ours, and
# answers each line on its input with the processor seconds of one step.
WORKER = """
import sys, time, warnings
warnings.simplefilter("ignore")
import peft, torch
from transformers import LlamaConfig
from fastprice.benchmarking.random_models import random_nf4_model
from fastprice_kernels import install
from fastprice_kernels.ops import _library, gated_activations, nf4_dequantize

config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa",
)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
base = random_nf4_model(config, "cpu", torch.float32)
model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=targets))
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.double()
install(model.train())
nothing = lambda *arguments: None
library = torch.library.Library("fastprice", "IMPL")
for name in ("dequantize_nf4", "glu_forward", "glu_backward", "norm_forward", "norm_backward", "rotate"):
    if hasattr(torch.ops.fastprice, name):
        library.impl(name, nothing, "CPU", allow_override=True)
for module in [each for name, each in sys.modules.items() if name.startswith("fastprice_kernels.ops.")]:
    for each in vars(module).values():
        if hasattr(each, "direct"):
            each.direct[False] = nothing
decoder = model.get_base_model().model
positions = torch.arange(2)[None]
x = torch.randn(1, 2, 64, requires_grad=True)
rotation, gradient = decoder.rotary_emb(x, positions), torch.ones(1, 2, 64)

def step():
    y = decoder.layers[0](x, attention_mask=None, position_ids=positions, position_embeddings=rotation)
    (y if isinstance(y, torch.Tensor) else y[0]).backward(gradient)

for _ in range(50):
    step()
print("ready", flush=True)
for _ in sys.stdin:
    began = time.process_time()
    for _ in range(25):
        step()
    print((time.process_time() - began) / 25, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    workers = []
    for checkout in (ROOT, options.other.resolve()):
        paths = os.pathsep.join(str(checkout / name) for name in ("src", "kernels"))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment, cwd=checkout, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        if _ask(worker, None) != "ready":
            sys.exit(f"{checkout}: the layer does not run")
        workers.append(worker)
    fastest = [float("inf")] * 2
    for _ in range(options.rounds):
        for i, worker in enumerate(workers):
            fastest[i] = min(fastest[i], float(_ask(worker, "\n")))
    for worker in workers:
        worker.kill()
    now, before = (1e3 * seconds for seconds in fastest)
    print(f"a Llama layer, forward and backward: here {now:.2f} ms, there {before:.2f} ms, ratio {now / before:.2f}")


def _ask(worker: subprocess.Popen[str], line: str | None) -> str:
    assert worker.stdin is not None
    assert worker.stdout is not None
    if line is not None:
        worker.stdin.write(line)
        worker.stdin.flush()
    return worker.stdout.readline().strip()


if __name__ == "__main__":
    main()
