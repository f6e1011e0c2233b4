"""X-VLM itself: anatomy, passes, decoding, folders, layer choice. Numbers of the published code are in test_parity_xvlm.py."""

from __future__ import annotations

import math
from typing import Any

import fresh
import pytest
import torch
from safetensors.torch import save_file
from spoiling import edit, spoil_weights

from efficientvlm import families
from efficientvlm.errors import BadInput
from efficientvlm.families.structure import format_ranges, parse_ranges
from efficientvlm.families.towers.attention import Cache
from efficientvlm.families.towers.parts import normalise
from efficientvlm.families.xvlm.config import TOWERS, XVLMConfig
from efficientvlm.families.xvlm.family import XVLM
from efficientvlm.families.xvlm.heads import with_decoder
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.losses import answer_loss, sequence_nll
from efficientvlm.tasks.ranking import accuracy, evaluate, generate, rank

FAMILY = XVLM()
CLOSE = dict(rtol=1e-5, atol=1e-5)
SIZES: dict[str, Any] = dict(
    image_size=16,
    patch_size=8,
    vision_width=16,
    vision_layers=3,
    vision_heads=4,
    vision_intermediate=6,
    text_width=24,
    text_layers=2,
    fusion_layers=2,
    text_heads=3,
    text_intermediate=7,
    vocab_size=30,
    max_positions=12,
    embed_dim=8,
    local_attention_depth=2,
    dropout=0.0,
    initializer_range=0.3,
)


def build(**changes: Any) -> Any:
    """Random weights, biases and norms included."""
    torch.manual_seed(0)
    model = XVLMModel(XVLMConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def questions(model: Any) -> dict[str, Any]:
    """Five questions of unequal length about two images."""
    torch.manual_seed(1)
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 6, 2])[:, None]).long()
    return {
        "pixels": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8),
        "image_index": torch.tensor([0, 0, 1, 1, 1]),
        "question_ids": torch.randint(5, 30, (5, 6)) * mask,
        "question_mask": mask,
    }


KEPT = {
    "vision.0.head": "0,2",
    "vision.1.head": "",
    "fusion.1.cross_head": "1",
    "text.0.neuron": "",
    "fusion.0.head": "",
    "decoder.0.neuron": "2-4",
}


@pytest.mark.parametrize("kept", [None, KEPT])
def test_every_unit_has_its_sites_and_gate(kept):
    model = build(decoder_layers=1, kept=kept)
    tensors, modules = model.state_dict(), dict(model.named_modules())
    units = model.units()
    assert len({(unit.group, unit.index) for unit in units}) == len(units)
    assert {group: len(indices) for group, indices in model.config.kept_indices().items() if indices} == {
        group: sum(unit.group == group for unit in units) for group in dict.fromkeys(unit.group for unit in units)
    }
    taken: dict[tuple[str, int], set[int]] = {}
    for unit in units:
        for site in unit.sites:
            assert 0 <= site.start < site.stop <= tensors[site.tensor].shape[site.dim], unit
            span = set(range(site.start, site.stop))
            seen = taken.setdefault((site.tensor, site.dim), set())
            assert not seen & span, unit
            seen |= span
        (gate,) = unit.gates
        assert gate.stop <= modules[gate.module].in_features
        assert any(site.tensor == f"{gate.module}.weight" and site[1:] == (1, *gate[1:]) for site in unit.sites)
    # and together they are the whole of every prunable tensor
    assert all(len(span) == tensors[name].shape[dim] for (name, dim), span in taken.items())
    assert {name for name, _ in taken} == {n for n in tensors if any(p in n for p in (".q.", ".k.", ".v.", ".fc1.", "out.w", "fc2.w"))}


def test_units_are_ordered_by_tower_layer_kind_index():
    units = build(decoder_layers=1).units()
    places = [(TOWERS.index(u.tower), u.layer, ("head", "cross_head", "neuron").index(u.kind), u.index) for u in units]
    assert places == sorted(places)
    assert build().config.original_counts()["fusion.1.cross_head"] == 3


