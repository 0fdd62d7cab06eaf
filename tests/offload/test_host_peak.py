"""Host memory while loading: the resident set of a process that reads a model of half a billion parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

LAYERS = 12
LOADER = """
import ctypes, gc, json, sys, torch
import bitsandbytes, safetensors.torch, transformers.models.llama.modeling_llama
from fastprice.offload.device_transfers import SimulatedTransfers
from fastprice.offload.nf4_loading import load_nf4

def resident(which):
    line = next(line for line in open("/proc/self/status") if line.startswith(which))
    return int(line.split()[1]) << 10

load_nf4(sys.argv[1], dtype=torch.bfloat16, transfers=SimulatedTransfers())  # imports, and what libraries keep
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
model, hosts = load_nf4(sys.argv[2], dtype=torch.bfloat16, transfers=SimulatedTransfers(), offload=int(sys.argv[3]))
peak = resident("VmHWM") - before
held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
print(json.dumps({"peak": peak, "model": sum(held.values()), "after": resident("VmRSS") - before,
                  "parameters": sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())}))
"""


def write(folder: Path, layers: int, width: int, inner: int) -> Path:
    """A Llama of random bf16 weights, a layer a shard, without ever being a model."""
    config = LlamaConfig(
        vocab_size=16384, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    where = {}
    for number in range(layers + 1):
        own = [name for name in shapes if (f".{number}." in name if number < layers else "layers" not in name)]
        shard = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file({n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02) for n in own}, folder / shard)
        where.update(dict.fromkeys(own, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of the resident set")
def test_the_host_holds_the_model_in_nf4_and_one_shard(tmp_path):
    small, large = write(tmp_path / "small", 1, 256, 512), write(tmp_path / "large", LAYERS, 1792, 5376)
    shard = max(file.stat().st_size for file in large.glob("*.safetensors"))
    script = [sys.executable, "-c", LOADER, str(small), str(large), str(LAYERS)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print({**found, "shard": shard})
    assert found["parameters"] > 490e6
    assert found["model"] < 0.45 * 2 * found["parameters"]  # far below 16 bits
    small_change = 16 << 20  # Python's objects, pieces in the making
    assert found["peak"] <= found["model"] + shard + small_change
    assert found["after"] <= found["model"] + small_change
