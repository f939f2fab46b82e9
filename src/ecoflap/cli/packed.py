"""Commands on packed models: pack, unpack, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ecoflap.cli.app import Command, Json, Quiet, app, flag, output_option, print_json, progress_to
from ecoflap.cli.terminal import messages, print_lines, standard_output
from ecoflap.errors import InvalidOption
from ecoflap.run.manifest import Manifest
from ecoflap.run.names import BENCH, MODEL, PACKED, RECIPE, REPORT

Folder = Annotated[Path, output_option("The folder to write.")]
Values = Annotated[
    str,
    typer.Option("--values", metavar="KIND", help="auto keeps every bit of the non-zeros; int8 and int4 round them to "
                 "8 and 4 bits. Default: auto.", show_default=False, rich_help_panel="Packing"),
]  # fmt: skip
Overwrite = Annotated[bool, flag("--overwrite", text="Replace the folder that is there.")]


@app.command("pack", cls=Command, short_help="Store a pruned model without its zeros: smaller, and faster to run.")
def pack_model(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a pruned model's folder or hub id.",
                            show_default=False)
    ],
    output: Folder,
    values: Values = "auto",
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", metavar="N", help="Columns that share a scale of rounded values, a multiple of "
                     "64; 0: the whole row. Default: 0 for int8, 128 for int4.", show_default=False,
                     rich_help_panel="Packing"),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.",
                           rich_help_panel="Packing")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write the model of RUN, or MODEL, packed: each pruned layer as its non-zeros and one bit per weight.

    transformers loads the folder once ecoflap is imported: 'import ecoflap' before from_pretrained.

    Examples:
        ecoflap pack runs/first --output packed
        ecoflap pack path/to/pruned --output packed --values int4
    """
    packed = packed_to(model_of(source), output, values, group_size, overwrite, trust_remote_code, quiet)
    if output.name == PACKED and (manifest := Manifest(output.parent)).exists:
        manifest.note(f"{PACKED}/")  # RUN/packed belongs to the run: 'prune --overwrite' removes it with the rest
    if as_json:
        print_json(packed)
    elif not quiet:
        print_lines(packed_line(packed))


