"""The nine terms of DLIP against the numbers of a replication of it, which is not the authors', and what is repaired of them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.network import Record
from efficientvlm.objectives.dlip import TABLE
from efficientvlm.objectives.losses import Contrast, Queues
from efficientvlm.objectives.terms import Term, TowerMap, compared
from efficientvlm.runtime.exchange import Rows
from efficientvlm.settings.dlip import PretrainingDlip, PretrainingQuirks

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "dlip_terms_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
LAYERS = {"student": 3, "teacher": 4}
NAMES = {
    "image_features": "1_image_feat",
    "text_features": "2_text_feat",
    "fused_feature": "3_fusion_feat",
    "decoder_state": "4_decoder_feat",
    "alignment": "5_itc",
    "lm_logits": "6_lm_logits",
    "fusion_self_attention": "7_fusion_self_attn",
    "fusion_cross_attention": "8_fusion_cross_attn",
    "decoder_self_attention": "9_decoder_self_attn",
}
MAPS = [name for name in NAMES if name.endswith("attention")]
PUBLISHED = PretrainingQuirks(unmasked_padding=True, first_token=True, shrunk_maps=True, queued_first=True)
TAPS = {
    "text.hidden@itm_positive": "fusion_hidden",
    "text.self_attention@itm_positive": "fusion_self_attn",
    "text.cross_attention@itm_positive": "fusion_cross_attn",
    "decoder.hidden": "decoder_hidden",
    "decoder.self_attention": "decoder_self_attn",
}
MASKS = dict.fromkeys(TAPS, "text_mask") | dict.fromkeys(("image_feature", "text_feature", "contrast", "lm_logits"), "")


class Case:
    """A student and its teacher: what they recorded, and the student's tensors that gradients are known of."""

    def __init__(self, name: str) -> None:
        self.expected = load_file(FOLDER / f"expected_{name}.safetensors")
        self.weights = {
            who: load_file(FOLDER / f"{file}.safetensors") for who, file in (("student", f"student_{name}"), ("teacher", "teacher"))
        }
        self.temperature = self.weights["student"]["temp"].clone().requires_grad_()
        self.mask = load_file(FOLDER / "batch.safetensors")["text_atts"]
        self.leaves = {key: value.clone().requires_grad_() for key, value in self.expected.items() if key.startswith("student.")}
        heads = self.leaves["student.fusion_self_attn.2"].shape[1]
        pairs = ([*range(heads)], [head * 4 // heads for head in range(heads)])
        met = dict.fromkeys(("head", "cross_head"), [([], [])] * 2 + [pairs])
        self.maps = dict.fromkeys(("text", "decoder"), TowerMap([(3, 4)], [(2, 3)], met))

    def record(self, who: str) -> Record:
        found = self.leaves if who == "student" else self.expected
        record = Record(text_mask=self.mask, predicts=F.pad(self.mask[:, 1:], (0, 1)))
        record |= {f"{tower}_feature": found[f"{who}.{tower}_feat"] for tower in ("image", "text")}
        record["lm_logits"] = found[f"{who}.lm_logits"]
        for tap, name in TAPS.items():
            count = LAYERS[who] + tap.partition("@")[0].endswith("hidden")
            record[tap] = [found[f"{who}.{name}.{layer}"] for layer in range(count)]
        before = [self.expected[f"queue_before.{tower}"].T for tower in ("image", "text")]
        new = [self.expected[f"student.{tower}_feat_m"] for tower in ("image", "text")]
        queues = Queues(*before, *new, (int(self.expected["queue_ptr_after"]) - 4 + torch.arange(4)) % len(before[0]))
        same = torch.cat([torch.eye(4), torch.zeros(4, len(before[0]))], 1).bool()
        record["contrast"] = Contrast(record["image_feature"], record["text_feature"], self.temperature, Rows(4), same, queues)
        return record

    def text_projection(self, who: str, states: Tensor) -> Tensor:
        return F.linear(states, *(self.weights[who][f"text_proj.{part}"] for part in ("weight", "bias")))

    def value(self, weight: str, *, change: Any = None, **chosen: Any) -> Tensor:
        term = term_of(weight, **chosen)
        if weight in ("fused_feature", "decoder_state"):
            inner = term.distance
            both: Any = lambda ours, theirs, *rest: inner(  # noqa: E731
                self.text_projection("student", ours), self.text_projection("teacher", theirs), *rest
            )
            term = term._replace(distance=both)
        return compared(change(term) if change else term, self.record("student"), self.record("teacher"), self.maps)


def term_of(weight: str, **chosen: Any) -> Term:
    usual = {name: field.default for name, field in PretrainingDlip.model_fields.items()} | {"quirks": PretrainingQuirks()}
    (row,) = [row for row in TABLE if row.weight == weight]
    term = row.term(MASKS, SimpleNamespace(**usual | chosen))  # type: ignore[arg-type]
    assert term
    return term


@pytest.fixture(scope="module", params=["a", "b"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def known(case: Case, prefix: str) -> dict[str, Tensor]:
    """Gradients under `prefix`, by the student's tensor."""
    names = {
        "text_hidden_last": None,
        "image_embeds": None,
        "fusion_hidden_last": "student.fusion_hidden.3",
        "decoder_hidden_last": "student.decoder_hidden.3",
        **{f"{kind}_attn": f"student.{kind}_attn.2" for kind in ("fusion_self", "fusion_cross", "decoder_self")},
    }
    found = {key.removeprefix(prefix): value for key, value in case.expected.items() if key.startswith(prefix)}
    return {place: value for name, value in found.items() if (place := names.get(name, f"student.{name}"))}


def agrees(case: Case, value: Tensor, expected: str, gradients: str) -> None:
    torch.testing.assert_close(value, case.expected[expected], **CLOSE)
    wanted = {name: gradient for name, gradient in known(case, gradients).items() if not name.endswith("_proj")}
    if gradients == "grad.6_lm_logits.":
        wanted.pop("student.decoder_hidden.3")  # behind a head that is not here
    assert wanted
    leaves = [case.temperature if name == "student.temp" else case.leaves[name] for name in wanted]
    for found, gradient in zip(torch.autograd.grad(value, leaves), wanted.values(), strict=True):
        torch.testing.assert_close(found, gradient, **CLOSE)


@pytest.mark.parametrize("weight", NAMES)
def test_terms_and_gradients_as_replicated(case: Case, weight: str) -> None:
    if f"term.{NAMES[weight]}" not in case.expected:
        pytest.skip("the replication stops where heads differ in number")
    value = case.value(weight, quirks=PUBLISHED)
    agrees(case, value, f"term.{NAMES[weight]}", f"grad.{NAMES[weight]}.")


def test_their_sum_as_replicated() -> None:
    case = Case("a")
    total = sum((case.value(weight, quirks=PUBLISHED) for weight in NAMES), torch.zeros(()))
    torch.testing.assert_close(total, case.expected["term.sum"], **CLOSE)


@pytest.mark.parametrize("weight, repaired", [("alignment", "before_enqueue"), ("lm_logits", "target_not_pad")])
def test_alignment_and_predictions_repaired(case: Case, weight: str, repaired: str) -> None:
    name = f"{NAMES[weight]}.{repaired}"
    agrees(case, case.value(weight), f"ours.{name}", f"ours_grad.{name}.")


def every_key(term: Term) -> Term:
    """`term` with the columns of padding, as the numbers of this folder have them; ours leaves them out."""
    distance: Any = term.distance

    def changed(ours: Any, theirs: Any, term: Term, pairing: Any) -> Tensor:
        return distance(ours, theirs, term._replace(tap="text.cross_attention"), pairing)

    return term._replace(distance=changed)


@pytest.mark.parametrize("weight", MAPS)
@pytest.mark.parametrize(
    "repaired, chosen",
    [
        ("valid_rows", {}),
        ("head_mean", {"heads": "mean", "quirks": PUBLISHED}),
        ("head_mean_valid_rows", {"heads": "mean", "quirks": PretrainingQuirks(shrunk_maps=True)}),
        ("head_mean_plain_kl_valid_rows", {"heads": "mean", "attention_temperature": 0.0, "quirks": PretrainingQuirks(shrunk_maps=True)}),
    ],
)
def test_maps_repaired(case: Case, weight: str, repaired: str, chosen: Any) -> None:
    name = f"{NAMES[weight]}.{repaired}"
    if f"ours.{name}" not in case.expected:
        pytest.skip("single heads do not meet where they differ in number")
    change = None if "cross" in weight or "plain" in repaired else every_key
    agrees(case, case.value(weight, change=change, **chosen), f"ours.{name}", f"ours_grad.{name}.")


@pytest.mark.parametrize("weight", MAPS)
def test_averages_of_heads_are_brought_back_to_the_size_of_single_ones(weight: str) -> None:
    case = Case("a")
    single, mean = case.value(weight), case.value(weight, heads="mean")
    shrunk = case.value(weight, heads="mean", quirks=PretrainingQuirks(shrunk_maps=True))
    assert 0.8 < (mean / single).item() < 1.25 and (single / shrunk).item() > 3
