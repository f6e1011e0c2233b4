"""A family's graphs as ONNX files: written, compared with torch, and quantised."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efficientvlm.errors import BadInput
from efficientvlm.export.fused import FusedAttention
from efficientvlm.families.network import Graph
from efficientvlm.families.onnx.sessions import INSTALL, run_session, runtime

SINGLE_FILE = 1_500_000_000  # bytes of weights; a protobuf file ends at 2 GB, the weights then lie beside it


def require_packages() -> None:
    """:class:`BadInput` unless everything that writes and runs ONNX is installed."""
    runtime()
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise BadInput("ONNX cannot be written", str(error), INSTALL) from None


class _ByPosition(nn.Module):
    """`torch.onnx` names inputs by their order: a tuple in, the graph's own mapping inside."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module, self.names = graph.module, list(graph.axes)

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.module(dict(zip(self.names, tensors, strict=True)))
        return outputs


@torch.no_grad()
def write(graph: Graph, path: Path, *, fuse: bool = True) -> int:
    """Export `graph` to the file `path` with dynamic axes; the opset it uses. With `fuse` attention is ONNX Runtime's own operator."""
    inputs = graph.example(graph.sizes[0])
    dims = {name: torch.export.Dim(name) for axes in graph.axes.values() for name in axes.values()}
    shapes = tuple({dim: dims[name] for dim, name in graph.axes[key].items()} for key in inputs)
    weights = sum(tensor.nbytes for tensor in graph.module.state_dict().values())
    with _silence(), FusedAttention() if fuse else contextlib.nullcontext():
        program = torch.onnx.export(
            _ByPosition(graph).eval(),
            (tuple(inputs.values()),),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(shapes,),
        )
        assert program is not None
        program.save(path, external_data=weights > SINGLE_FILE)
    for port in program.model.graph.inputs:
        for dim, axis in graph.axes[str(port.name)].items():
            if port.shape is None or isinstance(port.shape[dim], int):  # the exporter fixes an axis that the code turns into a number
                raise ValueError(f"graph {graph.name}: axis {axis} of {port.name} is not dynamic")
    return int(program.model.opset_imports[""])


@torch.no_grad()
def difference(graph: Graph, session: Any) -> float:
    """Largest difference between torch and ONNX over all outputs and `graph.sizes`, divided by the output's scale (at least 1)."""
    worst = 0.0
    for sizes in graph.sizes:
        inputs = graph.example(sizes)
        expected = graph.module(inputs)
        for name, wanted, got in zip(graph.outputs, expected, run_session(session, inputs), strict=True):
            if wanted.shape != got.shape:
                raise ValueError(f"graph {graph.name}: {name} has shape {list(got.shape)}, torch gives {list(wanted.shape)} for {sizes}")
            if wanted.numel():
                scale = max(1.0, float(wanted.abs().max()))
                worst = max(worst, float((wanted - got).abs().nan_to_num(nan=float("inf")).max()) / scale)
    return worst


def quantise(source: Path, target: Path) -> None:
    """int8 weights for the matrix products with constant weights, activations quantised while it runs; everything else stays fp32.

    Of the eight bits the weights use seven. A processor with AVX2 or AVX-512 but without VNNI adds two products of an activation and a
    weight in 16 bits, and what does not fit is cut without a word; with seven bits it always fits: one file gives the same everywhere.
    """
    import onnx

    runtime()  # first, so that it is told not to report
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    # The exporter's intermediate shapes contradict those the quantiser infers: ShapeInferenceError. It infers its own where there are none.
    del model.graph.value_info[:]
    with _silence():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # behind operators that shape inference does not know
            use_external_data_format=source.with_name(source.name + ".data").exists(),
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No word of the exporter and the quantiser about packages and names that do not matter here."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx._internal.exporter._registration", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
