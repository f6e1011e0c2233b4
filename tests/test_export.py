"""Exports compute what the checkpoint does, keep every saving, and open where this package is not."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compression_cases import CONFIGS, build, family, network, tiny_blip, tiny_clip, tiny_siglip
from conftest import QUIET, SHAPES, run_stage
from PIL import Image

import efficientvlm
from efficientvlm.checkpoints import lineage
from efficientvlm.checkpoints.folder import Output
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.data.kinds.questions import QUESTIONS
from efficientvlm.data.opening import open_data
from efficientvlm.data.tokenizer import train_wordpiece
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.export import onnx_files, stock
from efficientvlm.families.anatomy import NEURON
from efficientvlm.families.blip.config import BlipAnswerConfig, BlipCaptionConfig, BlipRetrievalConfig
from efficientvlm.families.blip.family import BLIP
from efficientvlm.families.clip.family import CLIP
from efficientvlm.families.onnx.description import ONNX, Description, StoredSizes
from efficientvlm.families.onnx.sessions import open_session
from efficientvlm.loaded import Loaded, load
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.tasks import Answered
from efficientvlm.stages import predict
from efficientvlm.stages.common import write
from efficientvlm.stages.measuring import measure
from efficientvlm.tasks.answering import Answerer, evaluation_batches
from efficientvlm.tasks.choices import Agreement, Choice, Likeliest

FAST: dict[str, Any] = {"rounds": 1, "batch_sizes": [1], "data": SHAPES, "limit": 4, "format": "onnx"}
FREE = Answered(mode="generate")


@pytest.fixture(scope="session")
def exported(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model of the chain as ONNX graphs."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    run_stage("export", model=str(chain / "pruned"), out=str(out), **FAST)
    return out


def batch_of(model: Path, images: int) -> dict[str, Any]:
    loaded = load(str(model))
    source = open_data(QUESTIONS, SHAPES, "test", limit=images, image_size=loaded.sizes.image_size)
    return next(iter(evaluation_batches(source, Answerer(loaded).texts, images)))


def test_the_folder_says_what_it_holds(chain: Path, exported: Path) -> None:
    description = json.loads((exported / ONNX).read_text())
    question, answer = (description["graphs"][name] for name in ("question", "answer"))
    assert question["inputs"]["pixels"] == {"type": "float32", "shape": ["images", 3, 64, 64]}
    assert question["inputs"]["question_ids"]["shape"] == ["questions", "tokens"]
    assert answer["inputs"]["rows"]["shape"] == ["sequences"] and answer["inputs"]["answer_ids"]["shape"] == ["sequences", "length"]
    assert max(question["difference"], answer["difference"]) <= description["tolerance"]
    assert description["answers"] and description["precision"] == "fp32" and description["opset"] >= 18
    manifest = Manifest.model_validate_json((exported / "evlm_manifest.json").read_bytes())
    parent = load(str(chain / "pruned")).manifest
    assert manifest.stage == "export" and manifest.parents[0].path.endswith("pruned") and manifest.accounting == parent.accounting
    assert manifest.metrics["onnx_fp32"]["accuracy"] == manifest.metrics["torch_fp32"]["accuracy"]
    assert manifest.metrics["onnx_fp32"]["same_choices"] == 1.0 and "same_choices" not in manifest.metrics["torch_fp32"]
    assert manifest.extra["accuracy_of"] == {"split": "test", "images": 4} and manifest.data[0].split == "test"
    assert manifest.metrics["onnx_fp32"]["batch_1"]["median_ms"] > 0
    assert lineage.verify(exported) == [] and not list(exported.parent.glob(".*"))
    assert {"tokenizer.json", "preprocessor_config.json", "question.onnx", "answer.onnx", "README.md"} <= {
        p.name for p in exported.iterdir()
    }


def test_every_saving_is_in_the_graphs(chain: Path, exported: Path) -> None:
    """No weight of a graph has the width of an unpruned layer where layers were pruned."""
    model = load(str(chain / "pruned")).model
    shapes = {tuple(tensor.dims) for name in ("question", "answer") for tensor in onnx.load(exported / f"{name}.onnx").graph.initializer}
    kept = {len(indices) for group, indices in model.config.kept_indices().items() if group.endswith(NEURON)}
    width = model.config.vision_width
    full = model.config.vision_intermediate
    assert full not in kept and not {(width, full), (full, width)} & shapes
    assert all({(width, count), (count, width)} & shapes for count in kept if count > 1)


@pytest.mark.parametrize("images", [1, 3])
def test_answers_and_probabilities_are_those_of_torch(chain: Path, exported: Path, images: int) -> None:
    batch = batch_of(chain / "pruned", images)
    ours, graphs = load(str(chain / "pruned")), load(str(exported), exported=True)
    for mine, theirs in zip(Answerer(ours).scored(batch), Answerer(graphs).scored(batch), strict=True):
        assert [p for _, p in mine] == pytest.approx([p for _, p in theirs], abs=1e-5)
        assert dict(mine) == pytest.approx(dict(theirs), abs=1e-5)
    assert Answerer(ours, FREE)(batch) == Answerer(graphs, FREE)(batch)


def test_it_is_evaluated_timed_and_asked_like_a_checkpoint(chain: Path, exported: Path, tmp_path: Path) -> None:
    pruned, graphs = str(chain / "pruned"), str(exported)
    ours, theirs = (run_stage("eval", model=model, data=SHAPES, limit=6, device="cpu") for model in (pruned, graphs))
    assert ours["metrics"] == theirs["metrics"]
    assert ours["influence"] == theirs["influence"] and theirs["influence"]["inputs"]["image"]["outputs"] == {"answer": 1.0}
    result = run_stage("bench", models=[pruned, graphs], batch_sizes=[2], rounds=1, warmup_rounds=0, device="cpu")
    assert [model["form"] for model in result["models"]] == ["torch", "onnx fp32"]
    assert len({model["parameters_timed"] for model in result["models"]}) == 1
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.png")
    asked = [predict.run(model=model, image=str(tmp_path / "a.png"), question="what color is it?") for model in (pruned, graphs)]
    assert asked[0]["answers"][0]["probability"] == pytest.approx(asked[1]["answers"][0]["probability"], abs=1e-5)


ALONE = """
import json, sys
import numpy as np, onnxruntime
folder, tensors = sys.argv[1], np.load(sys.argv[2])
graphs = json.load(open(folder + "/onnx.json"))["graphs"]
for name, graph in graphs.items():
    session = onnxruntime.InferenceSession(folder + "/" + graph["file"], providers=["CPUExecutionProvider"])
    given = session.run(None, {key: tensors[name + "." + key] for key in graph["inputs"]})
    for key, value in zip(graph["outputs"], given, strict=True):
        np.testing.assert_allclose(value, tensors[name + "." + key], rtol=1e-4, atol=1e-4)