def test_names_and_towers_of_parameters():
    names = build(decoder_layers=1).state_dict()
    assert {XVLMModel.tower_of(name) for name in names} == {"vision", "text", "fusion", "decoder", "heads"}
    assert XVLMModel.tower_of("decoder_head.bias") == "decoder" and XVLMModel.tower_of("mlm_head.bias") == "heads"
    tables = {name for name in names if XVLMModel.is_embedding(name)}
    assert tables == {f"{tower}.embeddings.{kind}.weight" for tower in ("text", "decoder") for kind in ("word", "position", "token_type")}


def test_pixels_are_normalised_once():
    model = build(image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 0.25, 1.0])
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    by_hand = torch.stack([(pixels[:, c] / 255 - m) / s for c, (m, s) in enumerate([(0.5, 0.5), (0.25, 0.25), (0.0, 1.0)])], 1)
    assert torch.equal(normalise(by_hand, [0.5] * 3, [0.5] * 3, torch.float32), by_hand)
    torch.testing.assert_close(model.encode_image(pixels).states, model.encode_image(by_hand).states, **CLOSE)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_region_states(depth):
    """Regions come first, whole images after them, untouched by the masks; a region that shows all is its image."""
    model = build(local_attention_depth=depth)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    visible = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 1]])
    rows = torch.tensor([0, 0, 1])
    with torch.no_grad():
        plain = model.encode_image(pixels, keep=frozenset({"hidden", "self_attention"}))
        out = model.encode_image(pixels, (rows, visible), keep=frozenset({"hidden", "self_attention"}))
        assert out.states.shape == (5, 5, 16)
        torch.testing.assert_close(out.states[3:], plain.states, **CLOSE)
        torch.testing.assert_close(out.states[1], plain.states[0], **CLOSE)
        assert [len(hidden) for hidden in out.hidden] == [5 if i >= 3 - depth else 2 for i in range(4)]
        if depth:
            assert not torch.allclose(out.states[0], plain.states[0], atol=1e-3)
            assert float(out.self_attention[-1][0, :, :, 2:].abs().max()) == 0
        pixels_changed = pixels.clone()
        pixels_changed[:, :, 8:] = 0  # the lower patches, which region 0 does not see
        if depth == 3:
            changed = model.encode_image(pixels_changed, (rows, visible)).states
            torch.testing.assert_close(changed[0, :2], out.states[0, :2], **CLOSE)
            assert not torch.allclose(changed[3], out.states[3], atol=1e-3)


def test_maps_do_not_change_the_result_and_padding_is_not_seen():
    model, batch = build(decoder_layers=1), questions(None)
    batch |= {"answer_ids": torch.randint(5, 30, (6, 3)), "answer_mask": torch.ones(6, 3), "answer_index": torch.tensor([0, 1, 1, 2, 3, 4])}
    with torch.no_grad():
        plain = model.run(batch)
        full = model.run(batch, XVLMModel.taps)
        torch.testing.assert_close(full["logits"], plain["logits"], **CLOSE)
        assert XVLMModel.taps <= set(full)
        for tower, width in (("text", 6), ("fusion", 6), ("decoder", 3)):
            for maps in full[f"{tower}.self_attention"]:
                assert maps.shape[2:] == (width, width)
                torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]), **CLOSE)
        assert float(full["text.self_attention"][0][1, :, :, 3:].max()) == 0
        assert float(full["decoder.self_attention"][0].triu(1).max()) == 0
        assert float(full["decoder.cross_attention"][0][1, :, :, 3:].max()) == 0
        batch["question_ids"] = batch["question_ids"].masked_fill(batch["question_mask"] == 0, 17)
        torch.testing.assert_close(model.run(batch)["logits"], plain["logits"], **CLOSE)


def test_asking_for_a_tap_that_is_not_there():
    with pytest.raises(BadInput, match=r"no such tap: text\.cross_attention"):
        build().run(questions(None), {"text.cross_attention"})
    with pytest.raises(KeyError, match="recorded no 'logits'"):
        build().run(questions(None))["logits"]


