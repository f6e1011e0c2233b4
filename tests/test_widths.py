"""Students of another width: what they keep, what is drawn, what is refused, and how large the known ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compression_cases
import pytest
import torch
from conftest import run_stage

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.accounting import count_parameters
from efficientvlm.compression.importance import importance_scores
from efficientvlm.compression.surgery import slice_model
from efficientvlm.compression.widths import resize_model, resolve_sizes, stream
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import (
    BlipAnswerConfig,
    BlipCaptionConfig,
    BlipComparisonConfig,
    BlipPretrainingConfig,
    BlipRetrievalConfig,
    check_sizes,
)
from efficientvlm.families.blip.models import MODELS
from efficientvlm.settings.stages import Shrink
from efficientvlm.stages.shrink import wanted

KINDS = (BlipAnswerConfig, BlipCaptionConfig, BlipRetrievalConfig)


def blip(kind: Any) -> Any:
    torch.manual_seed(0)
    return MODELS[kind](compression_cases.tiny_blip(kind)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_the_same_size_is_its_teacher(kind: Any) -> None:
    teacher = blip(kind)
    towers = {tower: teacher.config.layered(tower, 0) for tower, count in teacher.config.layers().items() if count}
    student, origin = resize_model(teacher, towers)
    assert not origin.cut and not origin.random
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name


@pytest.mark.parametrize("kind", [BlipComparisonConfig, BlipPretrainingConfig])
def test_outputs_side_by_side_and_shared_layers_become_narrower(kind: Any) -> None:
    """What merges two images reads two outputs of the text's width; layers of a decoder that are the encoder's are named once."""
    teacher = blip(kind)
    student, origin = resize_model(teacher, resolve_sizes(teacher.config, {"text": 16}, {}, {}), 1, channels="leading")
    assert not origin.random and check_sizes(student.config, "config.json").cross_layers == {"text": [1]}
    if kind is BlipComparisonConfig:
        assert student.config.merging == [1]
        ours, theirs = (model.text_encoder.encoder.layer[1].crossattention.merge.weight for model in (student, teacher))
        assert torch.equal(ours, theirs[:16].unflatten(1, (2, 24))[..., :16].flatten(1))
    assert torch.isfinite(student.run(teacher.example(2, 5))["logits"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_are_those_that_pruning_by_magnitude_would_keep(kind: Any) -> None:
    teacher = blip(kind)
    sizes = resolve_sizes(teacher.config, {}, {}, {"vision": 4})
    student, origin = resize_model(teacher, sizes)
    units = teacher.units()
    scores = dict(zip(units, importance_scores("magnitude", teacher, units).tolist(), strict=True))
    groups: dict[str, list[Any]] = {}
    for unit in units:
        groups.setdefault(unit.group, []).append(unit)
    keep = [
        unit
        for group, there in groups.items()
        for unit in (sorted(there, key=scores.__getitem__)[-4:] if group.startswith("vision") and group.endswith("neuron") else there)
    ]
    sliced, batch = slice_model(teacher, keep), teacher.example(2, 5)
    torch.testing.assert_close(student.run(batch)["logits"], sliced.run(batch)["logits"])
    assert student.config.kept is None and not origin.random


@pytest.mark.parametrize("channels", ["important", "leading"])
def test_one_choice_of_columns_holds_for_all_tensors_of_a_stream(channels: Any) -> None:
    """Columns that are zero in every tensor of the stream are not kept where the important ones are, and the others are kept in order."""
    teacher = blip(BlipRetrievalConfig)
    zeros = torch.tensor([0, 2, 3, 5, 8, 9, 12, 15])
    state = teacher.state_dict()
    ours = {(site.tensor, site.dim) for unit in teacher.units() for site in unit.sites}  # of heads and neurons
    for name, dim in {*stream(teacher, "vision")} - ours:
        if state[name].dim() > 1:
            state[name].index_fill_(dim, zeros, 0)
    student, _ = resize_model(teacher, resolve_sizes(teacher.config, {"vision": 8}, {}, {}), channels=channels)
    kept = torch.arange(8) if channels == "leading" else torch.tensor([column for column in range(16) if column not in zeros])
    for name in ("vision_model.embeddings.class_embedding", "vision_model.post_layernorm.weight"):
        assert torch.equal(student.state_dict()[name], state[name].index_select(-1, kept)), name
    assert torch.equal(student.vision_proj.weight, state["vision_proj.weight"][:, kept])
    cross = "text_encoder.encoder.layer.0.crossattention.self.key.weight"
    assert torch.equal(student.state_dict()[cross], state[cross][:, kept]), "what looks at images reads the same columns"


def test_an_xvlm_becomes_narrower_and_a_swin_does_not() -> None:
    teacher, batch = compression_cases.build("xvlm")
    student, origin = resize_model(teacher, resolve_sizes(teacher.config, {"vision": 8, "fusion": 16}, {}, {}))
    assert not origin.random and student.config.text_width == 16
    assert student.run(batch)["logits"].shape == teacher.run(batch)["logits"].shape
    with pytest.raises(BadInput, match="a tower of their own"):
        resize_model(teacher, {}, 1)
    with pytest.raises(BadInput, match="each stage hangs on the one before"):
        resolve_sizes(compression_cases.tiny_swin(), {"vision": 8}, {}, {})


def test_streams_are_found_without_a_list() -> None:
    vision, text = (set(stream(blip(BlipRetrievalConfig), tower)) for tower in ("vision", "text"))
    assert ("vision_proj.weight", 1) in vision and ("itm_head.weight", 1) in text and ("vision_proj.weight", 0) not in vision
    assert ("text_encoder.embeddings.word_embeddings.weight", 1) in text
    assert ("text_encoder.encoder.layer.0.crossattention.self.value.weight", 1) in vision


@pytest.mark.parametrize("kind", KINDS)
def test_random_towers_are_drawn_by_the_seed_and_named(kind: Any) -> None:
    teacher = blip(kind)
    found = [resize_model(teacher, {}, redrawn=["vision"], seed=seed) for seed in (1, 1, 2)]
    (first, origin), (again, _), (other, _) = found
    name = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert origin.random and all(name.startswith("vision_model.") for name in origin.random)


def test_heads_of_another_size_are_drawn_and_said() -> None:
    teacher = blip(BlipCaptionConfig)
    _, origin = resize_model(teacher, resolve_sizes(teacher.config, {}, {"vision": 2}, {}))
    assert "heads of vision have 8 columns instead of 4" in str(origin)
    assert {name.split(".")[-2] for name in origin.random} == {"qkv", "projection"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"width": {"vision": 10}}, "heads have 4 columns each"),
        ({"width": {"vision": 32}}, "which has 16"),
        ({"width": {"tail": 8}}, "no such tower: tail"),
        ({"width": {"text": 16, "decoder": 8}}, "these towers are of one size"),
        ({"width": {"vision": 8}, "heads": {"vision": 3}}, "3 heads in 8 columns"),
        ({"neurons": {"text": 99}}, "which has 7"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        resolve_sizes(blip(BlipAnswerConfig).config, **{"width": {}, "heads": {}, "neurons": {}} | asked)


def test_a_pruned_teacher_has_no_units_to_give() -> None:
    teacher = blip(BlipRetrievalConfig)
    pruned = slice_model(teacher, [unit for unit in teacher.units() if unit.index])
    with pytest.raises(BadInput, match="too few are there"):
        resize_model(pruned, resolve_sizes(pruned.config, {}, {}, {"vision": 6, "text": 7}), 1)


BASE: dict[str, Any] = {
    "vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 224},
    "text_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30524},
}


@pytest.mark.parametrize(
    ("name", "kind", "parameters"),
    [
        ("dlip-small", BlipCaptionConfig, 47962940),
        ("dlip-small", BlipAnswerConfig, 74081084),
        ("dlip-base", BlipCaptionConfig, 109220540),
    ],
)
def test_presets_have_the_sizes_that_are_counted(name: Any, kind: Any, parameters: int) -> None:
    """Of DLIP's students 47.78 M and 108.86 M are vision and text encoder: 22.43 % and 51.1 % of 213 M."""
    config = kind(**BASE)
    config.text_config.max_position_embeddings = 512
    layers, sizes, fusion, _ = wanted(Shrink(model="-", out="-", preset=name), config)
    with torch.device("meta"):
        student = MODELS[kind](config.with_layers(layers).with_sizes(sizes, fusion))
    assert count_parameters(student)["total"] == parameters


