"""Folders of BLIPs in a process that has transformers alone: its processor reads them, its classes say what `evlm predict` says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compression_cases import network
from conftest import QUIET, SIZES, run_stage
from PIL import Image

from efficientvlm.checkpoints.folder import Output
from efficientvlm.compression.surgery import slice_model
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PairItem, caption_batch, pair_batch
from efficientvlm.data.tokenizer import train_wordpiece, with_special
from efficientvlm.families.blip.config import BlipAnswerConfig, BlipCaptionConfig, BlipRetrievalConfig
from efficientvlm.families.blip.family import BLIP
from efficientvlm.families.blip.start import fresh_config
from efficientvlm.loaded import load, texts_of
from efficientvlm.objectives.captioning import Captions
from efficientvlm.stages import predict
from efficientvlm.stages.common import write

TEXTS = ["a red circle left of two blue squares", "is the green triangle small?", "a picture of many large grey stars"]
QUESTION, CAPTION, PROMPT = "is the circle blue?", "two red stars", "a picture of"

ASKED = """
import json, sys
import torch, transformers
from PIL import Image

def read(ids, prompt=""):
    text = processor.decode(ids[0]).partition("[SEP]")[0].removeprefix("[DEC]").strip()
    return text.removeprefix(prompt).strip().removeprefix("##")

said, (jobs, question, prompt, caption) = {}, json.loads(sys.argv[1])
for folder, name in jobs:
    processor = transformers.BlipProcessor.from_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(folder).eval()
    ids = processor.tokenizer.get_vocab()
    for picture in ("red.png", "noise.png"):
        image = Image.open(picture)
        with torch.no_grad():
            if name == "BlipForQuestionAnswering":
                inputs = processor(images=image, text=question, return_tensors="pt")
                assert inputs["input_ids"][0, 0] == ids["[ENC]"]
                answers = [model.generate(**inputs, num_beams=beams, max_length=7) for beams in (1, 3)]
                got = [read(answer) for answer in answers]
            elif name == "BlipForConditionalGeneration":
                inputs = processor(images=image, text=prompt, return_tensors="pt")
                assert inputs["input_ids"][0, 0] == ids["[DEC]"]
                texts = [model.generate(**inputs, num_beams=beams, max_length=14, min_length=9, repetition_penalty=1.5) for beams in (1, 3)]
                got = [read(text, prompt) for text in texts]
                inputs = processor(images=image, text=f"{prompt} {caption}", return_tensors="pt")
                labels = inputs["input_ids"].clone()
                labels[:, : len(processor.tokenizer(prompt)["input_ids"]) - 1] = -100
                got.append(float(model(**inputs, labels=labels).loss))
            else:
                inputs = processor(images=image, text=caption, return_tensors="pt")
                cosine = model(**inputs, use_itm_head=False).itm_score
                inputs["input_ids"][:, 0] = ids["[ENC]"]
                got = [*model(**inputs).itm_score[0].tolist(), float(cosine)]
        said.setdefault(folder, []).append(got)