def test_a_row_of_the_context_is_as_good_as_a_copy():
    model, batch = build(decoder_layers=1), questions(None)
    index = batch["image_index"]
    with torch.no_grad():
        image = model.encode_image(batch["pixels"]).states
        text = model.encode_text(batch["question_ids"], batch["question_mask"]).states
        by_row = model.fuse(text, batch["question_mask"], model.fusion.context(image, rows=index)).states
        copied = model.fuse(text, batch["question_mask"], model.fusion.context(image[index])).states
        torch.testing.assert_close(by_row, copied, **CLOSE)
        repeated = {**batch, "pixels": batch["pixels"][index], "image_index": torch.arange(5)}
        torch.testing.assert_close(model.encode(repeated)[0]["states"], by_row, **CLOSE)


@pytest.mark.parametrize("kept", [None, {"decoder.0.head": "", "decoder.1.cross_head": "0"}])
def test_decoding_with_a_cache_is_decoding_without(kept):
    model, batch = build(decoder_layers=2, kept=kept), questions(None)
    ids = torch.randint(5, 30, (5, 6))
    with torch.no_grad():
        _, context = model.encode(batch)
        whole = model.decode(context, ids, None)
        cache = model.new_cache()
        steps = [model.decode(context, part, None, None, cache) for part in ids.split([1, 2, 1, 2], 1)]
    assert cache.length == 6
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


def brute_force(
    model: Any, batch: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor, top: int, twice: bool, smoothing: float
) -> list[list[int]]:
    """Every candidate after every question, one by one."""
    _, context = model.encode(batch)
    ranked = []
    for row in range(len(batch["question_ids"])):
        first, score = [], []
        for answer, seen in zip(ids, mask, strict=True):
            length = int(seen.sum())
            logits = model.follow(answer[None, :length], None, type(context)(context.kv, context.mask[row][None], torch.tensor([row])))[0]
            likelihood = logits[0].log_softmax(-1)
            steps = [float(likelihood[at, answer[at + 1]]) for at in range(length - 1)]
            smooth = [float(likelihood[at].mean()) - step for at, step in enumerate(steps)]
            first.append(steps[0])
            score.append(sum(steps) + (steps[0] if twice else 0) + smoothing * sum(smooth))
        chosen = sorted(range(len(ids)), key=lambda c: -first[c])[:top]
        ranked.append(sorted(chosen, key=lambda c: -score[c]))
    return ranked


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("top", [2, 4, 99])
@pytest.mark.parametrize("smoothing", [0.0, 0.6])
def test_ranking_against_brute_force(twice, top, smoothing):
    model, batch = build(decoder_layers=2), questions(None)
    ids = torch.tensor([[2, 7, 3, 0], [2, 8, 9, 3], [2, 9, 3, 0], [2, 10, 11, 3], [2, 12, 3, 0], [2, 13, 14, 3]])
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = brute_force(model, batch, ids, mask, top, twice, smoothing)
    chosen, probabilities = rank(model, batch, (ids, mask), top=top, first_token_twice=twice, smoothing=smoothing)
    assert chosen.tolist() == expected
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5), **CLOSE)
    assert bool((probabilities.diff(dim=1) <= 0).all())


def test_the_first_token_decides_only_when_counted_twice():
    """Two answers: one has the likelier first token, the other the likelier whole."""

    class Fixed:
        config = XVLMConfig(**SIZES)

        def encode(self, batch):
            return None, None

        def new_cache(self):
            return self

        def select(self, rows):
            return self

        def decode(self, context, ids, mask, rows=None, cache=None):
            table = torch.full((5, 5), 1e-6)
            table[0, 1], table[0, 2] = 0.6, 0.4  # after the start: 1 rather than 2
            table[1, 3], table[2, 3] = 0.3, 0.5  # the end: likelier after 2
            return table.log()[ids] - table.sum(-1).log()[ids][..., None]

    ids = torch.tensor([[0, 1, 3], [0, 2, 3]])
    batch = {"question_ids": torch.zeros(1, 1), "question_mask": torch.ones(1, 1), "pixels": torch.zeros(1, 3, 16, 16)}
    for twice, best in ((False, 1), (True, 0)):
        likelihood = [0.6 * 0.3 / 0.300004, 0.4 * 0.5 / 0.500004]
        chosen, probabilities = rank(Fixed(), batch, (ids, torch.ones_like(ids)), top=2, first_token_twice=twice)
        score = [value * (first if twice else 1) for value, first in zip(likelihood, (0.6, 0.4), strict=True)]
        assert sorted(probabilities[0].tolist()) == pytest.approx(sorted(value / sum(score) for value in score), rel=1e-3)
        assert chosen[0, 0].item() == max((0, 1), key=lambda c: score[c]), best


