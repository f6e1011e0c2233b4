"""Students of given shares of parameters and multiply-adds: the published counts, the search, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compression_cases
import pytest
import torch
from conftest import run_stage
from test_widths import BASE

from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import BlipAnswerConfig, BlipCaptionConfig, BlipPretrainingConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.planning import shapes
from efficientvlm.settings.stages import Shrink
from efficientvlm.stages.shrink import wanted


def shape_of(config: Any) -> Any:
    with torch.device("meta"):
        return MODELS[type(config)](config).eval()


def narrow() -> Any:
    """A tiny captioner whose images and texts have two heads."""
    config = compression_cases.tiny_blip(BlipCaptionConfig)
    config.vision_config.num_attention_heads = config.text_config.num_attention_heads = 2
    return shape_of(config)


def preset(config: Any, name: Any) -> Any:
    layers, sizes, fusion, _ = wanted(Shrink(model="-", out="-", preset=name), config)
    return shape_of(config.with_layers(layers).with_sizes(sizes, fusion))


def test_shares_of_the_known_students_are_those_that_are_published_for_their_shapes() -> None:
    """Multiply-adds of matrix products and of the patches, batch 1, 30 tokens, 384 px; parameters of encoders beside 213 M at 224 px."""
    config = BlipPretrainingConfig(**BASE)
    config.text_config.max_position_embeddings = 512
    small, base = preset(config, "dlip-small"), preset(config, "dlip-base")
    rules = [shapes.rule_for(small, of=of) for of in (213e6, shapes.ENCODERS, shapes.NETWORK)]
    teacher = shape_of(config)
    counted = [shapes.count_parameters(model)["total"] for model in (teacher, small)]
    assert counted == [252441919, 51713599]
    found = [shapes.parameters_of(small, rule) / rule.all_parameters(shapes.parameters_of(teacher, rule)) for rule in rules]
    assert [round(100 * share, 3) for share in found] == [22.434, 21.422, 20.485]
    assert shapes.parameters_of(base, rules[0]) == 108856512, "51.1 % of 213 M"

    teacher, small = teacher.resized(384), small.resized(384)
    rule = shapes.rule_for(teacher)
    assert rule.pass_name == "reranked" and rule.text_length == 30
    assert shapes.macs_of(teacher, rule) == 55483582464 + 2564628480 + 11476242432
    assert shapes.macs_of(small, rule) == 17289105408, "24.87 %"
    assert shapes.macs_of(small, shapes.rule_for(small, "all")) == 19121651712
    assert shapes.macs_of(small, shapes.rule_for(small, "fused")) == 16966453248


def test_the_nearest_shapes_are_counted_and_meet_both_shares() -> None:
    teacher = narrow()
    rule = shapes.rule_for(teacher)
    within, found, whole = shapes.search(teacher, rule, 0.5, 0.5, 0.1, top=3)
    assert rule.pass_name == "caption" and within >= len(found) == 3
    away = [max(abs(one.parameters - 0.5), abs(one.macs - 0.5)) for one in found]
    assert away == sorted(away) and away[-1] <= 0.1
    assert whole == shapes.count(teacher, rule)
    for one in found[:1]:
        layers, sizes, fusion, _ = wanted(Shrink(model="-", out="-", **one.settings), teacher.config)
        student = shape_of(teacher.config.with_layers(layers).with_sizes(sizes, fusion))
        assert shapes.shares(teacher, student, rule) == (one.counts, one.parameters, one.macs)


def test_a_network_that_does_not_grow_as_expected_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = narrow()
    monkeypatch.setattr(shapes, "macs_of", lambda model, rule: 10 ** sum(model.config.layers().values()))
    with pytest.raises(BadInput, match="do not grow as its widths"):
        shapes.search(teacher, shapes.rule_for(teacher), 0.5, 0.5, top=1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"pass_name": "dual"}, "no pass dual in this network: it is a evlm_blip_vqa, which makes answer"),
        ({"text_length": 10**6}, "positions for tokens"),
    ],
)
def test_rules_that_a_network_has_not_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        shapes.rule_for(shape_of(compression_cases.tiny_blip(BlipAnswerConfig)), **asked)


def test_a_pruned_network_and_one_that_keeps_its_width_have_no_shapes() -> None:
    pruned = compression_cases.tiny_blip(BlipAnswerConfig).with_kept({"vision.0.neuron": [0]})
    with pytest.raises(BadInput, match="was pruned"):
        shapes.Space.of(pruned, False)
    with pytest.raises(BadInput, match="keeps its width"):
        shapes.Space.of(compression_cases.CONFIGS["cross_encoder"], False)


def test_the_command_lists_students_with_the_rule(tmp_path: Path, evlm: Any) -> None:
    start = tmp_path / "blip"
    sizes = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "text_width": 16, "text_layers": 2, "text_heads": 2}
    more = {"image_size": 32, "patch_size": 16, "network": "caption"}
    run_stage("init", out=str(start), family="blip", size="tiny", data="shapes:size=8", settings={**sizes, **more})
    asked = ("plan", "--model", start, "--parameters", 0.6, "--macs", 0.5)
    code, out, err = evlm(*asked, "--tolerance", 0.3, "--top", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["shapes"]) == 2 <= found["within"] and "32 px and 30 tokens" in found["rule"]["macs"]
    assert found["shapes"][0]["settings"]["layers"].keys() == {"vision", "decoder"}
    code, out, err = evlm(*asked, "--tolerance", 0, "--equal-widths")
    assert code == 4 and "no student within 0" in err and "100 % of macs: pass caption" in out
    assert evlm("plan")[0] == 2 and evlm(*asked, "--out", "x")[0] == 2 and evlm(*asked, "--of", "half")[0] == 2
    assert evlm("plan", "quickstart", "--macs", 0.5)[0] == 2
