"""LoRA products, gated activations and the loss head on a GPU. Never run yet where this was written: none was there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice_kernels import (
    Projection,
    completion_cross_entropy,
    dequantize_nf4,
    install,
    lora_mlp,
    lora_qkv,
    reference,
    uninstall,
)
from fastprice_kernels.ops.completion_cross_entropy import labeled_positions
from fastprice_kernels.ops.gated_activations import ACTIVATIONS, glu_backward_, glu_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative to the largest entry of what is compared.
BANDS = {torch.float32: 5e-6, torch.float16: 6e-3, torch.bfloat16: 4e-2}
FORMS = pytest.mark.parametrize("augmented", [False, True], ids=["separate", "augmented"])


@pytest.fixture(autouse=True)
def _exact_fp32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") / math.sqrt(shape[-1])).to(dtype)


def make(n: int, k: int, rank: int, seed: int, dtype: torch.dtype, bias: bool) -> Projection:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        draw(n, k, seed=seed, dtype=dtype), compress_statistics=True, quant_type="nf4"
    )
    a = draw(rank, k, seed=seed + 1, dtype=torch.float32).requires_grad_()
    b = draw(n, rank, seed=seed + 2, dtype=torch.float32).requires_grad_()
    vector = draw(n, seed=seed + 3, dtype=dtype).requires_grad_() if bias else None
    return Projection(packed, a, b, 1.7, vector, state)


def truth(p: Projection, x: Tensor) -> Tensor:
    weight = dequantize_nf4(p.weight, p.quant_state, dtype=torch.float32).double()
    parts = [None if part is None else part.double() for part in (p.lora_a, p.lora_b, p.bias)]
    return reference.lora_linear(x, weight, parts[0], parts[1], p.scale, parts[2])


def leaves(x: Tensor, *projections: Projection) -> list[Tensor]:
    return [x, *(v for p in projections for v in (p.lora_a, p.lora_b, p.bias) if v is not None)]


def assert_near(got: Tensor, want: Tensor, band: float) -> None:
    assert got.isfinite().all()
    assert (got.double() - want).abs().max().item() <= band * max(want.abs().max().item(), 1e-3)


def compare(got: Tensor, want: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> None:
    cotangent = draw(*want.shape, seed=99, dtype=dtype)
    assert_near(got, want, BANDS[dtype])
    expected = torch.autograd.grad(want, inputs, cotangent.double())
    for grad, other in zip(torch.autograd.grad(got, inputs, cotangent), expected, strict=True):
        assert_near(grad, other.double(), BANDS[dtype])


@FORMS
@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize(("tokens", "k", "n"), [((9, 7), 41, 13), ((2, 300), 512, 1536), ((0,), 64, 64)])
def test_mlp_and_qkv(tokens: tuple[int, ...], k: int, n: int, dtype: torch.dtype, augmented: bool) -> None:
    gate, up, down = (make(*size, 16, 10 * i, dtype, i == 1) for i, size in enumerate([(n, k), (n, k), (k, n)]))
    x = draw(*tokens, k, seed=7, dtype=dtype).requires_grad_()
    wide = x.double()
    for kind in ACTIVATIONS:
        want = truth(down, reference.glu(truth(gate, wide), truth(up, wide), kind))
        got = lora_mlp(x, gate, up, down, activation=kind, augmented=augmented)
        compare(got, want, leaves(x, gate, up, down), dtype)
    together = torch.cat(lora_qkv(x, gate, up, gate, augmented=augmented), -1)
    want = torch.cat([truth(gate, wide), truth(up, wide), truth(gate, wide)], -1)
    compare(together, want, leaves(x, gate, up), dtype)


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(9, 41), (5, 1030), (4096, 14336), (1, 1)])
def test_activations(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    dh, e, g = ((draw(*shape, seed=i, dtype=torch.float32) * math.sqrt(shape[1]) * 3).to(dtype) for i in range(3))
    leaf_e, leaf_g = e.double().requires_grad_(), g.double().requires_grad_()
    h = reference.glu(leaf_e, leaf_g, kind)
    de, dg = torch.autograd.grad(h, (leaf_e, leaf_g), dh.double())
    wide = torch.full((shape[0], shape[1] + 16), float("nan"), dtype=dtype, device="cuda")
    assert_near(glu_forward(e, g, kind, out=wide[:, : shape[1]]), h.detach(), BANDS[dtype])
    assert wide[:, shape[1] :].isnan().all()
    for got, want in zip(glu_backward_(dh, e, g, kind), (h.detach(), de, dg), strict=True):
        assert_near(got, want, BANDS[dtype])


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"logit_scale": 0.25, "num_items": 100.0}], ids=str)
@pytest.mark.parametrize(("vocabulary", "chunk"), [(53, 3), (9001, None), (32000, 64)])
def test_loss_head(vocabulary: int, chunk: int | None, options: dict[str, float], dtype: torch.dtype) -> None:
    hidden = (draw(3, 100, 256, seed=1, dtype=torch.float32) * 16).to(dtype).requires_grad_()
    weight = draw(vocabulary, 256, seed=2, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (3, 100), device="cuda")
    labels[:, ::3] = -100
    want = reference.completion_cross_entropy(hidden.double(), weight.double(), labels, **options)
    got = completion_cross_entropy(hidden, weight, labels, chunk=chunk, **options)
    assert got.item() == pytest.approx(want.item(), rel=BANDS[dtype])
    expected = torch.autograd.grad(want, (hidden, weight))
    for grad, other in zip(torch.autograd.grad(got, (hidden, weight)), expected, strict=True):
        assert_near(grad / other.abs().max(), (other / other.abs().max()).double(), BANDS[dtype])


@pytest.mark.parametrize(("labeled", "share"), [(1.0, 0.05), (0.02, 0.012)])
def test_peak_memory_of_the_loss_head(labeled: float, share: float) -> None:
    """4,096 x 128,256 in bf16, D = 4,096: the result dH counts where every token is labeled."""
    hidden = draw(1, 4096, 4096, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = draw(128256, 4096, seed=2, dtype=torch.bfloat16)
    labels = torch.randint(0, 128256, (1, 4096), device="cuda")
    labels[torch.rand(1, 4096, device="cuda") >= labeled] = -100
    small = completion_cross_entropy(hidden[:, :64], weight, labels[:, :64].clamp(min=0))  # kernels and workspaces
    small.backward()
    hidden.grad = None
    del small
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    completion_cross_entropy(hidden, weight, labels).backward()
    excess = torch.cuda.max_memory_allocated() - before - (hidden.nbytes if labeled < 0.5 else 0)
    assert excess <= share * 4096 * 128256 * 2


def test_loss_head_is_captured_in_a_cuda_graph_with_given_positions() -> None:
    hidden = draw(1, 64, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = draw(1000, 32, seed=2, dtype=torch.bfloat16)
    labels = torch.full((1, 64), -100, device="cuda")
    labels[:, 10:20] = torch.randint(0, 1000, (1, 10), device="cuda")
    found = labeled_positions(labels)
    positions = torch.cat([found, found.new_full((16 - found.numel(),), 63)])  # the last one predicts nothing

    def step() -> Tensor:
        (grad,) = torch.autograd.grad(completion_cross_entropy(hidden, weight, labels, positions=positions), hidden)
        return grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(draw(1, 64, 32, seed=3, dtype=torch.bfloat16))
    graph.replay()
    assert torch.equal(captured, step())


def test_installed_kernels_agree_with_the_stock_path() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=997, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                four = bnb.nn.Linear4bit(child.in_features, child.out_features, False, torch.bfloat16, quant_type="nf4")
                four.load_state_dict({"weight": child.weight.cpu()})
                setattr(module, name, four.to("cuda"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(0, 997, (4, 128), device="cuda")
    labels = ids.masked_fill(torch.rand(4, 128, device="cuda") < 0.9, -100)

    def step() -> list[Tensor]:
        adapted.zero_grad()
        loss = adapted(input_ids=ids, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in adapted.parameters() if p.requires_grad)]

    want = step()
    for options in ({}, {"augmented": True}, {"last_layer": True}):
        report = install(adapted, loss_head=True, **options)
        assert not report.skipped
        for got, other in zip(step(), want, strict=True):
            assert_near(got, other.double(), BANDS[torch.bfloat16])
        uninstall(adapted)
    assert all(torch.equal(a, b) for a, b in zip(step(), want, strict=True))
