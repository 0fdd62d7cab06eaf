"""The command line. It parses, calls, and prints; everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprice import __version__
from fastprice.errors import BaseModelError, ConfigError, FastpriceError

if TYPE_CHECKING:
    from rich.console import Console

    from fastprice.items import Items

__all__ = ["main"]

app = typer.Typer(
    name="fastprice",
    help="Fine-tunes language models to estimate product prices from text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Text = Annotated[list[str] | None, typer.Option("--text", metavar="COL...", help="Text columns, or '*' for all.")]
Price = Annotated[str | None, typer.Option("--price", metavar="COL", help="Price column.")]
Group = Annotated[
    list[str] | None, typer.Option("--group", metavar="COL...", help="Columns whose equal rows stay in one split.")
]
Drop = Annotated[list[str] | None, typer.Option("--drop", metavar="COL...", help="Columns that '*' leaves out.")]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="JSONL(.gz), CSV or Parquet file.")]
Base = Annotated[str | None, typer.Option("--base", help="'nano', a folder, or a hub id.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE...", help="Any other setting: train.pack_tokens=4096.")
]
ModelDir = Annotated[Path, typer.Option("--model", metavar="DIR", help="A run's folder, or a saved estimator.")]
ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings; options override them.")]

bench_app = typer.Typer(help="Measure this machine: kernels, training steps, memory.", rich_markup_mode=None)
app.add_typer(bench_app, name="bench")

_MANY_VALUES = {"--text", "--group", "--drop", "--set", "--item"}


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the report and the model.")] = "fastprice-demo",
    items: Annotated[int | None, typer.Option(help="Size of the synthetic catalogue.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of catalogue, split and training.")] = 0,
) -> None:
    """The whole path on a synthetic catalogue and the shipped nano model: minutes, no GPU, no data needed."""
    from importlib.resources import files

    # A nano model's matrices are too small to share: on two cores two threads trained 4,100 tokens/s, one 6,800.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    overrides: dict[str, Any] = {"out": out, "seed": seed}
    if items is not None:
        overrides["data.catalogue"] = items
    _run(Path(str(files("fastprice") / "configs" / "demo.yaml")), overrides)


@app.command()
def train(
    config: ConfigFile = None,
    data: Data = None,
    text: Text = None,
    price: Price = None,
    group: Group = None,
    drop: Drop = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Folder for report and model.")] = None,
    base: Base = None,
    method: Annotated[str | None, typer.Option(help="qlora, lora or full.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, peft or unsloth.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training items.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many items, drawn with the seed.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of draw, split and training.")] = None,
    set_: Set = None,
) -> None:
    """Fine-tune on a file of products; evaluate base, tuned model and baselines on the same unseen items."""
    overrides = _overrides(
        set_,
        {
            "data.file": data, "data.text": text, "data.price": price, "data.group": group, "data.drop": drop,
            "data.limit": limit, "model.base": base, "model.method": method, "model.engine": engine,
            "train.epochs": epochs, "seed": seed, "out": out,
        },
    )  # fmt: skip
    _run(config, overrides)


@app.command()
def inspect(
    config: ConfigFile = None,
    data: Data = None,
    text: Text = None,
    price: Price = None,
    group: Group = None,
    drop: Drop = None,
    base: Base = None,
    examples: Annotated[int, typer.Option(help="How many items to show.", min=1)] = 3,
    set_: Set = None,
) -> None:
    """Show items exactly as the model will see them, the tokens that carry loss in colour; loads no model."""
    from fastprice.config import read_config
    from fastprice.inspection import inspect_items
    from fastprice.pipeline import prepare_items

    overrides = _overrides(
        set_,
        {"data.file": data, "data.text": text, "data.price": price, "data.group": group, "data.drop": drop,
         "model.base": base},
    )  # fmt: skip
    settings = read_config(config, {"out": "unused", **overrides})
    prepared = prepare_items(settings)

    from fastprice.engines.bases import load_tokenizer

    tokenizer = load_tokenizer(settings.model.base)
    inspect_items(tokenizer, prepared.split.train, settings.model.max_tokens, _console(), examples=examples)


@app.command()
def predict(
    model: ModelDir,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="JSONL(.gz), CSV or Parquet file.")] = None,
    item: Annotated[list[str] | None, typer.Option("--item", metavar="TEXT...", help="Texts to price.")] = None,
    text: Text = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="CSV, JSONL or Parquet to write.")] = None,
    loss: Annotated[str, typer.Option(help="What the estimates make small: mae, mse, rmsle, mape or hits.")] = "mae",
    interval: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Add low and high that hold this share, such as 0.9.")
    ] = None,
) -> None:
    """Estimate prices of texts, or of every row of a file."""
    _saved(model)
    if (file is None) == (item is None):
        raise ConfigError("predict: give either a FILE or texts with --item 'some text'")
    if item is not None:
        from fastprice.items import Item, Items

        items = Items([Item(given, row=number) for number, given in enumerate(item, 1)])
    else:
        assert file is not None
        items = _load(file, model, text, price=None)

    from fastprice.predictions import check_target, write_predictions

    if out is not None:
        check_target(out)
    estimator = _estimator(model)
    prompts = estimator.prompts(items)
    distributions = estimator.distributions(prompts)
    prices = estimator.guesses(distributions, loss)
    bounds = None if interval is None else estimator.intervals(distributions, interval)
    cut = sum(prompt.cut > 0 for prompt in prompts)
    console = _console()
    if out is None:
        for index, (each, amount) in enumerate(zip(items, prices, strict=True)):
            between = "" if bounds is None else f"\t${bounds[index, 0]:,.0f} to ${bounds[index, 1]:,.0f}"
            text_shown = " ".join(each.text.split())[:90]
            console.print(f"${amount:,.0f}{between}\t{text_shown}", highlight=False, markup=False)
    else:
        write_predictions(out, items, prices, bounds)
        console.print(f"{len(items):,} prices written to {out}")
    if cut:
        console.print(f"{cut:,} texts were longer than {estimator.max_tokens} tokens: their ends were cut")
    for reject in items.rejects:
        console.print(f"row {reject.row} has no estimate: {reject.reason}", highlight=False, markup=False)


@app.command()
def evaluate(
    model: ModelDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL(.gz), CSV or Parquet file with prices.")],
    text: Text = None,
    price: Price = None,
) -> None:
    """Score a saved model on the priced rows of a file."""
    _saved(model)
    items = _load(file, model, text, price=price or _columns(model).get("price") or "price")

    from fastprice.cleaning import clean_items

    items = clean_items(items)
    estimator = _estimator(model)

    from fastprice.evaluation import evaluate_all

    console = _console()
    console.print(evaluate_all({str(model): estimator.predict}, items).table())
    if items.rejects:
        console.print(f"{len(items.rejects):,} rows were not used, such as row {items.rejects[0].row}: "
                      f"{items.rejects[0].reason}", highlight=False, markup=False)  # fmt: skip


@app.command()
def plan(
    base: Annotated[str, typer.Option("--base", help="Shipped name, folder or hub id.")] = "unsloth/Llama-3.1-8B",
    gpu: Annotated[str, typer.Option("--gpu", metavar="SIZE", help="Memory of the GPU, such as 24GiB.")] = "24GiB",
    tokens: Annotated[int, typer.Option(help="Tokens of a micro-batch to aim at.")] = 4096,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    method: Annotated[str, typer.Option(help="qlora, lora, full or auto.")] = "qlora",
    all_: Annotated[bool, typer.Option("--all", help="A table of models and GPU sizes.")] = False,
) -> None:
    """How to fine-tune a model within a GPU's memory, by arithmetic on its configuration; loads no weights."""
    from fastprice.memory import make_plan, next_larger, plan_table
    from fastprice.memory.plan import table

    console = _console()
    if all_:
        console.print(table(plan_table(tokens=tokens, rank=rank, method=method)), highlight=False, soft_wrap=True)
        return
    found = make_plan(base, gpu, tokens=tokens, rank=rank, method=method)
    console.print(found.summary(), highlight=False)
    larger = next_larger(base, gpu, tokens=tokens, rank=rank, method=method)
    if larger is not None:
        needs = f"needs at least {larger.least_bytes / 2**30:.1f} GiB"
        fits = "which fits" if larger.plan else "which does not fit"
        console.print(f"next larger: {larger.base} ({larger.parameters / 1e9:.2f} B) {needs}, {fits}", highlight=False)
    if found.recomputed < found.layers:
        console.print("this version trains with every layer recomputed: less memory than planned, and slower")
    console.print(f"\n{found.yaml()}", highlight=False, markup=False)


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Under three minutes; ends with a line to paste.")] = False,
    minutes: Annotated[float, typer.Option(help="Time for the whole suite.")] = 9.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for result files.")] = Path("benchmarks/results"),
) -> None:
    """Run the benchmarks; on a machine without a GPU they run the nano model and say CPU."""
    if context.invoked_subcommand is not None:
        return
    from fastprice import bench as benchmarks

    if quick:
        print(benchmarks.quick(out))
    else:
        print(f"results: {benchmarks.full(out, minutes=minutes)}")


