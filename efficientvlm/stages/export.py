"""export: a checkpoint as ONNX graphs, or as a folder that transformers opens without this package."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.folder import Output, require_complete
from efficientvlm.checkpoints.manifest import Cost, DataRecord, Manifest, peak_memory_bytes
from efficientvlm.control import Control
from efficientvlm.data.opening import record
from efficientvlm.data.tokenizer import save_tokenizer
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.export import onnx_files, open_clip, stock
from efficientvlm.families.image_settings import write_settings
from efficientvlm.families.onnx.description import ONNX, Description, GraphFile, Port, StoredSizes
from efficientvlm.families.onnx.family import Exported
from efficientvlm.families.onnx.network import ExportedModel
from efficientvlm.families.onnx.sessions import open_session
from efficientvlm.loaded import Loaded, keep_length, load
from efficientvlm.runtime import ranks
from efficientvlm.runtime.memory import enough_memory
from efficientvlm.runtime.progress import say
from efficientvlm.settings.stages import Export
from efficientvlm.stages.bench import check_length
from efficientvlm.stages.common import making, open_output, summary, write
from efficientvlm.stages.measuring import measure, table
from efficientvlm.stages.workspace import Job, Workspace, inputs_of
from efficientvlm.tasks.known import TASKS, measured_of
from efficientvlm.training.loop import Spent

TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


def run(config: Export, control: Control) -> Manifest:
    """Write `config.model` in another form and compare it with torch before anything is kept.

    Raises:
        BadInput: as :func:`prepare`.
        TargetMissed: the written form computes something else than the checkpoint.
    """
    job = prepare(config, Workspace(control.quiet))
    output = open_output(config, "export", control, inputs_of(job))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        loaded = load(config.model)
        keep_length(loaded, config.max_tokens)
        if config.format == "onnx":
            return _onnx(config, control, loaded, output, job.data.get("data"))
        if config.format == "open_clip":
            return _open_clip(config, control, loaded, output)
        return _transformers(config, control, loaded, output)


def prepare(config: Export, workspace: Workspace) -> Job:
    """What is exported, and on what data it is measured, if on any.

    Raises:
        BadInput: options that do not belong together, a package that is missing, an ONNX folder as input, data of another task, a network
            that transformers' own classes cannot express.
    """
    with workspace.checking():
        check(config)
    loaded = workspace.checkpoint(config.model)
    with workspace.checking():
        check_model(config, loaded)
        keep_length(loaded, config.max_tokens)
        if config.format == "onnx" and config.rounds:
            check_length(loaded, config.text_length)
    data: dict[str, Any] = {}
    task = measured_of(loaded)
    if config.data and task:
        data["data"] = source = workspace.data(config, task.kind, config.split, loaded.preprocessing)
        if not len(source):
            raise BadInput(f"{config.data} has no images", f"split {config.split} of {source.name}", "use another --split")
    return Job(inputs={"model": config.model}, data=data)


def check(config: Export) -> None:
    """:class:`BadInput` for options that do not belong together, or a package that is missing."""
    if ranks.launched() > 1:
        raise BadInput("several processes were started", "an export is the work of one", "start a single process")
    if config.format == "onnx":
        onnx_files.require_packages()
    elif config.int8 or config.data:
        option, fix = ("--int8", "leave it out") if config.int8 else ("--data", "leave it out, and evaluate the folder with evlm eval")
        raise BadInput(f"{option} does not go with --format {config.format}", "only ONNX graphs are quantised and measured", fix)


def check_model(config: Export, loaded: Loaded) -> None:
    """:class:`BadInput` for a network that the format cannot express, or whose accuracy cannot be measured; looks at no weights."""
    if config.data and measured_of(loaded) is None:
        why = "none of the tasks that are measured is one that it does"
        raise BadInput(f"nothing is known to measure {config.model} by", why, "leave --data out")
    unfinished = not loaded.abilities or not loaded.model.exportable
    if config.format == "onnx" and unfinished:
        tuned = TASKS.get(loaded.manifest.config.get("task", ""))
        if tuned is not None and tuned.final:
            why = f"no ONNX graphs are made of a {loaded.family.name} that does it"
            raise BadInput(f"{config.model} is tuned for {tuned.name}", why, "use --format padded")
        raise BadInput(f"{config.model} is not tuned for a task", "pre-training is not exported", "finetune it for a task first")
    if config.format == "open_clip":
        open_clip.check(loaded.model.config, loaded.preprocessing, config.model)
    if config.format in ("hf", "open_clip"):
        try:
            stock.uniform_config(loaded.model.config, config.model)
        except BadInput as problem:
            if config.format == "hf":
                raise
            raise BadInput(f"{config.model} does not fit open_clip", problem.why, problem.fix) from None


def _onnx(config: Export, control: Control, loaded: Loaded, output: Output, source: Any) -> Manifest:
    began = time.monotonic()
    description = _description(config, loaded)
    variants: dict[str, tuple[Loaded, int]] = {"torch_fp32": (loaded, _bytes(loaded.path, ".safetensors"))}
    fp32 = output.working("fp32") if config.int8 else output.staging
    with temporary_files_in(output.working("tmp")):  # the quantiser makes some of its own
        description = _graphs(config, control, loaded, description, fp32)
        variants["onnx_fp32"] = _opened(loaded, description, fp32)
        if config.int8:
            description = _quantised(control, loaded, description, fp32, output.staging)
            variants["onnx_int8"] = _opened(loaded, description, output.staging)
        with enough_memory("measuring what was exported", f"lower batch_size (now {config.batch_size}) and batch_sizes, or set rounds=0"):
            measured = measure(config, variants, source, control)
    differences = {name: graph.difference for name, graph in description.graphs.items()}
    split = {"split": config.split, "images": len(source)} if source else "not measured"
    description.measured = {**measured, "accuracy_of": split}
    description = Description.model_validate(description.model_dump(mode="json", by_alias=True))
    (output.staging / ONNX).write_text(json.dumps(description.model_dump(mode="json", by_alias=True), indent=2) + "\n", encoding="utf-8")
    save_tokenizer(loaded.tokenizer, output.staging)
    write_settings(loaded.image_processor, loaded.sizes, output.staging)
    say(table(measured), quiet=control.quiet)
    manifest = output.manifest(
        family=loaded.family.name,
        accounting=loaded.manifest.accounting,
        data=[DataRecord(**record(source, config.split))] if source else [],
        cost=Cost(seconds=round(time.monotonic() - began, 3), peak_memory_bytes=peak_memory_bytes()),
        metrics={**measured, "difference": differences},
        extra={**_carried(loaded), "format": "onnx", "precision": description.precision, "accuracy_of": split},
    )
    done = output.commit(manifest)
    say(f"export: wrote {output.path} · {summary(done)}", quiet=control.quiet)
    return done


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Have libraries keep their temporary files in a folder that goes with the output, also after a kill."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _description(config: Export, loaded: Loaded) -> Description:
    task = measured_of(loaded)
    sizes = StoredSizes.model_validate(json.loads(json.dumps(loaded.sizes._asdict())))
    known: dict[str, Any] = {"abilities": sorted(loaded.abilities - {"pretrain", "contrast"}), "sizes": sizes}  # called so in the file
    return Description.model_construct(  # what is missing comes with the graphs
        family=loaded.family.name,
        **known,
        precision="fp32",
        opset=0,
        tolerance=config.tolerance,
        graphs={},
        answers=loaded.model.config.answers,
        rank_top=loaded.model.config.rank_top,
        max_tokens=loaded.model.config.max_tokens,
        **(task.exported(loaded) if task else {}),
    )


def _graphs(config: Export, control: Control, loaded: Loaded, description: Description, folder: Path) -> Description:
    """Every graph of the network in `folder`, compared with torch."""
    files, opset = {}, 0
    for graph in loaded.model.graphs():
        path = folder / f"{graph.name}.onnx"
        opset = onnx_files.write(graph, path, fuse=config.fuse)
        session = open_session(path)
        off = onnx_files.difference(graph, session)
        sizes = f"{len(graph.sizes)} sizes of {', '.join(graph.sizes[0])}"
        say(f"export: {path.name} differs from torch by {off:.1e} at most, over {sizes}", quiet=control.quiet)
        if not off <= config.tolerance:
            why = f"outputs of {path.name} are off by {off:.2e}, {config.tolerance:.1e} is allowed"
            raise TargetMissed("the ONNX graph does not compute what the checkpoint does", why, "nothing was written")
        inputs, outputs = ({port.name: _port(port) for port in ports} for ports in (session.get_inputs(), session.get_outputs()))
        files[graph.name] = GraphFile(file=path.name, inputs=inputs, outputs=outputs, difference=off)
    return description.model_copy(update={"graphs": files, "opset": opset})


def _port(port: Any) -> Port:
    return Port(type=TYPES[port.type], shape=list(port.shape))


def _quantised(control: Control, loaded: Loaded, description: Description, source: Path, target: Path) -> Description:
    """int8 copies of the graphs in `source`; how far they are from torch is told, not limited: accuracy is what counts."""
    files = {}
    for graph in loaded.model.graphs():
        file = description.graphs[graph.name]
        onnx_files.quantise(source / file.file, target / file.file)
        off = onnx_files.difference(graph, open_session(target / file.file))
        say(f"export: {file.file} in int8 differs from torch by {off:.1e} at most", quiet=control.quiet)
        files[graph.name] = file.model_copy(update={"difference": off})
    return description.model_copy(update={"graphs": files, "precision": "int8"})


def _opened(loaded: Loaded, description: Description, folder: Path) -> tuple[Loaded, int]:
    """The graphs in `folder` as a checkpoint in memory, and their bytes."""
    sessions = {name: open_session(folder / graph.file) for name, graph in description.graphs.items()}
    variant = Loaded(loaded.path, Exported(), ExportedModel(description, sessions), loaded.tokenizer, loaded.manifest)
    return variant, _bytes(folder, ".onnx", ".onnx.data")


def _bytes(folder: Path, *endings: str) -> int:
    aside = ("gates.safetensors", "dense.safetensors")
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.endswith(endings) and path.name not in aside)


def _carried(loaded: Loaded) -> dict[str, Any]:
    """How the model was tuned, which decides how it is asked; the settings of the export do not say it."""
    names = ("task", "quirks", "max_answer_tokens", "label_smoothing")
    return {name: value for name in names if (value := loaded.manifest.noted(name, Any, None)) is not None}


def _transformers(config: Export, control: Control, loaded: Loaded, output: Output) -> Manifest:
    began = time.monotonic()
    model = loaded.model
    made = stock.padded(model) if config.format == "padded" else stock.uniform(model, config.model)
    loaded.family.save(made, output.staging)
    name = stock.class_of(output.staging, model.config)
    if config.format == "hf" and name is None:
        raise stock.no_class(config.model, model.config)
    off = stock.difference(model, output.staging, name)
    foreign = model.config.foreign
    opens = f"transformers' {name}" if name else f"this package only: {foreign or 'transformers has no such class'}"
    say(f"export: opens with {opens}; differs from the checkpoint by {off:.1e} at most", quiet=control.quiet)
    if not off <= stock.TOLERANCE:
        why = f"outputs are off by {off:.2e}, {stock.TOLERANCE:.1e} is allowed"
        raise TargetMissed("the exported folder does not compute what the checkpoint does", why, "nothing was written")
    cost = stock.cost(model, made)
    sizes = {"before": _bytes(loaded.path, ".safetensors"), "after": _bytes(output.staging, ".safetensors")}
    say(stock.sentence({**cost, "bytes": sizes}), quiet=control.quiet)
    shutil.rmtree(output.staging)
    return write(
        output,
        loaded.family,
        made,
        loaded.tokenizer,
        control=control,
        image_processor=loaded.image_processor,
        spent=Spent(seconds=time.monotonic() - began),
        metrics={"difference": off, "cost": {**cost, "bytes": sizes}},
        extra={**_carried(loaded), "format": config.format, "stock_class": name},
    )


def _open_clip(config: Export, control: Control, loaded: Loaded, output: Output) -> Manifest:
    began = time.monotonic()
    model = stock.uniform(loaded.model, config.model)
    open_clip.write(model, loaded.preprocessing, output.staging, config.model)
    off = open_clip.difference(loaded.model, output.staging)
    say(f"export: open_clip's CLIP, computed from what was written, differs by {off:.1e} at most", quiet=control.quiet)
    if not off <= stock.TOLERANCE:
        why = f"features are off by {off:.2e}, {stock.TOLERANCE:.1e} is allowed"
        raise TargetMissed("the exported folder does not compute what the checkpoint does", why, "nothing was written")
    save_tokenizer(loaded.tokenizer, output.staging)
    sizes = {"before": _bytes(loaded.path, ".safetensors"), "after": _bytes(output.staging, ".safetensors")}
    manifest = output.manifest(
        family=loaded.family.name,
        accounting=loaded.manifest.accounting,
        cost=Cost(seconds=round(time.monotonic() - began, 3), peak_memory_bytes=peak_memory_bytes()),
        metrics={"difference": off, "cost": {"bytes": sizes}},
        extra={**_carried(loaded), "format": "open_clip"},
    )
    done = output.commit(manifest)
    say(f"export: wrote {output.path} · {summary(done)}", quiet=control.quiet)
    return done
