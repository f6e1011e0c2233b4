"""The Swin tower: windows, shifts, merging, and which of its layers a shallower one takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compression_cases import tiny_swin
from conftest import SHAPES, SIZES, run_stage
from torch.nn import functional as F

from efficientvlm.compression.layers import resolve_layers, shrink_model
from efficientvlm.errors import BadInput
from efficientvlm.families.footprint import Footprint
from efficientvlm.families.onnx.description import StoredSizes
from efficientvlm.families.structure import Sizes
from efficientvlm.families.towers.swin import ELSEWHERE, Merge, WindowAttention, depths_of, grids, keep_pairs, resize_bias_table
from efficientvlm.families.xvlm.config import XVLMConfig, check_sizes
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.loaded import load
from efficientvlm.objectives.efficientvlm import needs
from efficientvlm.objectives.generation import Generation
from efficientvlm.settings.common import Train
from efficientvlm.settings.methods import DistillWeights, PretrainingDistillation


@pytest.mark.parametrize("grid, window, shift", [(8, 4, 0), (8, 4, 2), (9, 3, 1), (4, 4, 0)])
def test_windows_against_attention_over_the_whole_image(grid: int, window: int, shift: int) -> None:
    """A window is a mask on attention between all tokens; a shifted one wraps around, and its parts from elsewhere are all but shut out."""
    torch.manual_seed(0)
    heads, width = 2, 6
    layer = WindowAttention(width, heads, 3, {}, grid=grid, window=window, shift=shift)
    torch.nn.init.normal_(layer.bias_table)
    x = torch.randn(2, grid * grid, width)
    rows, columns = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
    moved_rows, moved_columns = (rows - shift) % grid, (columns - shift) % grid
    same = (moved_rows[:, None] // window == moved_rows // window) & (moved_columns[:, None] // window == moved_columns // window)
    near = ((rows[:, None] - rows).abs() < window) & ((columns[:, None] - columns).abs() < window)
    offset = (moved_rows[:, None] - moved_rows + window - 1) * (2 * window - 1) + moved_columns[:, None] - moved_columns + window - 1
    bias = layer.bias_table[offset.clamp(0, len(layer.bias_table) - 1)].permute(2, 0, 1)
    bias = (bias + torch.where(near, 0, ELSEWHERE)).masked_fill(~same, -torch.inf)
    q, k, v = layer.qkv(x).unflatten(-1, (3, heads, 3)).permute(2, 0, 3, 1, 4)
    wanted = layer.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
    maps: list[torch.Tensor] = []
    torch.testing.assert_close(layer.itself(x), wanted)
    torch.testing.assert_close(layer.itself(x, maps=maps), wanted)
    assert maps[0].shape == (2 * (grid // window) ** 2, heads, window**2, window**2)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_graph_of_windows_takes_any_number_of_images(shift: int) -> None:
    class Itself(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = WindowAttention(6, 2, 3, {}, grid=8, window=4, shift=shift)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer.itself(x)

    program = torch.export.export(Itself().eval(), (torch.randn(2, 64, 6),), dynamic_shapes=({0: torch.export.Dim("images")},))
    whole, x = program.module(), torch.randn(3, 64, 6)
    torch.testing.assert_close(whole(x)[:1], program.module()(x[[0, 0]])[:1])


def test_merging_takes_the_corners_column_by_column() -> None:
    merge = Merge(1, 1e-5, {})
    merge.norm, merge.reduction = torch.nn.Identity(), torch.nn.Identity()
    x = torch.arange(16.0).view(1, 16, 1)
    assert merge(x, 4).tolist() == [[[0, 4, 1, 5], [2, 6, 3, 7], [8, 12, 9, 13], [10, 14, 11, 15]]]


def test_every_second_layer_is_shifted_where_there_is_more_than_one_window() -> None:
    assert grids([2, 3], 8, 4) == [(8, 4, 0), (8, 4, 2), (4, 4, 0), (4, 4, 0), (4, 4, 0)]
    assert [shift for _, _, shift in grids([2, 2, 18, 2], 56, 7)] == [0, 3] * 11 + [0, 0]


@pytest.mark.parametrize("old, new", [(13, 23), (13, 29), (23, 13)])
def test_a_bias_table_is_resized_by_cubic_splines(old: int, new: int) -> None:
    """Splines with not-a-knot ends keep a cubic polynomial as it is, where it lies on their own knots."""
    from efficientvlm.families.towers.swin import _ratio

    steps = torch.tensor([_ratio(old // 2, new // 2) ** power for power in range(old // 2)], dtype=torch.float64).cumsum(0)
    knots = torch.cat([-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])
    places = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64).clamp(knots[0], knots[-1])

    def cubic(x: torch.Tensor) -> torch.Tensor:
        return (0.02 * x**3 - 0.1 * x**2 + x - 3) / 10

    table = (cubic(knots)[:, None] * cubic(knots)).flatten()[:, None].float()
    wanted = (cubic(places)[:, None] * cubic(places)).flatten()[:, None].float()
    torch.testing.assert_close(resize_bias_table(table, new), wanted, rtol=1e-4, atol=1e-4)
    assert resize_bias_table(table, old) is table


def test_pairs_are_taken_stage_by_stage() -> None:
    assert keep_pairs([2, 2, 18, 2], 12) == [0, 1, 2, 3, 8, 9, 14, 15, 20, 21, 22, 23]
    assert keep_pairs([2, 2, 18, 2], 24) == list(range(24))
    assert depths_of([2, 2, 18, 2], keep_pairs([2, 2, 18, 2], 12)) == [2, 2, 6, 2]
    for count in (3, 6, 26):
        with pytest.raises(ValueError):
            keep_pairs([2, 2, 18, 2], count)


@pytest.mark.parametrize(
    "wanted, message",
    [(5, "pairs of layers"), (2, "pairs of layers"), ([2, 3], "keep none"), ([1, 2, 4, 5], "take turns"), ([0, 1, 4, 5], "compared")],
)
def test_layers_that_a_swin_cannot_be_made_of(wanted: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve_layers(tiny_swin(), {"vision": wanted})  # type: ignore[dict-item]


def test_a_shallower_swin_keeps_its_windows_where_they_were() -> None:
    torch.manual_seed(0)
    model = XVLMModel(tiny_swin(decoder_layers=0, heads=["itc"])).eval()
    student = shrink_model(model, resolve_layers(model.config, {}))
    assert student.config.vision_depths == [2, 2] and student.config.layer_source["vision"] == [2, 3, 4, 5]
    assert [(layer.attention.grid, layer.attention.shift) for layer in student.vision.layers] == [(8, 0), (8, 2), (4, 0), (4, 0)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 36}, "windows of 4 must fill"),
        ({"vision_layers": 5}, "the stages have"),
        ({"vision_layers": 5, "vision_depths": [3, 2]}, "make a pair"),
        ({"vision_heads": 1}, "halves from stage to stage"),
        ({"vision_intermediate": 7}, "halves"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_sizes(tiny_swin(**changes))


def test_layers_are_left_out_at_times_while_a_swin_is_trained() -> None:
    torch.manual_seed(0)
    model = XVLMModel(tiny_swin(decoder_layers=0, heads=["itc"], vision_drop_path=0.5))
    pixels = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    assert [layer.drop for layer in model.vision.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert not torch.equal(model.train().encode_image(pixels).states, model.encode_image(pixels).states)
    assert torch.equal(model.eval().encode_image(pixels).states, model.encode_image(pixels).states)


def test_a_teacher_has_the_windows_and_stages_of_its_student(tmp_path: Path) -> None:
    sizes = {**SIZES, "image_size": 64, "patch_size": 4, "vision_depths": [2, 4], "vision_window": 4}
    for name, changes in (("student", {}), ("windows", {"vision_window": 8}), ("stages", {"vision_depths": [4, 2]})):
        run_stage("init", out=str(tmp_path / name), size="tiny", data=SHAPES, settings={**sizes, **changes})
    student, windows, stages = (load(str(tmp_path / name), weights=False) for name in ("student", "windows", "stages"))
    usual = PretrainingDistillation(model="m", data="d", out="o", task="pretraining")
    assert not list(needs(student, student, usual))
    assert [problem.why for problem in needs(student, windows, usual)] == ["vision window 8 and 4"]
    assert ["stages of other width" in problem.why for problem in needs(student, stages, usual)] == [True]
    off = usual.model_copy(update={"weights": DistillWeights(vision_hidden=0, vision_self_attention=0)})
    assert not [*needs(student, windows, off), *needs(student, stages, off)]


def test_a_bias_table_is_a_bias_for_the_optimizer() -> None:
    """As the published optimizer has it, whose rule goes by names: a table of biases does not decay."""
    torch.manual_seed(0)
    model = XVLMModel(tiny_swin())
    options = Train(weight_decay=0.1)
    (optimizer,) = Generation(model).optimizers(options, ())
    decays = {id(parameter) for group in optimizer.torch.param_groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decays) == (parameter.ndim > 1 and not name.endswith("bias_table")), name


def test_memory_is_that_of_the_first_stage_with_its_many_tokens() -> None:
    swin = XVLMConfig(image_size=224, patch_size=4, vision_width=1024, vision_heads=32, vision_layers=24, vision_depths=[2, 2, 18, 2])
    assert Footprint.of(swin).encoding == 4 * (56 * 56 * 128 * 20 + 9 * 224 * 224) + 4 * 20 * 8 * 8 * 128
    assert swin.sizes().window == 7


def test_what_is_stored_of_sizes_is_all_of_them() -> None:
    assert set(StoredSizes.model_fields) == set(Sizes._fields)
    for config in (tiny_swin(), XVLMConfig()):
        stored = StoredSizes.model_validate_json(json.dumps(config.sizes()._asdict()))
        assert stored.window == config.sizes().window
