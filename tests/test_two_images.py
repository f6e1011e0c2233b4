"""X-VLM on two images: keys and values that two layers share, the network of one image it is made of, layers in pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compression_cases import tiny_pairs, tiny_xvlm

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.layers import resolve_layers, shrink_model
from efficientvlm.compression.surgery import slice_model
from efficientvlm.errors import BadInput
from efficientvlm.families.xvlm.config import XVLMConfig, check_sizes
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.terms import tower_maps

CROSS = "fusion.layers.{}.cross_attention"


def made(config: XVLMConfig) -> Any:
    torch.manual_seed(0)
    model = XVLMModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def pretrained(**changes: Any) -> Any:
    return made(tiny_xvlm(**{"decoder_layers": 0, "heads": ["itc", "itm", "mlm", "box"], "embed_dim": 6} | changes))


def without(model: Any, *gone: tuple[str, int]) -> Any:
    """`model` without the units (group, index) of `gone`."""
    return slice_model(model, torch.tensor([(unit.group, unit.index) not in gone for unit in model.units()]))


def test_keys_and_values_lie_in_the_first_of_two_layers_and_go_when_both_have_lost_the_head() -> None:
    model = made(tiny_pairs())
    borrowed = tuple(f"{CROSS.format(layer)}.{part}" for layer in (1, 3) for part in "kv")
    assert not any(name.startswith(borrowed) for name in model.state_dict())
    one = without(model, ("fusion.0.cross_head", 1))
    both = without(model, ("fusion.0.cross_head", 1), ("fusion.1.cross_head", 1))
    assert [part.get_submodule(CROSS.format(0)).k.out_features // 8 for part in (model, one, both)] == [3, 3, 2]
    crossed = without(model, ("fusion.0.cross_head", 0), ("fusion.1.cross_head", 1), ("fusion.1.cross_head", 2))
    attention = crossed.get_submodule(CROSS.format(0)), crossed.get_submodule(CROSS.format(1))
    assert [part.shared.reads for part in attention] == [(1, 2), (0,)] and attention[0].shared.stored == 3
    emptied = without(model, *(("fusion.0.cross_head", index) for index in range(3)))
    assert emptied.get_submodule(CROSS.format(0)).k.out_features == 24 and not hasattr(emptied.get_submodule(CROSS.format(0)), "q")
    total = Anatomy.of(model).total
    saved = [total - Anatomy.of(part).total for part in (one, both)]
    head = 8 * 24 + 8 + 24 * 8  # rows of queries with their bias, columns of the output
    assert saved == [head, 2 * head + 2 * (8 * 16 + 8)]


def test_a_network_of_one_image_becomes_one_of_two() -> None:
    model = without(pretrained(), ("fusion.1.cross_head", 2), ("fusion.0.neuron", 3))
    two, new = model.gain("compare")
    assert {name.partition(".")[0] for name in new} == {"compare_head"} and two.config.abilities() == {"compare"}
    kept = {"fusion.0.neuron": "0-2,4-6", "fusion.2.cross_head": "0-1"}
    assert two.config.kept == kept | {"fusion.1.neuron": "0-2,4-6", "fusion.3.cross_head": "0-1"}
    old, state = model.state_dict(), two.state_dict()
    left = {"itm_head", "box_head", "mlm_head", "vision_proj", "text_proj", "temp"}
    assert {name.partition(".")[0] for name in old} - {name.partition(".")[0] for name in state} == left
    for layer in range(4):
        for tail in ("attention.q.weight", "cross_attention.q.weight", "cross_attention.out.bias", "ffn.fc2.weight", "ffn_norm.bias"):
            assert torch.equal(state[f"fusion.layers.{layer}.{tail}"], old[f"fusion.layers.{layer // 2}.{tail}"])
    again, nothing = two.gain("compare")
    assert again is two and not nothing

    assigns, new = model.gain("assign")
    assert set(new) == {"assign_head.weight", "assign_head.bias"} and torch.equal(assigns.vision_proj.weight, model.vision_proj.weight)
    compares, new = assigns.gain("compare")
    assert {name.partition(".")[0] for name in new} == {"compare_head"} and compares.config.fusion_layers == 4
    towers = {name: value for name, value in assigns.state_dict().items() if name.startswith(("fusion.", "text.", "vision."))}
    assert all(torch.equal(compares.state_dict()[name], value) for name, value in towers.items())
    for network, ability in ((two, "answer"), (two, "match"), (pretrained(fusion_layers=0), "compare")):
        with pytest.raises(BadInput):
            network.gain(ability)


def test_a_student_keeps_the_pairs_of_its_teacher_and_learns_from_the_same_image() -> None:
    teacher = made(tiny_pairs(fusion_layers=8))
    layers = resolve_layers(teacher.config, {})
    assert layers["fusion"] == [2, 3, 6, 7]
    student = shrink_model(teacher, layers)
    state, old = student.state_dict(), teacher.state_dict()
    assert torch.equal(state[f"{CROSS.format(2)}.k.weight"], old[f"{CROSS.format(6)}.k.weight"])
    fresh = tower_maps(tiny_pairs(fusion_layers=4), teacher.config)["fusion"]
    assert tower_maps(student.config, teacher.config)["fusion"] == fresh
    assert fresh.attention == [(0, 2), (1, 3), (2, 6), (3, 7)] and fresh.hidden == [(0, 0), (1, 3), (2, 4), (3, 7), (4, 8)]
    shrunk = shrink_model(pretrained(fusion_layers=4), {"vision": [0, 1], "text": [0, 1], "fusion": [1, 3], "decoder": []})
    assert shrunk.gain("compare")[0].config.layer_source["fusion"] == [2, 3, 6, 7]
    for wanted in (3, [0, 2], [1, 2], [0]):
        with pytest.raises(BadInput, match="fusion"):
            resolve_layers(teacher.config, {"fusion": wanted})
    assert resolve_layers(teacher.config, {"fusion": 8})["fusion"] == list(range(8))


WRONG: list[dict[str, Any]] = [
    *({"fusion_layers": count} for count in (0, 3)),
    *({"heads": heads} for heads in ([], ["itm"], ["compare", "assign"])),
    *({name: 1} for name in ("decoder_layers", "fusion_images")),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_networks_that_are_half_for_two_images_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        check_sizes(tiny_pairs(**wrong))


def test_each_image_is_read_by_its_own_layers() -> None:
    model = made(tiny_pairs())
    batch = model.example(3, 5)
    batch["pixels"], batch["second_pixels"] = torch.randn(2, 3, 3, 16, 16)
    rows = torch.tensor([2, 0, 2, 1])
    asked = {**batch, "text_ids": torch.randint(4, 20, (4, 5)), "text_mask": torch.ones(4, 5, dtype=torch.long), "pair_index": rows}
    with torch.no_grad():
        together = model.run(asked)["logits"]
        alone = []
        for at, row in enumerate(rows.tolist()):
            one = {name: asked[name][row : row + 1] for name in ("pixels", "second_pixels")}
            one |= {name: asked[name][at : at + 1] for name in ("text_ids", "text_mask")}
            alone.append(model.run({**one, "pair_index": torch.zeros(1, dtype=torch.long)})["logits"])
        swapped = model.run({**asked, "pixels": asked["second_pixels"], "second_pixels": asked["pixels"]})["logits"]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, swapped, atol=1e-3)
