"""`fastprice_kernels` under a transformers model with PEFT's adapters, without the rest of fastprice.

A small Llama with random weights is loaded in NF4 and gets LoRA adapters, as in any QLoRA script. The kernels are put
under it, give the same loss and gradients, and are removed again. On a CPU they are the same arithmetic in PyTorch, so
this shows how to use them and nothing of their speed; on CUDA the Triton kernels run.

    python examples/kernels_with_peft.py
"""

from __future__ import annotations

import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fastprice_kernels import install, uninstall

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-3


def small_qlora_model() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        base = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=four_bit, dtype=torch.float32, device_map={"": DEVICE}
        )
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapters)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapters would not show in the loss
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def loss_and_gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = ids.clone()
    labels[:, :40] = -100  # completion-only: the loss of the last tokens alone
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient, relative to the largest entry of that gradient."""
    assert one.keys() == other.keys()
    return max(((one[n] - other[n]).abs().max() / one[n].abs().max()).item() for n in one)


def main() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    model = small_qlora_model()
    stock_loss, stock_gradients = loss_and_gradients(model)

    report = install(model, loss_head=True, last_layer=True)
    print(report)
    loss, gradients = loss_and_gradients(model)
    print(f"loss {stock_loss:.6f} without the kernels, {loss:.6f} with them")
    print(f"largest relative difference of a gradient: {largest_difference(stock_gradients, gradients):.1e}")
    assert abs(loss - stock_loss) < TOLERANCE * stock_loss
    assert largest_difference(stock_gradients, gradients) < TOLERANCE

    uninstall(model)
    again, _ = loss_and_gradients(model)
    assert again == stock_loss
    print("uninstalled: the model is the stock one again")


if __name__ == "__main__":
    main()