assert not {"torch", "transformers", "efficientvlm"} & set(sys.modules)
print(len(graphs), "graphs")
"""


def test_onnxruntime_alone_computes_the_same(chain: Path, exported: Path, tmp_path: Path) -> None:
    ours, tensors = load(str(chain / "pruned")), {}
    for graph in ours.model.graphs():
        inputs = graph.example({axis: 3 + at for at, axis in enumerate(graph.sizes[0])})
        with torch.no_grad():
            outputs = dict(zip(graph.outputs, graph.module(inputs), strict=True))
        tensors |= {f"{graph.name}.{name}": tensor.numpy() for name, tensor in {**inputs, **outputs}.items()}
    np.savez(tmp_path / "tensors.npz", **tensors)
    command = [sys.executable, "-c", ALONE, str(exported), str(tmp_path / "tensors.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2 graphs\n", done.stderr


@pytest.fixture
def copied(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are not exported again but copied."""

    def write(graph: Any, path: Path, **_: Any) -> int:
        shutil.copyfile(exported / path.name, path)
        return 20

    monkeypatch.setattr(onnx_files, "write", write)


def test_int8_is_measured_beside_fp32(chain: Path, tmp_path: Path, copied: None) -> None:
    manifest = run_stage("export", model=str(chain / "pruned"), out=str(tmp_path / "int8"), int8=True, split="val", **FAST)
    variants = {name: manifest.metrics[name] for name in ("torch_fp32", "onnx_fp32", "onnx_int8")}
    assert all(0 <= values["accuracy"] <= 1 and values["bytes"] and values["batch_1"]["median_ms"] > 0 for values in variants.values())
    assert manifest.extra["accuracy_of"]["split"] == "val" and manifest.metrics["difference"]["question"] > 1e-5
    assert json.loads((tmp_path / "int8" / ONNX).read_text())["precision"] == "int8"
    operations = {node.op_type for node in onnx.load(tmp_path / "int8" / "question.onnx").graph.node}
    assert "MatMulInteger" in operations and not list(tmp_path.glob("*/*fp32*"))
    scored = Answerer(load(str(tmp_path / "int8"), exported=True)).scored(batch_of(chain / "pruned", 2))
    assert all(sum(p for _, p in row) == pytest.approx(1, abs=1e-4) for row in scored)


