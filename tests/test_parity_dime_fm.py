"""The losses of DIME-FM against published numbers, those of a second computation, and those of two processes; the further terms."""

from __future__ import annotations

import os
from pathlib import Path

import nursery
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.network import Record
from efficientvlm.objectives.dime_fm import rows_of
from efficientvlm.objectives.embedding import Embedded
from efficientvlm.objectives.terms import compared
from efficientvlm.runtime import ranks
from efficientvlm.runtime.exchange import Rows
from efficientvlm.settings.dime_fm import DimeFm

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "dime_fm"
known = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
WEIGHTS = {"vl": 0.7, "pvl": 0.3, "udist": 0.1}


def settings(**chosen: object) -> DimeFm:
    return DimeFm.model_validate({"out": "out", "model": "model", "data": "shapes", "task": "embedding", **chosen})


def values(student: Tensor, teacher: Tensor, text: Tensor, *, own: bool = False, said: Tensor | None = None, **chosen: object) -> Record:
    """Every term of a student's images and, where given, sentences `said`, by the name of its weight."""
    places = Rows(len(student)), Rows(len(text))
    records = Record(embedded=Embedded(student, said, *places)), Record(embedded=Embedded(teacher, text, *places))
    rows = rows_of(settings(**chosen, quirks={"own_batch": own}))
    return Record({term.weight: compared(term, *records, {}) for term in rows})


def total(found: Record) -> Tensor:
    return sum((WEIGHTS[name] * found[name] for name in WEIGHTS), torch.zeros(()))


@known
def test_losses_and_gradients_are_the_published_ones() -> None:
    expected, independent = (load_file(FOLDER / f"{name}.safetensors") for name in ("expected", "independent_float64"))
    given = [expected[name] for name in ("student_image", "teacher_image", "teacher_text")]
    for name in (*WEIGHTS, "total"):
        leaf = given[0].clone().requires_grad_()
        found = values(leaf, *given[1:])
        value = total(found) if name == "total" else found[name]
        torch.testing.assert_close(value, expected[f"loss_{name}"], rtol=4e-5, atol=1e-6)
        torch.testing.assert_close(value.double(), independent[f"loss_{name}"], rtol=4e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(gradient.double(), independent[f"grad.{name}.student_image"], rtol=1e-4, atol=1e-6)


def in_process(rank: int) -> dict[str, Tensor]:
    numbers = load_file(FOLDER / "gather2.safetensors")
    given = [numbers[f"rank{rank}.{name}"] for name in ("student_image", "teacher_image", "teacher_text")]
    found = {}
    for name in (*WEIGHTS, "total"):
        leaf = given[0].clone().requires_grad_()
        terms = values(leaf, *given[1:])
        value = total(terms) if name == "total" else terms[name]
        (found[f"grad.{name}"],) = torch.autograd.grad(value, leaf)
        found[f"loss_{name}"] = ranks.averaged(value)
        alone = values(*given, own=True)
        found[f"own.loss_{name}"] = total(alone) if name == "total" else alone[name]
    return found


@known
def test_two_processes_compare_all_samples_or_as_published_each_its_own(tmp_path: Path) -> None:
    numbers = load_file(FOLDER / "gather2.safetensors")
    for rank, found in enumerate(nursery.at_once(in_process, tmp_path)):
        for name in (*WEIGHTS, "total"):
            torch.testing.assert_close(found[f"loss_{name}"].double(), numbers[f"gathered.loss_{name}"], rtol=4e-5, atol=1e-6)
            torch.testing.assert_close(
                found[f"own.loss_{name}"].double(), numbers[f"rank{rank}.not_gathered.loss_{name}"], rtol=4e-5, atol=1e-6
            )
            gradient = numbers[f"gathered.grad.{name}.rank{rank}.student_image"]  # of the mean over processes, which averages ours
            torch.testing.assert_close(found[f"grad.{name}"].double() / 2, gradient, rtol=1e-4, atol=1e-6)


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return unit(5, 8, seed=1), unit(5, 8, seed=2), unit(7, 8, seed=3), unit(7, 8, seed=4)


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn() -> None:
    _, teacher, text, _ = drawn()
    leaf = teacher.clone().requires_grad_()
    found = values(leaf, teacher, text, said=text)
    for name in ("vl", "pvl", "udist", "feature_mse", "cosine"):
        assert abs(float(found[name].detach())) < 1e-5
    (gradient,) = torch.autograd.grad(found["vl"], leaf)
    assert float(gradient.abs().max()) < 1e-3


def test_order_of_sentences_does_not_count() -> None:
    student, teacher, text, _ = drawn()
    mixed = text[torch.tensor([3, 1, 6, 0, 2, 5, 4])]
    torch.testing.assert_close(values(student, teacher, mixed)["vl"], values(student, teacher, text)["vl"])


def test_further_terms_are_what_their_sources_say() -> None:
    student, teacher, text, said = drawn()
    found, images = values(student, teacher, text, said=said), values(student, teacher, text)
    torch.testing.assert_close(found["feature_mse"], F.mse_loss(student, teacher) + F.mse_loss(said, text))
    torch.testing.assert_close(images["feature_mse"], F.mse_loss(student, teacher))
    apart = [1 - F.cosine_similarity(a, b).mean() for a, b in ((student, teacher), (said, text))]
    torch.testing.assert_close(found["cosine"], apart[0] + apart[1])
    found_image, found_text = (F.cross_entropy(100 * a @ b.T, torch.arange(len(a))) for a, b in ((student, teacher), (said, text)))
    torch.testing.assert_close(found["interactive"], (found_image + found_text) / 2)
    torch.testing.assert_close(images["interactive"], found_image)
    logits, target = 50 * student @ said.T, 50 * teacher @ text.T
    both = F.cross_entropy(logits, target.softmax(1)) + F.cross_entropy(logits.T, target.T.softmax(1))
    torch.testing.assert_close(found["affinity"], both / 2)


def test_the_first_numbers_of_an_embedding_are_compared_too() -> None:
    student, teacher, text, _ = drawn()
    short = [F.normalize(values[:, :4], dim=-1) for values in (student, teacher, text)]
    whole, both = values(student, teacher, text), values(student, teacher, text, widths=[4])
    torch.testing.assert_close(both["feature_mse"], (whole["feature_mse"] + F.mse_loss(*short[:2])) / 2)
    taught, learnt = 100 * teacher @ text.T, 100 * short[0] @ short[2].T
    expected = sum(
        F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True)
        for a, b in ((learnt, taught), (learnt.T, taught.T))
    )
    torch.testing.assert_close(both["vl"], (whole["vl"] + expected) / 2)
    narrow = values(short[0], teacher, text, widths=[4])  # a student whose whole vectors are shorter
    torch.testing.assert_close(narrow["vl"], torch.as_tensor(expected))
    torch.testing.assert_close(narrow["cosine"], 1 - F.cosine_similarity(*short[:2]).mean())


def test_terms_of_images_alone_need_no_sentence() -> None:
    student, teacher, text, _ = drawn()
    places, known = (Rows(len(student)), Rows(len(text))), values(student, teacher, text)
    records = [Record(embedded=Embedded(side, None, *places)) for side in (student, teacher)]
    for term in rows_of(settings()):
        if term.weight not in ("vl", "affinity"):
            torch.testing.assert_close(compared(term, *records, {}), known[term.weight], rtol=0, atol=0)
