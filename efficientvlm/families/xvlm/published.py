"""Published X-VLM and EfficientVLM files: what their entries are, and the network in them."""

from __future__ import annotations

from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.published import FIX, TIED, Published
from efficientvlm.families.xvlm.config import XVLMConfig, checked_settings
from efficientvlm.families.xvlm.names import first_fusion_layer, published_name, swin_depths
from efficientvlm.families.xvlm.pairs import first_copy, second_copies
from efficientvlm.families.xvlm.resize import tables_at
from efficientvlm.families.xvlm.shapes import config_of

MOST_STAGES = 8
MADE_ANEW = ("position_ids", ".relative_position_index", ".attn_mask")
DECODER = "cls.predictions.decoder."
FREE = (
    *("vision_heads", "text_heads", "local_attention_depth", "image_size", "image_mean", "image_std", "vision_eps", "text_eps", "dropout"),
    *("answers", "rank_top", "vision_drop_path"),
)


def translate(file: Published) -> tuple[XVLMConfig, dict[str, Tensor]]:
    """Configuration and state of the X-VLM, with a CLIP ViT or a Swin, in a published file.

    What shapes do not say is `local_attention_depth` (a third of the vision layers by default) too. Of a Swin, the heads follow, and the
    image size from its windows, of which the last stage has one. Another `image_size` resizes the position embedding, or a Swin's bias
    tables.

    Raises:
        BadInput: as :func:`families.published.read_published`.
    """
    given = checked_settings(file.settings, FREE, "follows from the file")
    depths = swin_depths(file.tensors)
    state = _state(file, depths)
    native, config, assumed = config_of(file.path, state, depths, given, file.layout.images)
    file.report.assumed |= assumed
    file.require_complete(state, native)
    if config.image_size != native.image_size:
        state |= tables_at(state, config)
    return config, state


def _state(file: Published, depths: list[int]) -> dict[str, Tensor]:
    """The state under our names."""
    path, layout = file.path, file.layout
    first_fusion = first_fusion_layer(file.tensors, layout.stack)
    if first_fusion is None:
        raise BadInput(f"{path} is no X-VLM file", "none of its text layers has cross-attention", FIX)
    if len(depths) == 1 or len(depths) > MOST_STAGES or 0 in depths:
        raise BadInput(f"{path} cannot be imported", f"its Swin has stages of {depths} layers", FIX)
    called = file.translated(lambda name: _reason(file, name), lambda name: published_name(name, first_fusion, depths, layout.stack))
    for copy in second_copies(called) if layout.images > 1 else ():
        file.require_equal(called[copy], called.get(first_copy(copy), ""), "a model whose pairs of layers share them")
        file.report.ignore("second copy of keys or values that two layers have in common, found equal", called[copy])
        del called[copy]
    return {ours: file.value(name) for ours, name in called.items()}


def _reason(file: Published, name: str) -> str | None:
    """Why an entry is left out; None if it is not."""
    if name.endswith("position_ids"):
        file.require_counting(name)
    if name.endswith(MADE_ANEW):
        return "numbers of positions and windows, made anew"
    if name.startswith("l0_module."):
        return "gates of the published pruning; the weights are dense and stay so"
    if ".pooler." in name:
        return "BERT's pooler, unused in X-VLM"
    tower, tied, kind = name.partition(DECODER)
    if not tied:
        return None
    twins = [f"{tower}bert.embeddings.word_embeddings.weight", f"{tower}embeddings.word_embeddings.weight"]
    twin = f"{tower}cls.predictions.bias" if kind == "bias" else next((twin for twin in twins if twin in file.tensors), twins[0])
    file.require_equal(name, twin, "a model that ties them")
    return TIED
