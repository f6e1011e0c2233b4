"""ONNX Runtime: a graph is opened, compared with what is said of it, and run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.checkpoints.files import open_plain
from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.onnx.description import ONNX, GraphFile
from efficientvlm.runtime.memory import out_of_memory

INSTALL = "pip install 'efficientvlm[onnx]'"


def runtime() -> Any:
    """ONNX Runtime, which does not report to its makers; :class:`BadInput` if it is not installed. Nothing else here imports it first."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is loaded; it cannot be switched off later
    try:
        import onnxruntime
    except ImportError as error:
        raise BadInput("ONNX Runtime is not installed", str(error), INSTALL) from None
    return onnxruntime


def open_session(path: Path) -> Any:
    """A session on the processor with as many threads as torch has."""
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads would slow whatever runs next
    open_plain(path).close()
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime's own exceptions share no base class
        raise BadInput(f"cannot open {path}", _first_line(error), "check the folder with `evlm verify`") from None


def run_session(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs for `inputs`; those that the graph does not use are left out.

    Raises:
        BadInput: the graph cannot work on them.
    """
    wanted = {port.name for port in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted}
    try:
        return [torch.from_numpy(array) for array in session.run(None, feed)]
    except Exception as error:
        if out_of_memory(error):
            raise
        raise BadInput("an ONNX graph failed", _first_line(error), "check the folder with `evlm verify`, or export it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_ports(name: str, graph: GraphFile, session: Any, where: Path) -> None:
    """:class:`BadInput` unless inputs and outputs of the graph are those that `onnx.json` says, in name, and where it is fixed in size."""
    for kind, stated, found in (("inputs", graph.inputs, session.get_inputs()), ("outputs", graph.outputs, session.get_outputs())):
        shapes = {port.name: port.shape for port in found}
        if list(stated) != list(shapes) if kind == "outputs" else not set(shapes) <= set(stated):
            why = f"{name} has the {kind} {shorten(', '.join(shapes))}, {shorten(', '.join(stated))} by {ONNX}"
            raise BadInput(f"{where} does not fit its {ONNX}", why, "export it again")
        for port, shape in shapes.items():
            fixed = [(ours, theirs) for ours, theirs in zip(stated[port].shape, shape, strict=False) if isinstance(theirs, int)]
            if len(shape) != len(stated[port].shape) or any(ours != theirs for ours, theirs in fixed):
                why = f"{name} takes {port} as {shape}, {stated[port].shape} by {ONNX}"
                raise BadInput(f"{where} does not fit its {ONNX}", why, "export it again")