def test_without_data_accuracy_is_said_to_be_unmeasured(chain: Path, tmp_path: Path, copied: None, capsys: Any) -> None:
    from efficientvlm.control import Control

    settings = {**FAST, "data": None, "rounds": 0}
    manifest = run_stage("export", Control(), model=str(chain / "pruned"), out=str(tmp_path / "o"), **settings)
    assert manifest.extra["accuracy_of"] == "not measured" and "accuracy" not in manifest.metrics["onnx_fp32"]
    assert "not measured" in capsys.readouterr().err
    same = run_stage("export", Control(), model=str(chain / "pruned"), out=str(tmp_path / "o"), **settings)
    assert same == manifest and "up to date" in capsys.readouterr().err


def test_a_graph_that_computes_something_else_is_not_kept(chain: Path, tmp_path: Path, copied: None) -> None:
    with pytest.raises(TargetMissed, match="does not compute"):
        run_stage("export", model=str(chain / "pruned"), out=str(tmp_path / "o"), **FAST, tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(chain: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, out = str(chain / "pruned"), str(tmp_path / "o")
    for settings, words in (
        ({"model": pruned, "format": "padded", "int8": True}, "only ONNX"),
        ({"model": pruned, "format": "hf", "data": SHAPES}, "only ONNX"),
        ({"model": pruned, "format": "hf"}, "no class for this xvlm"),
        ({"model": str(exported), "format": "padded"}, "holds ONNX graphs"),
        ({"model": str(chain / "init"), "format": "onnx"}, "not tuned for a task"),
        ({"model": str(chain / "init"), "format": "onnx", "data": SHAPES}, "not tuned for a task"),
    ):
        with pytest.raises(BadInput, match=words):
            run_stage("export", out=out, **settings)
    Output.open(tmp_path / "half", stage="prune", inputs={}, config={})
    with pytest.raises(BadInput, match="not finished"):
        run_stage("export", model=str(tmp_path / "half"), out=out, format="padded")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadInput, match="onnxruntime") as caught:
        run_stage("export", model=pruned, out=out, format="onnx")
    assert "pip install" in caught.value.fix
    with pytest.raises(BadInput, match="not installed"):
        load(str(exported), exported=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="not empty"):
        run_stage("export", model=pruned, out=str(tmp_path / "mine"), format="padded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "mine"]


def test_graphs_are_not_trained_or_changed(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds ONNX graphs"):
        run_stage("shrink", model=str(exported), out=str(tmp_path / "o"))
    with pytest.raises(BadInput, match="holds ONNX graphs"):
        efficientvlm.load(str(exported))
    with pytest.raises(BadInput, match="does not run in bf16"):
        run_stage("eval", model=str(exported), data=SHAPES, precision="bf16", device="cpu")
    graphs = load(str(exported), exported=True)
    with pytest.raises(BadInput, match="do not run on cuda"):
        graphs.model.to(torch.device("cuda"))
    with pytest.raises(BadInput, match="nothing for distillation"):
        graphs.model.encode({}, ["vision.hidden"])


def test_a_plan_asks_graphs_and_refuses_to_train_them(chain: Path, exported: Path, tmp_path: Path) -> None:
    def planned(*stages: tuple[str, str, dict[str, Any]]) -> Any:
        return plan(
            [
                Step(name, stage, stage_settings(stage, {"out": str(tmp_path / name), "data": SHAPES, **given}))
                for name, stage, given in stages
            ]
        )

    new, there = str(tmp_path / "graphs"), str(exported)
    known = planned(("asked", "eval", {"model": there}), ("tuned", "finetune", {"model": there}))
    ahead = planned(
        ("graphs", "export", {"model": str(chain / "pruned"), **FAST}),
        ("asked", "eval", {"model": new}),
        ("tuned", "finetune", {"model": new}),
    )
    for made, words in ((known, "holds"), (ahead, "will hold")):
        (problem,) = made.problems.found
        assert problem.stage == "tuned" and f"{words} ONNX graphs" in str(problem.error)


def test_damaged_graphs_are_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "o")
    content = (tmp_path / "o" / "question.onnx").read_bytes()
    (tmp_path / "o" / "question.onnx").write_bytes(b"\xff" * len(content))
    with pytest.raises(BadInput, match=r"question\.onnx"):
        load(str(tmp_path / "o"), exported=True)
    (tmp_path / "o" / "question.onnx").write_bytes(content)
    text = (tmp_path / "o" / ONNX).read_text()
    (tmp_path / "o" / ONNX).write_text(text.replace('"precision": "fp32"', '"precision": "fp64"'))
    with pytest.raises(BadInput, match="precision"):
        load(str(tmp_path / "o"), exported=True)


def test_a_padded_xvlm_opens_with_this_package(chain: Path, tmp_path: Path) -> None:
    manifest = run_stage("export", model=str(chain / "pruned"), out=str(tmp_path / "o"), format="padded")
    cost = manifest.metrics["cost"]
    assert all(cost[name]["after"] > cost[name]["before"] for name in ("parameters", "macs", "bytes"))
    assert manifest.extra["stock_class"] is None and manifest.accounting["sparsity"]["achieved"] == 0
    batch = batch_of(chain / "pruned", 2)
    before, after = (load(str(path)) for path in (chain / "pruned", tmp_path / "o"))
    assert after.model.config.kept is None
    for mine, theirs in zip(Answerer(before).scored(batch), Answerer(after).scored(batch), strict=True):
        assert dict(mine) == pytest.approx(dict(theirs), abs=1e-5)


def small(config: Any) -> Any:
    """A network with random weights and biases."""
    torch.manual_seed(0)
    model = network(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def cut(model: Any, **keep: int) -> Any:
    """`model` with the first so many neurons of every layer of a tower; `head=n` for all heads."""
    units = model.units()
    kept = [unit.index < keep.get(unit.tower if unit.kind == NEURON else "head", 10**6) for unit in units]
    return slice_model(model, torch.tensor(kept))


def checkpoint(path: Path, family: Any, model: Any, words: str = "red blue green") -> Path:
    tokenizer = train_wordpiece([words], model.config.sizes().vocab_size)
    output = Output.open(path, stage="import", inputs={}, config={})
    write(output, family, model, tokenizer, control=QUIET, origin="random")
    return path


def equal_towers(kind: Any, **changes: Any) -> Any:
    config = tiny_blip(kind, **changes)
    config.vision_config.hidden_size = config.text_config.hidden_size
    config.vision_config.num_attention_heads = 3
    return type(config).from_dict(config.to_dict())


OPENED = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
for folder, name, forward in json.loads(sys.argv[1]):
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tensors = load_file(forward)
    inputs = {key[3:]: value for key, value in tensors.items() if key.startswith("in.")}
    with torch.no_grad():
        given = [value for value in model.eval()(**inputs).to_tuple() if isinstance(value, torch.Tensor)]
    for number, value in enumerate(given):
        torch.testing.assert_close(value, tensors[f"out.{number}"], rtol=1e-5, atol=1e-5)
    print(name, len(given) > 0, sum(parameter.numel() for parameter in model.parameters()))
assert "efficientvlm" not in sys.modules
"""


def _forward(model: Any, file: Path) -> str:
    """A file with inputs of transformers' class and what `model` gives for them."""
    from safetensors.torch import save_file

    inputs = model.stock_inputs(stock._random_batch(model))
    with torch.no_grad():
        outputs = stock._tensors(model(**inputs))
    tensors = {f"in.{key}": value for key, value in inputs.items()} | {f"out.{n}": value for n, value in enumerate(outputs)}
    save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, file)
    return str(file)


def test_stock_transformers_opens_padded_and_smaller_folders(tmp_path: Path) -> None:
    """Without this package, in a process of its own: padded whatever was cut, `hf` where neurons were cut evenly."""
    jobs, sizes = [], {}
    named = "BlipForConditionalGeneration", "BlipForQuestionAnswering"
    few = (
        tiny_blip(BlipCaptionConfig, cross_layers={"decoder": [1]}),
        equal_towers(BlipAnswerConfig, cross_layers={"text": [0], "decoder": [1]}),
    )
    for name, config in zip(named, few, strict=True):  # of which one layer of two has cross-attention, pruned besides
        made = cut(small(config), vision=3, head=1)
        source = checkpoint(tmp_path / f"{name}-few", BLIP(), made)
        manifest = run_stage("export", model=str(source), out=str(tmp_path / f"{name}-whole"), format="padded")
        assert manifest.extra["stock_class"] == name and manifest.metrics["difference"] <= 1e-5
        whole = load(str(tmp_path / f"{name}-whole")).model
        jobs.append([str(tmp_path / f"{name}-whole"), name, _forward(made, tmp_path / f"{name}-whole.safetensors")])
        sizes[f"{name}-whole"] = sum(parameter.numel() for parameter in whole.parameters())
    for name, kind, config in (("CLIPModel", CLIP(), tiny_clip()), ("BlipForQuestionAnswering", BLIP(), equal_towers(BlipAnswerConfig))):
        model = small(config)
        for form, made in (("padded", cut(model, vision=3, head=1)), ("hf", cut(model, vision=3, text=4, decoder=4))):
            source = checkpoint(tmp_path / f"{name}-{form}-cut", kind, made)
            out = tmp_path / f"{name}-{form}"
            manifest = run_stage("export", model=str(source), out=str(out), format=form)
            assert manifest.extra["stock_class"] == name and manifest.metrics["difference"] <= 1e-5
            jobs.append([str(out), name, _forward(made, tmp_path / f"{out.name}.safetensors")])
            sizes[out.name] = sum(parameter.numel() for parameter in (model if form == "padded" else made).parameters())
    done = subprocess.run([sys.executable, "-c", OPENED, json.dumps(jobs)], capture_output=True, text=True, cwd=tmp_path)
    wanted = [f"{name} True {sizes[Path(out).name]}" for out, name, _ in jobs]
    assert done.stdout.splitlines() == wanted, done.stderr


@pytest.mark.parametrize(
    ("family", "config", "keep", "words"),
    [
        (CLIP(), tiny_clip(), {"head": 1}, "vision layer 0 has 1 of 4 heads"),
        (CLIP(), tiny_siglip(), {"vision": 4}, "pooling head"),
        (CLIP(), tiny_clip(), {"text": 0}, "text layer 0 has no neurons left"),
        (BLIP(), equal_towers(BlipAnswerConfig), {"text": 4}, "one number stands for both"),
        (BLIP(), tiny_blip(BlipAnswerConfig), {}, "images are 16 columns wide and questions 24"),
        (
            BLIP(),
            tiny_blip(BlipRetrievalConfig, cross_layers={"text": [1]}),
            {},
            "layer 0 of text has no cross-attention, and texts",
        ),
        (BLIP(), tiny_blip(BlipCaptionConfig, cross_layers={"decoder": [1]}), {}, "layer 0 of decoder has no cross-attention, where all"),
    ],
    ids=["heads", "siglip", "empty", "blip neurons", "blip widths", "blip matching", "blip layers"],
)
def test_what_stock_classes_cannot_say_is_named(family: Any, config: Any, keep: dict[str, int], words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        stock.uniform(cut(small(config), **keep), "model")
    assert "--format onnx" in caught.value.fix


def test_a_network_before_its_task_is_named() -> None:
    with pytest.raises(BadInput, match="not tuned for a task") as caught:
        stock.uniform(small(CONFIGS["blip-pretraining"]), "model")
    assert caught.value.fix == "finetune it for a task first"


def test_uneven_layers_are_named() -> None:
    model = small(tiny_clip())
    keep = [unit.kind != NEURON or unit.layer == 0 or unit.index < 2 for unit in model.units()]
    with pytest.raises(BadInput, match="vision layer 1 has 2 neurons and layer 0 has 6"):
        stock.uniform(slice_model(model, torch.tensor(keep)), "model")


def test_an_axis_that_the_code_turns_into_a_number_is_found(tmp_path: Path) -> None:
    model, _ = build("clip")
    graph = next(graph for graph in model.graphs() if graph.name == "similarity")

    class Fixed(torch.nn.Module):
        def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
            return (inputs["image_features"] * len(inputs["image_features"]) @ inputs["text_features"].T,)

    with pytest.raises(ValueError, match="axis images of image_features is not dynamic"):
        onnx_files.write(graph._replace(module=Fixed()), tmp_path / "graph.onnx")


@pytest.mark.parametrize("fuse", [True, False])
def test_attention_without_a_mask_is_one_operator_unless_standard_onnx_is_wanted(fuse: bool, tmp_path: Path) -> None:
    model, _ = build("clip")
    graph = next(graph for graph in model.graphs() if graph.name == "image")
    onnx_files.write(graph, tmp_path / "image.onnx", fuse=fuse)
    nodes = onnx.load(tmp_path / "image.onnx").graph.node
    assert [node.domain for node in nodes if node.op_type == "MultiHeadAttention"] == ["com.microsoft"] * 2 * fuse
    assert {node.domain for node in nodes} == ({"", "com.microsoft"} if fuse else {""})
    assert onnx_files.difference(graph, open_session(tmp_path / "image.onnx")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"),
    [(name, 0.5) for name in CONFIGS if name not in ("toy", "cross_encoder", "blip-pretraining")]
    + [(name, 0.0) for name in ("clip", "xvlm", "xvlm-swin", "blip-caption")],  # nothing left: a family each, and the Swin
)
def test_graphs_of_every_family_and_pruned_shape(name: str, share: float, tmp_path: Path) -> None:
    model, _ = build(name)
    units = model.units()
    sliced = slice_model(model, torch.rand(len(units), generator=torch.Generator().manual_seed(1)) < share)
    for graph in sliced.graphs():
        onnx_files.write(graph, tmp_path / f"{graph.name}.onnx")
        session = open_session(tmp_path / f"{graph.name}.onnx")
        assert onnx_files.difference(graph, session) < 1e-5
        assert {port.name for port in session.get_inputs()} == set(graph.axes)


def test_a_blip_that_writes_says_the_same_in_graphs(tmp_path: Path) -> None:
    """Of random pictures, and in int8 as far as it does; what differs otherwise than by rounding is not written."""
    source = checkpoint(tmp_path / "model", family("blip-caption"), small(CONFIGS["blip-caption"]))
    made = run_stage("export", model=str(source), out=str(tmp_path / "onnx"), format="onnx", int8=True, rounds=0)
    assert made.metrics["onnx_fp32"]["same_choices"] == 1.0 and 0 <= made.metrics["onnx_int8"]["same_choices"] <= 1
    assert (
        json.loads((tmp_path / "onnx" / ONNX).read_text())["measured"]["onnx_int8"]["same_choices"]
        == made.metrics["onnx_int8"]["same_choices"]
    )
    one, other = load(str(source)), load(str(source))
    with torch.no_grad():
        other.model.text_decoder.cls.predictions.bias.add_(torch.randn(other.sizes.vocab_size, generator=torch.Generator().manual_seed(0)))
    config = stage_settings("export", {"model": str(source), "out": "o", "format": "onnx", "rounds": 0})
    measured = measure(config, {"torch_fp32": (one, 1), "onnx_int8": (other, 1)}, None, QUIET)
    assert measured["onnx_int8"]["same_choices"] < 1
    with pytest.raises(TargetMissed, match="do not say what the checkpoint does"):
        measure(config, {"torch_fp32": (one, 1), "onnx_fp32": (other, 1)}, None, QUIET)


def test_what_could_go_either_way_is_no_difference() -> None:
    sure, close = Choice("a cat", 0.5), Choice("a dog", 1e-5)
    found = Agreement.between([sure, close, sure], [sure, Choice("a fox", 1e-5), Choice("a hen", 0.5)], 2e-4)
    assert (found.same, found.tied, found.of, found.different) == (1, 1, 3, [("a cat", "a hen")])
    choose = Likeliest(end=0)
    steps = [torch.tensor([[1.0, 3.0, 2.5], [0.0, 0.2, 0.1]]), torch.tensor([[9.0, 0.0, 3.0], [0.0, 5.0, 4.99]]), torch.zeros(2, 3)]
    assert [choose(scores, number).tolist() for number, scores in enumerate(steps)] == [[1, 1], [0, 1], [0, 0]]
    assert choose.margins.tolist() == pytest.approx([0.5 / 3, 0.0])  # the first row ended before the scores were equal


@pytest.mark.slow
@pytest.mark.parametrize("swin", [False, True], ids=["vit", "swin"])
def test_an_xvlm_for_retrieval_is_evaluated_and_searches_as_its_checkpoint_does(swin: bool, chain: Path, tmp_path: Path) -> None:
    config = CONFIGS["xvlm-swin" if swin else "xvlm"].copy(heads=["itc", "itm"], decoder_layers=0, vocab_size=90, max_positions=40)
    source, out = checkpoint(tmp_path / "model", family("xvlm"), small(config)), str(tmp_path / "onnx")
    if swin:  # a fusion layer that sees no picture, and one that sees it with two of three heads
        kept = {"fusion.0.cross_head": "", "fusion.1.cross_head": "0,2", "vision.3.neuron": "", "text.1.head": "1"}
        source = checkpoint(tmp_path / "pruned", family("xvlm"), small(config.copy(kept=kept)))
    data = {"data": SHAPES, "limit": 4}
    manifest = run_stage("export", model=str(source), out=out, format="onnx", rounds=0, **data)
    assert manifest.metrics["onnx_fp32"]["mean_recall"] == manifest.metrics["torch_fp32"]["mean_recall"]
    described = load(out, exported=True)
    assert described.abilities == {"embed", "match"} and list(described.config.graphs) == ["image", "text", "match"]
    ask = {"task": "retrieval", **data, "rerank": 10}
    ours, theirs = (run_stage("eval", model=path, **ask) for path in (str(source), out))
    assert theirs["metrics"] == ours["metrics"] and "reranked_mean_recall" in theirs["metrics"] and theirs["influence"] == ours["influence"]
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 20, 90)).save(tmp_path / f"{number}.png")
    search: dict[str, Any] = {"image": str(tmp_path), "text": ["a red circle", "green"], "device": "cpu", "quiet": True}
    found = [predict.run(model=path, **search)["answers"] for path in (str(source), out)]
    assert [(row["image"], row["text"]) for row in found[0]] == [(row["image"], row["text"]) for row in found[1]]
    assert [row["score"] for row in found[0]] == pytest.approx([row["score"] for row in found[1]], abs=1e-3)


@pytest.mark.parametrize(
    "name, int8",
    [("clip", True), pytest.param("siglip", False, marks=pytest.mark.slow), pytest.param("blip-retrieval", False, marks=pytest.mark.slow)],
)
def test_what_retrieves_is_evaluated_as_its_checkpoint_is(name: str, int8: bool, tmp_path: Path) -> None:
    config = CONFIGS[name]
    config = copy.deepcopy(config)
    config.text_config.update({"vocab_size": 90, "pad_token_id": 0, "eos_token_id": 3})  # as the tokenizer has them
    words = "a red green blue yellow circle square triangle on top of left right above below there is are and the"
    source, out = checkpoint(tmp_path / "model", family(name), small(config), words), tmp_path / "onnx"
    data = {"data": SHAPES, "limit": 4}
    manifest = run_stage("export", model=str(source), out=str(out), format="onnx", rounds=0, **data)
    torch_fp32, onnx_fp32 = manifest.metrics["torch_fp32"], manifest.metrics["onnx_fp32"]
    assert onnx_fp32["mean_recall"] == torch_fp32["mean_recall"] and "accuracy" not in onnx_fp32 and onnx_fp32["same_choices"] == 1.0
    assert manifest.extra["accuracy_of"] == {"split": "test", "images": 4}
    ask = {"task": "retrieval", **data, "rerank": 2 if "blip" in name else 0}
    ours, theirs = (run_stage("eval", model=str(path), **ask) for path in (source, out))
    assert theirs["metrics"] == ours["metrics"] and theirs["metrics"]["images"] == 4
    assert ("itm_accuracy" in theirs["metrics"]) is ("blip" in name)
    assert theirs["influence"] == ours["influence"]
    assert ours["influence"]["inputs"]["text"]["outputs"]["itc"] == ours["influence"]["inputs"]["image"]["outputs"]["itc"] == 1.0

    pixels = torch.randint(0, 256, (3, 3, config.vision_config.image_size, config.vision_config.image_size), dtype=torch.uint8)
    ids = network(config).example(2, 5)["text_ids"]
    mask, rows = torch.ones_like(ids), torch.tensor([2, 0])
    found = []
    for loaded in (load(str(source)), load(str(out), exported=True)):
        with torch.inference_mode():
            seen, image = loaded.model.embed_images(pixels)
            read, text = loaded.model.embed_texts(ids, mask)
            matched = loaded.model.match(seen[rows], torch.arange(2), read, mask) if "blip" in name else text
        found.append((image, text, matched))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if "blip" not in name:
        with pytest.raises(BadInput, match="by their features alone"):
            run_stage("eval", model=str(out), **ask | {"rerank": 2})
    if int8:
        quantised = run_stage("export", model=str(source), out=str(tmp_path / "int8"), format="onnx", int8=True, rounds=0, **data)
        assert quantised.metrics["torch_fp32"]["mean_recall"] == torch_fp32["mean_recall"]
        measured = run_stage("eval", model=str(tmp_path / "int8"), **ask)
        assert measured["precision"] == "int8" and measured["metrics"]["mean_recall"] == quantised.metrics["onnx_int8"]["mean_recall"]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda graphs: graphs.pop("text"), "no graph text, which the ability embed needs"),
        (lambda graphs: graphs["image"]["outputs"].pop("image_features"), "graph image has no image_features"),
        (lambda graphs: graphs["match"]["inputs"].pop("rows"), "does not go on from graph image: rows"),
        (lambda graphs: graphs["image"]["outputs"].pop("key_0"), "does not go on from graph image: key_0"),
        (
            lambda graphs: graphs["match"]["inputs"]["key_0"].update(shape=["images", "heads"]),
            r"gives key_0 as \[2, 5, 4\], graph match takes \[.heads.\]",
        ),
        (lambda graphs: graphs["match"]["outputs"].update(logit=graphs["match"]["outputs"].pop("logits")), "has no logits"),
    ],
)
def test_graphs_that_do_not_go_together_are_refused(spoil: Any, words: str) -> None:
    rows, pixels, feature = (["rows"], ["images", 3, 8, 8], ["images", 4])
    port = {"text_ids": ["texts", "tokens"], "text_mask": ["texts", "tokens"], "rows": rows, "key_0": ["images", 2, 5, 4]}

    def ports(**shapes: Any) -> dict[str, Any]:
        return {name: {"type": "float32" if name[0] in "pikl" else "int64", "shape": shape} for name, shape in shapes.items()}

    graphs = {
        "image": {"inputs": ports(pixels=pixels), "outputs": ports(image_features=feature, key_0=port["key_0"])},
        "text": {"inputs": ports(text_ids=["a", "b"], text_mask=["a", "b"]), "outputs": ports(text_features=["a", 4])},
        "match": {"inputs": ports(**port), "outputs": ports(logits=["texts", 2])},
    }
    graphs = {name: {"file": f"{name}.onnx", "difference": 0.0, **graph} for name, graph in graphs.items()}
    sizes = StoredSizes(
        image_size=8,
        patch_size=4,
        max_positions=9,
        vocab_size=9,
        widths={"vision": [4]},
        heads={},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    whole = {
        "family": "blip",
        "abilities": ["embed", "match"],
        "precision": "fp32",
        "opset": 18,
        "tolerance": 1e-4,
        "sizes": sizes.model_dump(),
    }
    assert Description.model_validate({**whole, "graphs": graphs}).abilities() == {"embed", "match"}
    spoil(graphs)
    with pytest.raises(ValueError, match=words):
        Description.model_validate({**whole, "graphs": graphs})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "blip-caption", "blip-retrieval"])