def test_generation_is_greedy_and_stops_at_the_separator():
    model, batch = build(decoder_layers=2), questions(None)
    free = generate(model, batch, cls_id=2, sep_id=-1, max_tokens=6)
    assert free.shape == (5, 6)
    with torch.no_grad():
        _, context = model.encode(batch)
        ids = torch.full((5, 1), 2)
        for _ in range(6):
            ids = torch.cat([ids, model.decode(context, ids, None)[:, -1:].argmax(-1)], 1)
    assert torch.equal(free, ids[:, 1:])
    stop = int(free[0, 1])
    stopped = generate(model, batch, cls_id=2, sep_id=stop, max_tokens=6)
    for row, all_of_it in zip(stopped.tolist(), free.tolist(), strict=True):
        end = all_of_it.index(stop) if stop in all_of_it else 6
        assert row[:end] == all_of_it[:end][: len(row)] and set(row[end:]) <= {stop}


def test_answer_loss_and_accuracy():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]], [[0.0, 3.0], [9.0, 0.0], [0.0, 0.0]]])
    ids, mask = torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    nll = [math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    torch.testing.assert_close(sequence_nll(logits, ids, mask), torch.tensor(nll))
    loss = answer_loss(logits, ids, mask, torch.tensor([0.3, 1.0]), 4)
    torch.testing.assert_close(loss, torch.tensor((0.3 * nll[0] + nll[1]) / 4))
    given = [[("yes", 0.6), ("no", 0.4)], [("red", 1.0)], [("2", 0.7), ("2", 0.7)]]
    assert accuracy(["no", "blue", "2"], given) == pytest.approx(1.4 / 3)
    assert accuracy([], []) == 0.0
    batches = [{"answer_texts": given[:2]}, {"answer_texts": given[2:]}]
    guesses = iter([["yes", "red"], ["3"]])
    result = evaluate(lambda batch: next(guesses), batches)
    beside = {"majority_accuracy": pytest.approx(1 / 3), "standard_error": pytest.approx(0.2905933)}
    assert result == {"accuracy": pytest.approx(1.6 / 3), "questions": 3, "accuracy_yes_no": 0.6, "accuracy_other": 0.5, **beside}


def test_layers_without_anything_left_still_run_and_save(tmp_path):
    kept = dict.fromkeys(XVLMConfig(**SIZES, decoder_layers=1).original_counts(), "")
    model = build(decoder_layers=1, kept=kept)
    assert model.units() == [] and all(tensor.numel() for tensor in model.state_dict().values())
    batch = questions(None) | {"answer_ids": torch.ones(5, 2).long(), "answer_mask": torch.ones(5, 2), "answer_index": torch.arange(5)}
    record = model.run(batch, XVLMModel.taps)
    assert record["logits"].isfinite().all() and record["vision.self_attention"][0].shape[1] == 0
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(FAMILY.load(tmp_path).run(batch)["logits"], record["logits"], rtol=0, atol=0)
    cache = Cache()
    _, context = model.encode(questions(None))
    for _ in range(2):
        assert model.decode(context, torch.ones(5, 1).long(), None, None, cache).isfinite().all()


@pytest.mark.parametrize("kept", [None, KEPT])
def test_a_saved_folder_is_the_same_network(tmp_path, kept):
    model = build(decoder_layers=1, kept=kept, answers=["yes", "no"], layer_source={"vision": [1, 3, 5]})
    model.save_pretrained(tmp_path)
    family = families.of_folder(tmp_path)
    loaded = family.load(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.config.kept_indices() == model.config.kept_indices() and not loaded.training
    assert (loaded.config.answers, loaded.config.layer_source, list(loaded.config.heads)) == (
        ["yes", "no"],
        {"vision": [1, 3, 5]},
        list(model.config.heads),
    )


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: edit(f, text_intermediate=9), "mismatched keys"),
        (lambda f: edit(f, vision_layers=4), "missing keys"),
        (lambda f: edit(f, vision_layers=2), "unexpected keys"),
        (lambda f: edit(f, kept={"vision.0.head": "0-1"}), "mismatched keys"),
        (lambda f: edit(f, kept={"audio.0.head": "0-1"}), "unknown groups"),
        (lambda f: edit(f, kept={"vision.0.head": "0-7"}), "not ascending within"),
        (lambda f: spoil_weights(f, lambda t: t.pop("temp")), "1 missing keys, first temp"),
        (lambda f: spoil_weights(f, lambda t: t.update(extra=torch.ones(1))), "first extra"),
        (lambda f: spoil_weights(f, lambda t: t["temp"].fill_(math.nan)), "holds NaN or infinite values: temp does"),
        (lambda f: spoil_weights(f, lambda t: t.update(temp=torch.tensor(-math.inf))), "temp does, the first of 1"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]), "is damaged or cut short"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot load"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_folders_whose_weights_do_not_fit(tmp_path, spoil, message):
    build().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message):
        FAMILY.load(tmp_path)