assert "efficientvlm" not in sys.modules
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Name → folder and class of transformers: each network as it lies, and pruned and padded, one of them with few cross layers; two
    that were shrunk, in depth and in width."""
    root = tmp_path_factory.mktemp("stock")
    Image.new("RGB", (90, 60), (200, 30, 10)).save(root / "red.png")
    noise = torch.randint(256, (70, 50, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(root / "noise.png")
    tokenizer = with_special(train_wordpiece(TEXTS, 90), BLIP.extra_tokens)
    sizes = {**SIZES, "vision_layers": 2, "text_layers": 2, "initializer_range": 0.4}
    answering = fresh_config("tiny", sizes, tokenizer.get_vocab())
    kinds: Mapping[str, Any] = {"vqa": BlipAnswerConfig, "caption": BlipCaptionConfig, "retrieval": BlipRetrievalConfig}
    found = {}
    for number, (name, kind) in enumerate(kinds.items()):
        config = kind(**{**answering.to_dict(), "architectures": None, "model_type": kind.model_type})
        config.note_smoothing(0.1)
        if name == "caption":
            config.question_start_id = None
        few = kind(**{**config.to_dict(), "cross_layers": {tower: [1] for tower in ("text", "decoder") if tower in kind.towers}})
        for form, chosen in (("whole", config), ("padded", few if name == "caption" else config)):
            torch.manual_seed(number)
            model = network(chosen)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            if form == "padded":
                model = slice_model(model, [unit for unit in model.units() if (unit.index + unit.layer) % 3 or unit.kind == "cross_head"])
            write(
                Output.open(root / f"{name}-{form}", stage="import", inputs={}, config={}),
                BLIP(),
                model,
                tokenizer,
                control=QUIET,
                origin="random",
            )
        run_stage("export", model=str(root / f"{name}-padded"), out=str(root / f"{name}-out"), format="padded")
        found |= {f"{name}-whole": (root / f"{name}-whole", kind.stock), f"{name}-padded": (root / f"{name}-out", kind.stock)}
    for form, how in {"vqa-shrunk": {}, "vqa-narrow": {"width": {"vision": 8, "text": 8}}}.items():
        run_stage("shrink", model=str(root / "vqa-whole"), out=str(root / form), **how)
        found[form] = (root / form, BlipAnswerConfig.stock)
    return found


def ours(source: Path, kind: str, picture: Path) -> list[Any]:
    """What is said here of the checkpoint that a folder was made from."""
    asked: dict[str, Any] = {"model": str(source), "image": str(picture), "device": "cpu", "length_rule": "generated", "beams": 3}
    if kind == "BlipForQuestionAnswering":
        del asked["length_rule"], asked["beams"]
        asked |= {"question": QUESTION, "mode": "generate", "max_length": 7}
        found = [predict.run(**asked, **how) for how in ({}, {"beams": 3, "length_rule": "generated"})]
        return [one["answer"].removeprefix("##") for one in found]
    loaded = load(str(source))
    image = PairItem("one", open_image(str(picture), loaded.preprocessing), [CAPTION])
    if kind == "BlipForConditionalGeneration":
        asked |= {"prompt": PROMPT, "max_length": 14, "min_length": 9, "repetition_penalty": 1.5}
        greedy = {**{key: asked[key] for key in asked if key not in ("length_rule", "beams")}, "decoding": "greedy"}
        batch = caption_batch([image], texts_of(loaded), seed=0, step=0, prompt=PROMPT)
        with torch.no_grad():
            loss = Captions(loaded.model, 0.1)(batch, 0)["loss"]
        return [*(predict.run(**how)["caption"].removeprefix("##") for how in (greedy, asked)), float(loss)]
    batch = pair_batch([image], texts_of(loaded), seed=0, step=0, augment_kind="none", task=True)
    with torch.no_grad():
        states, one = loaded.model.embed_images(batch["pixels"])
        texts, other = loaded.model.embed_texts(batch["text_ids"], batch["text_mask"])
        logits = loaded.model.match(states, torch.zeros(1, dtype=torch.long), texts, batch["text_mask"])
    return [*logits[0].tolist(), float(one @ other.T)]


def test_transformers_alone_says_the_same(folders: dict[str, tuple[Path, str]]) -> None:
    """The first token that its processor puts in front is the network's own; to match, a text is given [ENC] by hand."""
    root = next(iter(folders.values()))[0].parent
    jobs = [(str(folder), kind) for folder, kind in folders.values()], QUESTION, PROMPT, CAPTION
    done = subprocess.run([sys.executable, "-c", ASKED, json.dumps(jobs)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    different: dict[str, set[str]] = {}
    for name, (folder, kind) in folders.items():
        source = folder.parent / folder.name.replace("-out", "-padded")
        for picture, got in zip(("red.png", "noise.png"), said[str(folder)], strict=True):
            wanted = ours(source, kind, root / picture)
            assert [value if isinstance(value, str) else pytest.approx(value, abs=2e-5) for value in wanted] == got, name
            different.setdefault(kind, set()).update(str(value) for value in wanted)
    assert all(len(values) > 3 for values in different.values())