def test_other_tasks_are_timed_and_forwarded(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    source = checkpoint(tmp_path / "model", family(name), small(config))
    run_stage("export", model=str(source), out=str(tmp_path / "onnx"), format="onnx", int8=True, rounds=1, text_length=4)
    result = run_stage("bench", models=[str(source), str(tmp_path / "onnx")], batch_sizes=[2], text_length=4, rounds=1, warmup_rounds=0)
    assert [model["form"] for model in result["models"]] == ["torch", "onnx int8"]
    loaded: Loaded = load(str(tmp_path / "onnx"), exported=True)
    record = loaded.model.run(loaded.model.example(2, 4))
    assert record["logits"].shape[0] == 2 and bool(record["logits"].isfinite().all())


@pytest.mark.slow
def test_large_weights_lie_beside_their_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "SINGLE_FILE", -1)
    model, _ = build("clip")
    graph = model.graphs()[0]
    (tmp_path / "int8").mkdir()
    onnx_files.write(graph, tmp_path / "image.onnx")
    onnx_files.quantise(tmp_path / "image.onnx", tmp_path / "int8" / "image.onnx")
    stored = onnx.load(tmp_path / "int8" / "image.onnx").graph.initializer
    weights = [
        onnx.numpy_helper.to_array(tensor) for tensor in stored if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert weights and max(abs(weight.astype(int)).max() for weight in weights) == 64  # more would not fit where two products share 16 bits
    assert (tmp_path / "image.onnx.data").is_file() and (tmp_path / "int8" / "image.onnx.data").is_file()
    assert onnx_files.difference(graph, open_session(tmp_path / "image.onnx")) < 1e-5
    assert 0 < onnx_files.difference(graph, open_session(tmp_path / "int8" / "image.onnx")) < 0.5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny_blip(BlipAnswerConfig), "its decoder attends to questions as wide as images"),
        (tiny_blip(BlipRetrievalConfig, cross_layers={"text": [1]}), "it cannot be switched off in a class that has it in all"),
    ],
    ids=["widths", "matching"],
)
def test_padded_says_why_transformers_does_not_open_it(config: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "cut", BLIP(), cut(small(config), vision=3))
    manifest = run_stage("export", Control(), model=str(source), out=str(tmp_path / "out"), format="padded")
    assert manifest.extra["stock_class"] is None and words in " ".join(capsys.readouterr().err.split())
    opened = load(str(tmp_path / "out")).model
    assert opened.config.kept is None and opened.config.cross_layers == config.cross_layers
