"""`plan`: how a model fits a GPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastprice.cli.options import Plot, make_console
from fastprice.common.plots import check_plot
from fastprice.config import ModelConfig


def plan(
    base: Annotated[str, typer.Option("--base", help="Shipped name, folder or hub id.")] = "unsloth/Llama-3.1-8B",
    gpu: Annotated[str, typer.Option("--gpu", metavar="SIZE", help="Memory of the GPU, such as 24GiB.")] = "24GiB",
    tokens: Annotated[int, typer.Option(help="Tokens of a micro-batch to aim at.")] = 4096,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapters.", min=1)] = ModelConfig.rank,
    method: Annotated[str, typer.Option(help="qlora, lora, full or auto.")] = ModelConfig.method,
    engine: Annotated[
        str, typer.Option(help="fastprice (PEFT with fastprice's kernels), peft (without them) or unsloth (with them).")
    ] = "fastprice",
    resident: Annotated[bool, typer.Option("--resident", help="Do not offload frozen layers to the host.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="A table of models and GPU sizes.")] = False,
    plot: Plot = None,
) -> None:
    """How to fine-tune a model within a GPU's memory, by arithmetic on its configuration; loads no weights."""
    if plot is not None:
        check_plot(plot)

    from fastprice.memory import format_plan_table, next_larger_model, plan_memory, plan_table
    from fastprice.memory.plot import plot_memory
    from fastprice.models.shapes import shipped_names

    console = make_console()
    options: dict[str, Any] = {
        "tokens": tokens,
        "rank": rank,
        "method": method,
        "engine": engine,
        "layer_offload": not resident,
    }
    if all_:
        console.print(format_plan_table(plan_table(**options)), highlight=False, soft_wrap=True)
        return
    found = plan_memory(base, gpu, **options)
    console.print(found.summary(), highlight=False, soft_wrap=True)
    if plot is not None:
        plot_memory(found.estimate, plot, f"{found.base}, {found.tokens:,} tokens, {found.method}", found.gpu_bytes)
        console.print(f"memory over a step: {plot}", highlight=False)
    larger = next_larger_model(base, gpu, **options)
    if larger is not None:
        needs = f"needs at least {larger.least_bytes / 2**30:.1f} GiB"
        fits = "which fits" if larger.plan else "which does not fit"
        console.print(f"next larger: {larger.base} ({larger.parameters / 1e9:.2f} B) {needs}, {fits}", highlight=False)
    console.print(f"\n{found.yaml()}", highlight=False, markup=False)
    if base in shipped_names():
        what = f"base: the shape of {base} is known here, its weights are not: name its hub id or folder"
        console.print(what, highlight=False, soft_wrap=True)