def test_large_weights_are_finite(tmp_path):
    """Their sum is not."""
    build().save_pretrained(tmp_path)
    spoil_weights(tmp_path, lambda tensors: tensors["fusion.layers.0.attention.q.bias"].fill_(3e38))
    assert FAMILY.load(tmp_path).fusion.layers[0].attention.q.bias.max() > 1e38


@pytest.mark.parametrize(
    "content, message",
    [("{}", "does not say which family"), ("[1]", "does not say which family"), ("[" * 10**5, "nested too deeply"), ("{", "not valid")],
    ids=["no type", "a list", "deep", "cut"],
)
def test_configurations_that_name_no_family(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        families.of_folder(tmp_path)


def test_folders_of_no_known_family(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.json"):
        families.of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blap"}')
    with pytest.raises(BadInput, match="model of type 'blap'"):
        families.of_folder(tmp_path)


def test_ranges():
    for indices in ([], [0], [0, 1, 2, 5], [1, 3, 4], list(range(7))):
        assert parse_ranges(format_ranges(indices), 7, "g") == indices
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    for text in ("x", "3,1", "1,1", "0-9", "-1", "5-3", "0-2,6-5", 5):
        with pytest.raises(BadInput, match=r"config\.json"):
            parse_ranges(text, 7, "g")


def test_layer_choice_keeps_structure_regions_and_names():
    config = XVLMConfig(**SIZES, decoder_layers=2, kept={"vision.2.head": "0", "fusion.1.cross_head": "1-2", "text.0.neuron": ""})
    layers = {"vision": [0, 2], "text": [1], "fusion": [1], "decoder": [0]}
    chosen = config.with_layers(layers)
    assert chosen.layers() == {"vision": 2, "text": 1, "fusion": 1, "decoder": 1}
    kept = chosen.kept_indices()
    assert kept["vision.1.head"] == [0] and kept["fusion.0.cross_head"] == [1, 2] and kept["text.0.neuron"] == list(range(7))
    assert chosen.local_attention_depth == 1  # of layers 1 and 2, the last two, one is left
    assert chosen.layer_source == layers and config.layer_source is None
    assert XVLMModel.source_name("vision.layers.1.ffn.fc1.bias", layers) == "vision.layers.2.ffn.fc1.bias"
    assert XVLMModel.source_name("vision.layers.0.attention.q.weight", layers) == "vision.layers.0.attention.q.weight"
    assert XVLMModel.source_name("itm_head.0.bias", layers) == "itm_head.0.bias"


def test_kept_structure_is_named_by_original_index():
    config = XVLMConfig(**SIZES).with_kept({"vision.0.head": [1, 3], "text.1.neuron": list(range(7))})
    assert config.kept == {"vision.0.head": "1,3"}
    again = config.with_kept({"vision.0.neuron": []})
    assert again.kept == {"vision.0.head": "1,3", "vision.0.neuron": ""}
    assert again.with_kept({"vision.0.head": [0, 1, 2, 3], "vision.0.neuron": list(range(6))}).kept is None


def test_a_decoder_from_the_fusion_layers():
    model = build(vision_width=24)
    tuned = with_decoder(model, 1)
    old, new = model.state_dict(), tuned.state_dict()
    for name in new:
        if name.startswith("decoder.layers.0."):
            assert torch.equal(new[name], old[name.replace("decoder.layers.0", "fusion.layers.1")]), name
        elif name.startswith("decoder"):
            assert torch.equal(new[name], old[name.replace("decoder_head", "mlm_head").replace("decoder.", "text.")]), name
        else:
            assert torch.equal(new[name], old[name]), name
    assert list(tuned.config.heads) == [] and not any("head" in name for name in new if not name.startswith("decoder"))
    same = with_decoder(model, 2).state_dict()
    assert all(torch.equal(same[f"decoder.layers.{i}.ffn.fc1.bias"], old[f"fusion.layers.{i}.ffn.fc1.bias"]) for i in range(2))


def test_a_decoder_from_fusion_layers_that_look_at_wider_images():
    """Keys and values read another width there, so they stay fresh (X-VLM does the same)."""
    model = build()
    tuned = with_decoder(model, 1)
    fusion, decoder = (
        {name.partition(".layers.")[2][2:]: tensor for name, tensor in net.state_dict().items() if name.startswith(start)}
        for net, start in ((model, "fusion.layers.1."), (tuned, "decoder.layers.0."))
    )
    fresh = {name for name in decoder if decoder[name].shape != fusion[name].shape or not torch.equal(decoder[name], fusion[name])}
    assert fresh == {"cross_attention.k.weight", "cross_attention.v.weight"}


def test_a_decoder_from_the_teacher():
    teacher, student = build(decoder_layers=4), build(vision_layers=1)
    tuned = with_decoder(student, 2, teacher)
    theirs, ours = teacher.state_dict(), tuned.state_dict()
    for name in (n for n in ours if n.startswith("decoder")):
        source = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.1.")
        assert torch.equal(ours[name], theirs[source]), name
    assert all(torch.equal(ours[name], tensor) for name, tensor in student.state_dict().items() if name in ours)


def test_no_decoder_from_layers_that_are_pruned_or_missing():
    for model, source in (
        (build(kept={"fusion.0.head": "0"}), None),
        (build(fusion_layers=0), None),
        (build(), build()),
        (build(), build(decoder_layers=2, kept={"decoder.1.neuron": "0-3"})),
    ):
        with pytest.raises(BadInput, match="no answer decoder"):
            with_decoder(model, 1, source)


OPEN = {
    "load": "import efficientvlm; model = efficientvlm.load(folder)",
    "package first": "import efficientvlm; from transformers import AutoModel; model = AutoModel.from_pretrained(folder)",
    "package last": "from transformers import AutoModel; import efficientvlm; model = AutoModel.from_pretrained(folder)",
}
PROCESS = """
import sys, torch
folder = sys.argv[1]
{open}
from safetensors.torch import load_file
from efficientvlm import families
tensors = load_file(sys.argv[2])
family = families.of_folder(__import__("pathlib").Path(folder))
batch = {{name: value for name, value in tensors.items() if name != "logits"}}
with torch.no_grad():
    logits = model.eval().run(batch)["logits"]
torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=1e-5)
print(type(model).__name__, sum(parameter.numel() for parameter in model.parameters()))
"""


def test_a_pruned_folder_opens_in_fresh_processes(chain, tmp_path):
    folder = chain / "pruned"
    model = FAMILY.load(folder)
    assert any(len(kept) < model.config.original_counts()[group] for group, kept in model.config.kept_indices().items())
    batch = {name: value.clone() for name, value in model.example(2, 5).items()}
    batch["pixels"] = torch.randn(batch["pixels"].shape)
    with torch.no_grad():
        save_file({**batch, "logits": model.run(batch)["logits"]}, tmp_path / "inputs.safetensors")
    arguments = [str(folder), str(tmp_path / "inputs.safetensors")]
    programs = {how: (PROCESS.format(open=code), arguments) for how, code in OPEN.items()}
    for out in fresh.outputs(programs, tmp_path).values():
        assert out.split() == ["XVLMModel", str(sum(parameter.numel() for parameter in model.parameters()))]