def test_the_command_says_what_was_cut_and_the_student_goes_on(tmp_path: Path, evlm: Any) -> None:
    start = tmp_path / "blip"
    sizes = {"vision_width": 16, "vision_layers": 2, "vision_heads": 4, "text_width": 16, "text_layers": 2, "text_heads": 4}
    run_stage(
        "init", out=str(start), family="blip", size="tiny", data="shapes:size=8", settings={**sizes, "image_size": 32, "patch_size": 16}
    )
    code, _, err = evlm("shrink", "--model", start, "--set", "width={vision: 8, text: 8}", "--out", tmp_path / "narrow")
    assert code == 0, err
    done = require_complete(tmp_path / "narrow")
    assert done.extra["origin"]["cut"] and not done.extra["origin"]["random"] and "are cut out of its" in err
    whole = require_complete(start).accounting
    part, cost = (100 * done.accounting[kind]["total"] / whole[kind]["total"] for kind in ("parameters", "macs"))
    assert f"{part:.1f} % of the teacher's parameters, {cost:.1f} % of its multiply-adds for one request at 32 px" in err
    assert done.extra["layers"]["vision"] == [0, 1], "where widths are given, layers stay"
    code, _, err = evlm("prune", "--model", tmp_path / "narrow", "--task", "none", "--set", "method=magnitude", "--out", tmp_path / "cut")
    assert code == 0, err
    code, _, err = evlm("shrink", "--model", start, "--preset", "dlip-small", "--out", tmp_path / "none")
    assert code == 3 and "the preset dlip-small does not fit" in err and not (tmp_path / "none").exists()