@bench_app.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of result files.")] = Path("benchmarks/results"),
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Page with plots to write.")] = None,
) -> None:
    """Tables of the newest result, compared with the one before it, and a page with plots."""
    from fastprice import bench as benchmarks

    print(benchmarks.write_report(folder, out))


@app.command()
def doctor() -> None:
    """Print versions and hardware, what is missing, and how to get it."""
    from rich.text import Text as RichText

    from fastprice.doctor import examine

    styles = {"ok": "green", "warning": "yellow", "error": "red"}
    console = _console()
    findings = examine()
    for finding in findings:
        remedy = f" ({finding.remedy})" if finding.remedy else ""
        console.print(RichText.assemble((f"{finding.level:8}", styles[finding.level]), f"{finding.what}{remedy}"))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `fastprice` command: user errors are one line and status 2, tracebacks need `--debug`."""
    # Idle OpenMP threads must sleep: spinning ones fight over the cores with whatever else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if arguments == ["--version"]:
        print(f"fastprice {__version__}")
        return
    try:
        app(_one_value_each([argument for argument in arguments if argument != "--debug"]), prog_name="fastprice")
    except FastpriceError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _one_value_each(arguments: list[str]) -> list[str]:
    """`--text a b` as `--text a --text b`, which is the only form that click knows."""
    expanded: list[str] = []
    option: str | None = None
    first = False
    for argument in arguments:
        if argument.startswith("-") and len(argument) > 1:
            option, first = (argument, True) if argument in _MANY_VALUES else (None, False)
            expanded.append(argument)
        elif option and not first:
            expanded += [option, argument]
        else:
            expanded.append(argument)
            first = False
    return expanded


def _run(config: Path | None, overrides: dict[str, Any]) -> None:
    from fastprice.config import read_config
    from fastprice.pipeline import run

    run(read_config(config, overrides), _console())


def _overrides(pairs: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    import yaml

    overrides = {key: value for key, value in options.items() if value is not None}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r}: write KEY=VALUE, such as train.epochs=2")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair!r}: {value!r} is not a YAML value") from error
    return overrides


def _columns(model: Path) -> dict[str, Any]:
    """The data section of the run that made `model`, so that predict reads the columns that train read."""
    from fastprice.config import read_config
    from fastprice.pipeline import CONFIG

    for folder in (model, model.parent):
        if (folder / CONFIG).is_file():
            return read_config(folder / CONFIG).data.model_dump()
    return {}


def _load(file: Path, model: Path, text: list[str] | None, *, price: str | None) -> Items:
    from fastprice.items import load_items

    trained = _columns(model)
    columns = text or trained.get("text") or ["text"]
    drop = [] if text else [*trained.get("drop", []), *([trained["price"]] if trained and price is None else [])]
    return load_items(file, text=columns[0] if len(columns) == 1 else columns, price=price, drop=drop)


def _estimator(model: Path) -> Any:
    from fastprice.estimator import PriceEstimator

    return PriceEstimator.load(_saved(model))


def _saved(model: Path) -> Path:
    """The folder of the saved estimator: `model`, or the one in a run's folder. Asked before any file is read."""
    for folder in (model / "model", model):
        if (folder / "fastprice.json").is_file():
            return folder
    raise BaseModelError(
        f"--model {model}: neither a run's folder nor a saved estimator (no fastprice.json); "
        "name the folder that --out or save() made"
    )


def _console() -> Console:
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    main()
