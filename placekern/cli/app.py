"""The commands that work on a user's own files, and the entry point."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import placekern as pk

from .. import _native
from ..codebook import codebooks_of
from ..io import FileSizes, export_layers, file_sizes, read_header, save_deep_compression
from ..io.file import tensor_names
from ..io.stored import StoredFile
from ..nn import quant_sparse_layers
from ..vpr import (
    ImageList,
    Retrieval,
    describe,
    evaluate,
    list_images,
    retrieval_sheet,
    save_sheet,
)
from ..vpr.index import faiss_status, search_backend
from . import console
from .demo import demo
from .inputs import check_folder, fit_what_is_missing, open_dataset, open_network
from .sensitivity import sensitivity, suggest
from .settings import (
    Bits,
    Config,
    Dataset,
    Distance,
    EntropyLambda,
    GroundTruth,
    GroupSize,
    Json,
    Method,
    Queries,
    Size,
    Sparsity,
    Threshold,
    Weights,
    compress_config,
    image_size,
)
from .train import train

app = typer.Typer(
    help="Pruned, codebook-quantized networks that run straight from their compressed weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(train)
app.command()(sensitivity)
app.command()(suggest)


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, the processor's levels, threads, GPUs, and what searches on them."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    facts: dict[str, Any] = {
        "placekern": pk.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "isa": pk.get_isa(),
        "isas available": pk.available_isas(),
        "threads": torch.get_num_threads(),
        "cuda built for": _native.cuda_architectures(),
        "cuda devices": _native.cuda_devices(),
        "faiss": faiss_status(),
        "search": [f"{search_backend(device)} on {device}" for device in devices],
    }
    if as_json:
        console.print_json(facts)
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        table.add_row(name, "not built" if shown is None else str(shown))
    console.out.print(table)


@app.command(name="inspect")
def inspect_file(
    file: Annotated[Path, typer.Argument(help="A .safetensors file written by placekern.")],
    as_json: Json = False,
) -> None:
    """Every byte of a compressed file: its layers, what they take and what they have to take."""
    architecture = read_header(file)["architecture"]
    with console.err.status("decoding the layers"):
        sizes = file_sizes(file)
    codebooks = _codebooks(file, sizes)
    rows = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "bits": layer.bits,
            "codebooks": codebooks[layer.name],
            "density": layer.nnz / (layer.shape[0] * layer.shape[1]) if 0 not in layer.shape else 0,
            "dense_bytes": 4 * layer.shape[0] * layer.shape[1],
            "positions_bytes": layer.positions,
            "codes_bytes": layer.codes,
            "codebook_bytes": layer.codebook,
            "bias_bytes": layer.bias,
            "entropy_bytes": layer.positions_bound + layer.codes_bound,
        }
        for layer in sizes.layers
    ]
    if as_json:
        rest = {f"{name}_bytes": getattr(sizes, name) for name in ("other", "header", "padding")}
        values = {"architecture": architecture, "file_bytes": sizes.total, "layers": rows}
        console.print_json(values | rest)
        return
    name = (architecture or {}).get("name", "unnamed architecture")
    title = f"{file.name}: {name}, {console.size(sizes.total)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for heading in ("M x K", "bits", "density", "positions", "codes", "entropy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row["name"]),
            f"{row['shape'][0]} x {row['shape'][1]}",
            str(row["bits"]) + (f" x {row['codebooks']}" if row["codebooks"] > 1 else ""),
            f"{row['density']:.3f}",
            console.size(row["positions_bytes"]),
            console.size(row["codes_bytes"]),
            console.size(row["entropy_bytes"]),
        )
    table.caption = ", ".join(
        f"{label} {console.size(count)}"
        for label, count in (
            ("Codebooks", sizes.codebooks),
            ("biases", sizes.biases),
            ("other tensors", sizes.other),
            ("header", sizes.header + sizes.padding),
        )
    )
    if any(count > 1 for count in codebooks.values()):
        table.caption += ". 5 x 8: 8 codebooks of 5-bit codes."
    table.caption_justify = "left"
    console.out.print(table)


def _codebooks(file: Path, sizes: FileSizes) -> dict[str, int]:
    """How many codebooks each layer of a file has; only the shape of its tensor tells."""
    counts = {}
    with StoredFile(file) as stored:
        for layer in sizes.layers:
            shape = stored.shape(tensor_names(layer.shares or layer.name)["codebook"])
            counts[layer.name] = codebooks_of(shape)
    return counts


@app.command()
def compress(
    network: Annotated[
        str, typer.Argument(help='"<backbone>-netvlad", or a .safetensors written by placekern.')
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    weights: Weights = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to fit NetVLAD and the whitening to, where the weights bring "
            "none."
        ),
    ] = None,
    config: Config = None,
    bits: Bits = None,
    threshold: Threshold = None,
    sparsity: Sparsity = None,
    method: Method = None,
    entropy_lambda: EntropyLambda = None,
    group_size: GroupSize = None,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Prune and quantize a network into one file.

    With --size the report also predicts each layer's time on this machine.
    """
    check_folder(output)
    resize = image_size(size)
    settings = compress_config(
        config,
        bits=bits,
        threshold=threshold,
        sparsity=sparsity,
        method=method,
        entropy_lambda=entropy_lambda,
        group_size=group_size,
    )
    model = open_network(network, weights)
    with console.progress_bars() as progress:
        if references is not None:
            images = ImageList(list_images(references), resize)
            if not fit_what_is_missing(model, network, weights, images, progress=progress):
                raise ValueError(
                    f"{weights or network} brings NetVLAD and all that follows it, and nothing is "
                    "to be fitted: leave --references out"
                )
        example = None if resize is None else torch.zeros(1, 3, *resize)
        report = pk.compress_(
            model,
            settings,
            progress=lambda _, done, total: progress("compress", done, total),
            example=example,
        )
    written = pk.save(model, output)
    if as_json:
        console.print_json(report.to_dict() | {"file": str(output), "file_bytes": written})
        return
    console.out.print(report.table())
    console.out.print(f"{output}: {console.size(written)}, every byte counted")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A .safetensors file written by placekern.")],
    to: Annotated[
        str,
        typer.Option(help="csr: a scipy .npz a layer; mtx: Matrix Market; net: Deep Compression."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder, or for net the file.")],
) -> None:
    """Write the compressed layers in the format of another tool."""
    if to not in ("csr", "mtx", "net"):
        raise ValueError(f'--to is "{to}", expected csr, mtx or net')
    model = pk.load(file)
    if to == "net":
        size = save_deep_compression(model, output)
    else:
        files = export_layers(model, output, to)
        size = sum(written.stat().st_size for written in files)
    console.out.print(f"{output}: {console.size(size)}")


@app.command(name="evaluate")
def evaluate_file(
    file: Annotated[Path, typer.Argument(help="A .safetensors file written by placekern.")],
    dataset: Dataset = None,
    queries: Queries = None,
    references: Annotated[Path | None, typer.Option(help="Folder of reference images.")] = None,
    ground_truth: GroundTruth = None,
    distance: Distance = 25.0,
    picture: Annotated[
        Path | None, typer.Option(help="Writes queries beside what they retrieved, as PNG.")
    ] = None,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Recall and time of a network on queries and references."""
    data = open_dataset(dataset, queries, references, ground_truth, distance, image_size(size))
    model = pk.load(file).eval()
    with console.progress_bars() as progress:
        result = evaluate(model, data, progress=progress)
        if picture is not None:
            described = [describe(model, images) for images in (data.queries, data.references)]
    if picture is not None:
        sheet = retrieval_sheet(
            data.queries,
            data.references,
            {file.stem: Retrieval.of(*described)},
            data.positives,
        )
        save_sheet(sheet, picture)
    layers = list(quant_sparse_layers(model))
    values = {
        "recalls": {str(n): recall for n, recall in result.recalls.items()},
        "latency_ms": result.latency_ms,
        "descriptor_dim": result.descriptor_dim,
        "queries": len(data.queries),
        "references": len(data.references),
        "compressed_layers": len(layers),
        "file_bytes": file.stat().st_size,
    }
    if as_json:
        console.print_json(values)
        return
    title = f"{file.name}: {values['queries']} queries, {values['references']} references"
    table = Table(title=title, title_justify="left")
    cells = [f"{recall:.3f}" for recall in result.recalls.values()]
    cells += [f"{result.latency_ms:.2f}", str(result.descriptor_dim), str(len(layers))]
    for heading in (
        *(f"R@{n}" for n in result.recalls),
        "ms a query",
        "descriptor",
        "compressed layers",
    ):
        table.add_column(heading, justify="right")
    table.add_row(*cells)
    console.out.print(table)
    if picture is not None:
        console.out.print(f"picture: {picture}")


def main() -> None:
    """Entry point: an error is one sentence on standard error, never a traceback.

    A closed pipe and Ctrl-C never get here: typer ends the process with 1 and 130, silently.
    """
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        console.err.print(f"placekern: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
