"""BLIP on two images: the network of one image it is made of, what both images give in its layers, paths from each image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compression_cases import build, tiny_blip

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.layers import resolve_layers, shrink_model
from efficientvlm.compression.reach import of_config
from efficientvlm.compression.sparsity import Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import BlipComparisonConfig, check_sizes
from efficientvlm.objectives.terms import tower_maps

CROSS = "text_encoder.encoder.layer.{}.crossattention"


def without(model: Any, *gone: tuple[str, int]) -> Any:
    """`model` without the units (group, index) of `gone`."""
    return slice_model(model, torch.tensor([(unit.group, unit.index) not in gone for unit in model.units()]))


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.run(batch)["logits"]
    return found


def test_a_network_of_one_image_becomes_one_of_two() -> None:
    """Of two images that are one, what is averaged is what one gave; what was removed is missing for both."""
    one = without(build("blip-retrieval")[0], ("text.0.cross_head", 2), ("text.1.cross_head", 0), ("text.0.neuron", 3))
    two, new = one.gain("compare")
    merge = [f"{CROSS.format(1)}.merge.{part}" for part in ("bias", "weight")]
    assert new == sorted([f"cls_head.{layer}.{part}" for layer in (0, 2) for part in ("bias", "weight")] + merge)
    kept = two.config.kept_indices()
    assert kept["text.0.second_cross_head"] == kept["text.0.cross_head"] == [0, 1] and len(kept["text.0.neuron"]) == 6
    with torch.no_grad():
        for part in two.get_submodule(merge[1].removesuffix(".weight")).parameters():
            part.zero_()
        two.get_submodule(f"{CROSS.format(1)}.merge").weight.copy_(torch.eye(24).repeat(1, 2) / 2)
        batch = two.example(2, 5)
        batch["pixels"] = batch["second_pixels"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        states = two.run(batch)["states"]
        same = one.read(batch["text_ids"], batch["text_mask"], one.text_encoder.context(one.encode_image(batch["pixels"]).states)).states
    torch.testing.assert_close(states, same)
    assert two.gain("compare") == (two, [])
    with pytest.raises(BadInput, match="cannot match images with texts"):
        two.gain("match")
    assert build("blip-caption")[0].gain("compare")[0].config.layers() == {"vision": 2, "text": 2, "decoder": 0}


def test_heads_of_both_images_are_apart() -> None:
    model, batch = build("blip-two-images")
    heads = [("text.1.cross_head", index) for index in range(3)]
    blind = without(model, *heads)
    assert not hasattr(blind.get_submodule(f"{CROSS.format(1)}.first"), "q")
    record = blind.run(batch, {"text.cross_attention"})
    assert [maps.shape[1] for maps in record["text.cross_attention"]] == [6, 3]
    left = without(model, *heads, *(("text.0.cross_head", index) for index in range(3)))
    other = {**batch, "pixels": torch.randn_like(batch["pixels"])}
    torch.testing.assert_close(logits(left, batch), logits(left, other))
    assert not torch.allclose(logits(blind, batch), logits(blind, other))
    reach = of_config(left.config)["reaches"]
    assert reach["left image"] == [] and reach["right image"] == reach["text"] == ["verdict"]
    maps = tower_maps(blind.config, model.config)["text"].heads["cross_head"]
    assert maps == [([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]), ([0, 1, 2], [3, 4, 5])]


def test_pruning_leaves_a_path_from_each_image() -> None:
    model, _ = build("blip-two-images")
    scope = Scope.of(Anatomy.of(model), 0.5, kinds=["cross_head"])
    assert {unit.kind for unit in scope.units} == {"cross_head", "second_cross_head"}
    assert {group.rpartition(".")[2] for group in scope.paths(scope.cheapness)} == {"cross_head", "second_cross_head"}


def test_layers_that_merge_go_on_merging() -> None:
    """By default those of the upper half that see images; an explicit list follows its layers."""
    config = tiny_blip(BlipComparisonConfig)
    config.text_config.num_hidden_layers = 6
    assert config.merging == [3, 4, 5]
    config.cross_layers = {"text": [1, 3, 5]}
    assert config.merging == [3, 5]
    config.cross_layers = None
    torch.manual_seed(0)
    from efficientvlm.families.blip.models import BlipForComparison

    model = BlipForComparison(config).eval()
    few = shrink_model(model, resolve_layers(config, {"text": [0, 2, 3], "vision": 2}))
    assert few.config.merging_layers == few.config.merging == [2]
    few.run(few.example(1, 4))
    torch.testing.assert_close(few.get_submodule(f"{CROSS.format(2)}.merge").weight, model.get_submodule(f"{CROSS.format(3)}.merge").weight)
    averaged = shrink_model(model, resolve_layers(config, {"text": [0, 1], "vision": 2}))
    assert averaged.config.merging_layers == [] and not any(".merge." in name for name in averaged.state_dict())


@pytest.mark.parametrize("wrong", [[2], [1, 0], "1", [True], [-1], {"1": 1}])
def test_layers_that_cannot_merge_are_refused(wrong: Any) -> None:
    with pytest.raises(BadInput, match="merging_layers"):
        check_sizes(tiny_blip(BlipComparisonConfig, merging_layers=wrong), "config.json")