@app.command("unpack", cls=Command, short_help="Write the plain model of a packed one.")
def unpack_model(
    source: Annotated[Path, typer.Argument(metavar="PACKED", help="A packed model's folder.", show_default=False)],
    output: Folder,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the plain checkpoint of PACKED, to the bit where its values are not quantised.

    Folders of compressed-tensors' former format sparse-bitmask are read, too.

    Examples:
        ecoflap unpack packed --output plain
    """
    from ecoflap.model.packed.checkpoint import unpack_checkpoint

    messages.quiet = quiet
    folder = unpack_checkpoint(source, output, overwrite=overwrite)
    if as_json:
        print_json({"model": str(folder)})
    elif not quiet:
        print_lines(f"model   {folder}")


def model_of(source: str) -> str:
    """The model of a run directory; other sources unchanged."""
    path = Path(source).expanduser()
    return str(path / MODEL) if (path / RECIPE).is_file() and (path / MODEL).is_dir() else source


def packed_to(
    source: str, output: Path, values: str, group_size: int | None, overwrite: bool, trust_remote_code: bool,
    quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """Pack ``source`` into ``output``; return the result for ``--json``."""
    from ecoflap.model.packed.checkpoint import pack_checkpoint

    messages.quiet = quiet
    made = pack_checkpoint(
        source, output, values=values, group_size=group_size, overwrite=overwrite, trust_remote_code=trust_remote_code
    )
    return {
        "model": str(output),
        "values": values,
        "layers": len(made.model.layers),
        "layer_bytes": {"dense": made.model.dense_bytes, "packed": made.model.packed_bytes},
        "weight_error": made.model.error,
        "file_bytes": {"dense": made.files_before, "packed": made.files_after},
    }


def packed_line(packed: dict[str, Any]) -> str:
    """The result of :func:`packed_to` as text."""
    layers, files = packed["layer_bytes"], packed["file_bytes"]
    error = f", weights off by {100 * packed['weight_error']:.2f} % in the mean" if packed["weight_error"] else ""
    return (
        f"packed  {packed['layers']} layers, {layers['packed'] / layers['dense']:.3f} of their bytes{error}; "
        f"files {files['packed'] / 1e6:.1f} MB instead of {files['dense'] / 1e6:.1f} MB\n"
        f"packed  {packed['model']}"
    )


@app.command(
    "bench", cls=Command, short_help="Measure the gain of packing on this machine: bytes, loading, tokens per second."
)
def bench_model(
    packed: Annotated[
        Path | None,
        typer.Argument(metavar="[PACKED|RUN]", show_default=False, help="A packed model's folder, or a run that has "
                       "one: its report.html shows the result. Default: the embedded "
                       "model, and random weights in the shape of a 1 B language model."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Rounds; medians are shown. Default: 3.",
                                        show_default=False, rich_help_panel="Measuring")] = 3,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", help="Tokens generated. Default: 8.",
                                            show_default=False, rich_help_panel="Measuring")] = 8,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", metavar="N", show_default=False,
                                               help="Tokens of a prompt without a tokenizer. Default: 32.",
                                               rich_help_panel="Measuring")] = 32,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", metavar="N,...", help="Default: 1,8.",
                                             show_default=False, rich_help_panel="Measuring")] = "1,8",
    threads: Annotated[str, typer.Option("--threads", metavar="N,...", help="0 means all. Default: 1,0.",
                                         show_default=False, rich_help_panel="Measuring")] = "1,0",
    layers: Annotated[int, typer.Option("--layers", metavar="N", show_default=False,
                                        help="Of the random model; fewer if memory is short. Default: 22.",
                                        rich_help_panel="Measuring")] = 22,
    sparsity: Annotated[float, typer.Option("--sparsity", metavar="S", help="Of the generated models. Default: 0.5.",
                                            show_default=False, rich_help_panel="Measuring")] = 0.5,
    output: Annotated[Path | None, output_option("Write the JSON there, too.", "FILE")] = None,
    overwrite: Annotated[bool, flag("--overwrite", text="Replace the file of --output.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a packed model against its dense form on this machine, in bfloat16 and float32, and with int8 values.

    All variants are in memory at once and take turns; figures are medians over the rounds. × is the ratio to the
    dense model in bfloat16, above 1 is better.

    Examples:
        ecoflap bench
        ecoflap bench packed --threads 1,2,4 --rounds 5 --output bench.json
        ecoflap bench runs/first
    """
    from ecoflap.cli.tables import bench_tables
    from ecoflap.run.bench import bench
    from ecoflap.run.bench_models import BenchOptions
    from ecoflap.run.commands import refuse_existing
    from ecoflap.support.files import write_json

    options = BenchOptions(
        prompt_tokens, new_tokens, rounds, numbers("--batch-sizes", batch_sizes), numbers("--threads", threads), layers,
        sparsity,
    )  # fmt: skip
    if output is not None:
        refuse_existing(output, overwrite, [packed])
    run, packed = (None, None) if packed is None else run_and_packed(packed)
    if run is not None:
        Manifest(run).check_own(BENCH)
    found = bench(packed, options, progress_to(quiet or as_json))
    if run is not None:
        from ecoflap.report import rebuild

        with Manifest(run).writing(BENCH):
            write_json(run / BENCH, found)
        rebuild(run)
    if output is not None:
        write_json(output, found)
    if as_json:
        print_json(found)
    elif not quiet:
        for table in bench_tables(found):
            standard_output().print(table)
        if run is not None:
            print_lines(f"page    {run / REPORT}")


def run_and_packed(source: Path) -> tuple[Path | None, Path]:
    """The run directory of a packed model, if any, and the packed model.

    Raises:
        InvalidOption: ``source`` is a run without a packed model.
    """
    if not (source / RECIPE).is_file():
        inside = source.name == PACKED and (source.parent / RECIPE).is_file()
        return source.parent if inside else None, source
    if not (source / PACKED).is_dir():
        raise InvalidOption(
            f"'{source}' has no packed model: make one with 'ecoflap pack {source} --output {source / PACKED}'"
        )
    return source, source / PACKED


def numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,8" as numbers.

    Raises:
        InvalidOption: it is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise InvalidOption(f"{option} {shown}: give whole numbers with commas between them, such as 1,8") from None
