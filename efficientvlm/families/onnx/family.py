"""Folders of ONNX graphs, as export writes them."""

from __future__ import annotations

from pathlib import Path

from efficientvlm.checkpoints import manifest
from efficientvlm.errors import BadInput
from efficientvlm.families.loading import read_json
from efficientvlm.families.onnx.description import ONNX, Description
from efficientvlm.families.onnx.network import PICTURES, ExportedModel
from efficientvlm.families.onnx.sessions import check_ports, open_session
from efficientvlm.settings.base import parse


class Exported:
    """How folders of ONNX graphs are opened; unlike a family's networks these are not trained, cut or saved."""

    name = "onnx"

    @staticmethod
    def read_config(path: Path) -> Description:
        """What `onnx.json` says; :class:`BadInput` for anything that no export writes there, all of it at once."""
        file = path / ONNX
        description = parse(Description, read_json(file), str(file), "export it again: another version may have written it")
        size = description.stored_sizes.image_size
        for name, graph in description.graphs.items():
            for pixels in (graph.inputs[port] for port in PICTURES if port in graph.inputs):
                if pixels.shape[1:] != [3, size, size]:
                    why = f"graph {name} takes pixels as {pixels.shape}, the images have {size} px"
                    raise BadInput(f"{file} cannot be used", why, "export it again")
        listed = manifest.read(path).files if (path / manifest.MANIFEST).is_file() else None
        if strangers := [graph.file for graph in description.graphs.values() if listed is not None and graph.file not in listed]:
            raise BadInput(f"{file} cannot be used", f"its {strangers[0]} is no file of this export", "export it again")
        return description

    @staticmethod
    def build(config: Description) -> ExportedModel:
        """What `config` says of the graphs, without them."""
        return ExportedModel(config, {})

    def load(self, path: Path) -> ExportedModel:
        """The graphs of `path`, ready to run; :class:`BadInput` if one is missing, damaged or another than `onnx.json` says."""
        config = self.read_config(path)
        sessions = {}
        for name, graph in config.graphs.items():
            sessions[name] = open_session(path / graph.file)
            check_ports(name, graph, sessions[name], path / graph.file)
        return ExportedModel(config, sessions)
