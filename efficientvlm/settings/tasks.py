"""What is known of a task where no network is loaded: its own settings, beside those of every stage, and what its figures are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from efficientvlm.settings.base import Aside, Count, DataName, Seed, Size, Strict
from efficientvlm.settings.common import Asking, Learning, Measuring, OnTask
from efficientvlm.settings.methods import MaskQuirks, VQAPruningQuirks, VQAQuirks

Pictures = Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
"""Files of pictures; of one its name will do."""
Words = Annotated[list[str] | None, BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
"""Texts; a single one will do."""


Over = Literal["all", "process"]
"""Whose pairs of a batch meet: those of all processes, or of each process its own."""


class Contrasting(Learning):
    """How images and texts are contrasted."""

    hard_negatives: bool = Field(True, description="matching draws its negatives by similarity, as published; false: any, for a beginner")
    negatives_over: Over = Field("all", description="whose pairs matching draws from: those of all processes, or each process its own")
    momentum: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="what an average of the weights keeps of itself in a step: images and texts are contrasted with the features that "
        "averaged encoders give, of the batch and of a queue; 0: with each other in the batch alone; by default as published",
    )
    queue: Count | None = Field(
        None,
        ge=1,
        description="pairs of earlier steps that are kept for that, a multiple of batch_size; by default 57,600 as published, or fewer: "
        "as many as there are in the training data",
    )
    queue_start: Literal["empty", "random"] = Field("empty", description="random: it begins with random vectors, as published")
    alpha: float = Field(0.4, ge=0, le=1, description="part of a target that the averaged encoders give; the rest is the pairs' own")
    alpha_warmup: float = Field(0.1, ge=0, le=1, description="fraction of all steps in which alpha grows from 0")
    contrast_over: Over = Field(
        "all", description="whose averaged features a pair meets, beside the queue: those of all processes, or as published of its own"
    )


Loss = Literal["itc", "itm", "mlm", "lm", "box"]


class Losses(Learning):
    """What is minimised before any task."""

    losses: list[Loss] | None = Field(
        None,
        min_length=1,
        description="by default all of the published ones: itc, itm, mlm, box of an X-VLM; itc, itm, lm of a BLIP",
    )
    loss_weights: dict[Loss, Annotated[float, Field(ge=0)]] = Field(default_factory=dict, description="of losses, where it is not 1")

    @field_validator("loss_weights")
    @classmethod
    def _of_losses(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        losses = info.data.get("losses")
        if losses and (strange := [name for name in weights if name not in losses]):
            raise ValueError(f"{strange[0]} is not among the losses")
        return weights


class PretrainingSettings(Contrasting, Losses):
    """Image-text pre-training."""

    region_probability: float = Field(0.5, ge=0, le=1, description="chance of a region step before a general step; for boxes alone: always")
    regions_per_image: Size = Field(5, ge=1)
    mask_probability: float = Field(0.25, gt=0, lt=1, description="part of a text's tokens that MLM hides")
    max_masks: Size = Field(8, ge=1, description="at most so many of them")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="lm: the part of a target that all tokens share")

    def fullest(self) -> dict[str, Any]:
        """With a region step, if there may be one."""
        return {**super().fullest(), "region_probability": float(self.region_probability > 0)}

    @field_validator("hard_negatives")
    @classmethod
    def _of_matching(cls, hard: bool, info: ValidationInfo) -> bool:
        if not hard and "itm" not in (info.data.get("losses") or ["itm"]):
            raise ValueError("it needs itm among the losses")
        return hard


class VQASettings(Learning):
    """Visual question answering."""

    quirks: VQAQuirks = Field(default_factory=VQAQuirks)
    questions_per_image: Size = Field(6, ge=1, description="questions that share one vision pass")
    max_answer_tokens: Size = Field(10, ge=3)
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="part of a target that all tokens share; 0.1 in BLIP")
    answers: str | None = Field(None, description="file with one answer a line; by default those of the training data")
    min_answer_count: Count = Field(1, ge=1, description="training questions that must accept an answer for it to be in the closed list")
    rank_top: Annotated[Count, Aside()] = Field(128, ge=1, description="candidates kept after the first token")
    decoder_init: Literal["auto", "teacher", "fusion"] = Field("auto", description="where a new answer decoder comes from")


class VQAPruning(VQASettings):
    quirks: VQAPruningQuirks = Field(default_factory=VQAPruningQuirks)


LengthRule = Literal["published", "generated"]


class Answered(Strict):
    """How an answer comes about: the best of a closed list, or text that is written freely."""

    mode: Literal["rank", "generate"] = "rank"
    beams: Count = Field(1, ge=1, le=100, description="generate: answers that the search keeps of a question, 3 in BLIP; 1: greedy")
    length_rule: LengthRule = Field(
        "published",
        description="generate: by which tokens beams are averaged: the first one and the answer; generated: the answer and its end",
    )
    max_length: Count | None = Field(
        None,
        ge=2,
        description="generate: most tokens, the first one too, 10 in BLIP; by default one more than the longest answer learnt",
    )

    @field_validator("beams", "length_rule", "max_length", "attends_padding", check_fields=False)
    @classmethod
    def _of_generation(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("mode") == "rank" and value != cls.model_fields[info.field_name or ""].default:
            raise ValueError("it goes with mode generate")
        if info.field_name == "length_rule" and value != "published" and info.data.get("beams") == 1:
            raise ValueError("it goes with several beams")
        return value


class VQAQuestion(Asking, Answered):
    image: Pictures = Field(min_length=1, max_length=1, examples=["picture.png"])
    question: str = Field(examples=["What colour is it?"])
    top: Count = Field(5, ge=1, description="answers that are shown")

    @field_validator("question")
    @classmethod
    def _says_something(cls, question: str) -> str:
        if not question.strip():
            raise ValueError('it is empty; ask something, e.g. --question "What colour is it?"')
        return question


class VQAEval(Measuring, Answered):
    answers: str | None = None
    rank_top: Count | None = Field(None, ge=1, description="candidates kept after the first token; by default as the model was tuned")
    first_token_twice: bool | None = None
    rank_smoothing: float | None = Field(
        None, ge=0, lt=1, description="label smoothing in the score of an answer, 0.1 in BLIP's code; by default as tuned, else 0"
    )
    attends_padding: bool = Field(
        False, description="generate: answers attend to the padding of questions, as in BLIP's code and in transformers"
    )


class NLVR2Settings(Learning):
    """Statements about two images, true or false."""

    statements_per_pair: Size = Field(4, ge=1, description="statements that share the vision pass of their two images")


class NLVR2Pruning(NLVR2Settings):
    quirks: MaskQuirks = Field(default_factory=MaskQuirks)


class NLVR2Question(Asking):
    image: Pictures = Field(min_length=2, max_length=2, examples=[["left.png", "right.png"]])
    statement: str = Field(examples=["Both pictures show a dog."])

    @field_validator("statement")
    @classmethod
    def _says_something(cls, statement: str) -> str:
        if not statement.strip():
            raise ValueError('it is empty; state something, e.g. --statement "Both pictures show a dog."')
        return statement


class AssignmentSettings(Learning):
    """Which of two images a text belongs to: pre-training for statements about two images."""


class RetrievalSettings(Contrasting):
    """Image-text retrieval."""

    alpha_warmup: float = Field(0.167, ge=0, le=1, description="fraction of all steps in which alpha grows from 0")


RerankBy = Literal["matching", "sum"] | None
RERANK_BY: Any = Field(
    None, description="what orders them: the matching logit, or its sum with the cosine; by default as published of the network"
)


class RetrievalEval(Measuring):
    rerank: Count = Field(0, ge=0, description="so many candidates of every query are ranked anew by matching; 0: none")
    rerank_by: RerankBy = RERANK_BY


class RetrievalQuestion(Asking):
    folders = True

    image: Pictures = Field(min_length=1, examples=["pictures"], description="files of pictures, or folders of them")
    text: Words = Field(None, min_length=1, examples=["a red circle"], description="texts that pictures are found for")
    texts: str | None = Field(None, description="file with one text a line; of one picture the best of them are found")
    top: Count = Field(5, ge=1, description="matches that are shown")
    rerank: Count | None = Field(
        None,
        ge=0,
        description="candidates that are ranked anew by matching, where the network matches; by default 32, or as many as are shown",
    )
    rerank_by: RerankBy = RERANK_BY
    out: str | None = Field(None, description="PNG file for a sheet of the pictures that were found")

    @classmethod
    def lacking(cls, values: Mapping[str, Any]) -> list[str]:
        return super().lacking(values) + ([] if {"text", "texts"} & set(values) else ["text"])

    @field_validator("text")
    @classmethod
    def _say_something(cls, text: list[str] | None) -> list[str] | None:
        if text and not all(one.strip() for one in text):
            raise ValueError('one is empty; say what is looked for, e.g. --text "a red circle"')
        return text

    @field_validator("texts")
    @classmethod
    def _or_text(cls, texts: str | None, info: ValidationInfo) -> str | None:
        if texts is None and info.data.get("text", "") is None:
            raise ValueError('there is nothing to look for; give --text "a red circle", or a file of texts')
        return texts


class GroundingSettings(Learning):
    """Grounding: a phrase as a box."""

    phrases_per_image: Size = Field(4, ge=1, description="phrases that share one view of their image; 1, as published, crops around each")


class GroundingEval(Measuring):
    mode: Literal["box", "gradcam"] = Field("box", description="gradcam: where a network that matches looks, without a box head")
    layer: Count | None = Field(None, ge=0, description="gradcam: layer with cross-attention, counted from 0; by default the middle one")
    as_published: bool = Field(False, description="boxes are not cut to their picture, and those that share one row of pixels do not meet")

    @field_validator("layer")
    @classmethod
    def _of_gradcam(cls, layer: int | None, info: ValidationInfo) -> int | None:
        if layer is not None and info.data.get("mode") != "gradcam":
            raise ValueError("it goes with mode gradcam")
        return layer


class GroundingQuestion(Asking):
    image: Pictures = Field(min_length=1, max_length=1, examples=["picture.png"])
    question: str = Field(examples=["the red circle on the left"], description="what is looked for")
    out: str | None = Field(None, description="PNG file for the picture with the box drawn into it")

    @field_validator("question")
    @classmethod
    def _means_something(cls, question: str) -> str:
        if not question.strip():
            raise ValueError('it is empty; say what is looked for, e.g. --question "the red circle on the left"')
        return question


PROMPT = "a picture of "
SHORTEST, LONGEST = 5, 20
"""Tokens of a caption in the published setting, its first token and its prompt included."""
OF_DECODING = {"beam": ("beams", "length_rule", "length_penalty"), "sample": ("top_k", "top_p", "temperature")}
"""Kind of decoding → what only it knows."""


class CaptioningSettings(Learning):
    """Captioning."""

    prompt: str = Field(PROMPT, max_length=1000, description="what every caption begins with, and the loss leaves out; empty: nothing")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="e, the part of a target that all K tokens share")
    smoothing: Literal["pytorch", "published"] = Field(
        "pytorch",
        description="what the true token keeps of its target: 1 - e + e / K; published: 1 - e, so that a target sums to 1 - e / K",
    )
    captions_per_image: Size = Field(5, ge=1, description="captions that share one vision pass")
    plain_captions: bool = Field(False, description="captions are learnt in lower case and without punctuation, as published")
    self_critical: bool = Field(False, description="learn from the CIDEr-D of sampled captions, of a network that was tuned on captions")
    samples: Size = Field(5, ge=1, description="self_critical: captions that are drawn of an image")
    baseline: Literal["greedy", "samples"] = Field(
        "greedy", description="self_critical: what a sample is compared with: the greedy caption, or the mean of the other samples"
    )
    beams: Annotated[Count, Aside()] = Field(
        3, ge=1, le=100, description="validation: captions that the search keeps of an image; 1: greedy"
    )
    min_length: Annotated[Count, Aside()] = Field(
        SHORTEST, ge=0, description="validation, and later captions: fewest tokens, first one and prompt included, the end not"
    )
    max_length: Annotated[Count, Aside()] = Field(LONGEST, ge=2, description="most tokens, counted likewise; one goes to the end")

    def fullest(self) -> dict[str, Any]:
        """With samples as long as they may be."""
        return {**super().fullest(), **({"min_length": self.max_length} if self.self_critical else {})}

    @field_validator("baseline")
    @classmethod
    def _of_several(cls, baseline: str, info: ValidationInfo) -> str:
        if baseline == "samples" and info.data.get("samples") == 1:
            raise ValueError("it needs two samples or more")
        return baseline

    @field_validator("max_length")
    @classmethod
    def _longer_than_the_shortest(cls, most: int, info: ValidationInfo) -> int:
        return _not_below_the_least(most, info)


class CaptioningPruning(CaptioningSettings):
    quirks: MaskQuirks = Field(default_factory=MaskQuirks)


class Written(Strict):
    """How captions are written."""

    prompt: str | None = Field(None, max_length=1000, description="what captions begin with; by default as tuned, else as published")
    beams: Count = Field(3, ge=1, le=100, description="beam: captions that the search keeps of an image")
    min_length: Count | None = Field(
        None, ge=0, description=f"fewest tokens, first one and prompt included, the end not; by default as tuned, else {SHORTEST}"
    )
    max_length: Count | None = Field(None, ge=2, description=f"most tokens, counted likewise; by default as tuned, else {LONGEST}")
    length_rule: LengthRule = Field(
        "published",
        description="beam: by which tokens scores are averaged: all, the end not counted; generated: those behind the prompt, with it",
    )
    length_penalty: float = Field(1.0, ge=-10, le=10, description="beam: power of that number of tokens")
    repetition_penalty: float = Field(1.0, ge=1, le=100, description="above 1: tokens that were said are less likely")
    top_k: Count = Field(0, ge=0, description="sample: only so many of the likeliest tokens are drawn; 0: any")
    top_p: float = Field(1.0, gt=0, le=1, description="sample: only the likeliest tokens that have this probability together")
    temperature: float = Field(1.0, gt=0, le=100, description="sample: divides the logits")
    decoding: Literal["beam", "greedy", "sample"] = Field("beam", description="a search, always the likeliest token, or draws")

    @field_validator("max_length")
    @classmethod
    def _longer_than_the_shortest(cls, most: int | None, info: ValidationInfo) -> int | None:
        return most if most is None else _not_below_the_least(most, info)

    @field_validator("decoding")
    @classmethod
    def _what_goes_with_it(cls, decoding: str, info: ValidationInfo) -> str:
        for name in (name for kind, names in OF_DECODING.items() if kind != decoding for name in names):
            if name in info.data and info.data[name] != cls.model_fields[name].default:
                raise ValueError(f"{name} does not go with {decoding}")
        return decoding

    @field_validator("length_rule", "length_penalty")
    @classmethod
    def _of_several_beams(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("beams") == 1 and value != cls.model_fields[info.field_name or ""].default:
            raise ValueError("it goes with several beams")
        return value


def _not_below_the_least(most: int, info: ValidationInfo) -> int:
    if most < (least := info.data.get("min_length") or 0):
        raise ValueError(f"it is less than min_length, {least}")
    return most


class CaptionEval(Measuring, Written):
    tokenization: Literal["ptb", "lower", "plain"] = Field(
        "ptb", description="what is a word: as published; lower-cased and split at spaces; as written and split at spaces"
    )
    captions: str | None = Field(None, description="JSONL file for the captions, one line an image")
    meteor: bool = Field(False, description="METEOR too; it needs Java and the extra meteor")
    spice: str | None = Field(None, min_length=1, description="folder with CoreNLP 3.6.0: SPICE too; it needs Java and the extra meteor")


class CaptionQuestion(Asking, Written):
    folders = True

    image: Pictures = Field(min_length=1, examples=["picture.png"], description="files of pictures, or folders or tar shards of them")
    out: str | None = Field(None, description="JSONL file for the captions, a line each; a run that was stopped goes on with it")
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="filter: least probability of a match, by default 0.5; where it compares by features alone, the least cosine",
    )
    filter: str | None = Field(
        None, min_length=1, description="checkpoint that matches images with texts: captions that it finds unfit are dropped (CapFilt)"
    )
    resume: bool = Field(True, description="out: go on where a run was stopped; false: begin anew")
    force: bool = Field(False, description="out: replace captions that lie there")
    seed: Seed = 0

    @field_validator("seed")
    @classmethod
    def _of_draws(cls, seed: int, info: ValidationInfo) -> int:
        if seed and info.data.get("decoding", "sample") != "sample":
            raise ValueError("nothing is drawn; it goes with decoding sample")
        return seed

    @field_validator("filter")
    @classmethod
    def _of_a_threshold(cls, filter: str | None, info: ValidationInfo) -> str | None:
        if filter is None and info.data.get("threshold") is not None:
            raise ValueError("threshold goes with it")
        return filter


class EmbeddingSettings(Learning):
    """Embeddings: images and sentences that are no pairs come to lie where a teacher puts them."""

    data: DataName = Field(description="pictures, of which nothing need be said: as elsewhere, or a folder or tar shards of them")
    sentences: DataName = Field(description="texts, of which none need belong to a picture: a .txt file with one a line, or as elsewhere")
    sentence_columns: dict[str, str] = Field(default_factory=dict, description="role → column name of the sentences")
    sentence_limit: Count | None = Field(None, ge=1, description="use only so many sentences, drawn at random; of a stream the first")
    sentence_batch_size: Count | None = Field(None, ge=2, description="sentences a step, over all processes; by default batch_size")
    learn_texts: bool = Field(False, description="the tower of texts learns as well; else it is the teacher's, and stays as it is")
    eval_sentences: Annotated[Count, Aside()] = Field(1000, ge=1, description="validation: sentences that the nearest one is looked for in")

    @property
    def sentences_a_step(self) -> int:
        return self.sentence_batch_size or self.batch_size


class EmbeddingPruning(EmbeddingSettings):
    learn_texts: bool = Field(True, description="the tower of texts learns as well, and may be pruned; else it stays as it is")


PLACE = "{}"
"""Where a class stands in a template."""
TEMPLATES: dict[str, tuple[str, ...]] = {
    "clip-7": (
        *("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game."),
        *("art of the {}.", "a photo of the small {}."),
    ),
    "clip-18": tuple(
        sentence
        for article in ("a", "the")
        for sentence in (
            *(f"a {kind}photo of {article} {{}}." for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ")),
            *(f"a {kind}photo of {article} {{}}." for kind in ("bad ", "good ")),
            *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
        )
    ),
}
"""Lists of templates that were published with CLIP: of seven for photos (ImageNet), of eighteen for small pictures (CIFAR)."""
Listed = Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
"""Several texts; a single one will do."""
OF_TEMPLATES = f"sentences with {PLACE} for the class, known lists ({', '.join(TEMPLATES)}), or files with one a line"
CLASSES = "file of class names: one a line, or a class, a tab and its name; by default as the data call them"


class Labelled(Strict):
    """A data set that is measured beside another one."""

    data: DataName
    split: Literal["train", "val", "test"] = "test"
    classes: str | None = Field(None, min_length=1, description="file of class names; by default that of all")
    templates: Listed | None = Field(None, min_length=1, description="by default those of all")
    columns: dict[str, str] | None = Field(None, description="by default those of all")


class ZeroshotEval(Measuring):
    """Classes that are told from their names."""

    classes: str | None = Field(None, min_length=1, description=CLASSES)
    candidates: Literal["known", "present"] = Field("known", description="among which is chosen: all classes known, or those with an image")
    templates: Listed = Field(["a photo of a {}."], min_length=1, description=OF_TEMPLATES)
    also: dict[str, Annotated[Labelled, BeforeValidator(lambda given: {"data": given} if isinstance(given, str) else given)]] = Field(
        default_factory=dict, description="name → data, or its settings: further sets, of which the mean is taken"
    )
    set_metrics: str | None = Field(
        None,
        min_length=1,
        description="CSV file, columns set and metric: by what each set is judged; that of --data is called data",
    )

    @field_validator("also")
    @classmethod
    def _of_other_names(cls, also: dict[str, Labelled]) -> dict[str, Labelled]:
        if "data" in also:
            raise ValueError("data is the name of the set that --data names; use another name")
        return also


class ZeroshotQuestion(Asking):
    folders = True

    image: Pictures = Field(min_length=1, examples=["pictures"], description="files of pictures, or folders or tar shards of them")
    classes: Listed = Field(min_length=1, examples=[["dog", "cat"]], description="names of classes, or files with one a line")
    templates: Listed = Field(["a photo of a {}."], min_length=1, description=OF_TEMPLATES)
    top: Count = Field(5, ge=1, description="classes that are given of a picture, best first")
    out: str | None = Field(None, description="CSV file, a line a picture; a run that was stopped goes on with it")
    sheet: str | None = Field(None, description="PNG file for a sheet of the pictures by class")
    resume: bool = Field(True, description="out: go on where a run was stopped; false: begin anew")
    force: bool = Field(False, description="out: replace what lies there")


class LinearProbeEval(Measuring):
    """Classes that a linear classifier tells by the features of images."""

    train: DataName | None = Field(None, description="data that the classifier learns from; by default --data, its split train")
    c: float | None = Field(
        None, gt=0, le=1e12, description="inverse strength of the penalty on weights; by default the best of 1e-6 to 1e6 on a held-out part"
    )
    features: Literal["projected", "pooled"] = Field(
        "projected",
        description="of images: those that are compared with texts, or what these are projected from, as for CLIP's own figures",
    )
    max_iterations: Count = Field(1000, ge=1, description="of L-BFGS")


class Untrained(Learning):
    """No task: cut by the weights alone, without training."""


TASKS: dict[str, dict[str, type[OnTask]]] = {
    "pretraining": {"pretrain": PretrainingSettings, "distill": PretrainingSettings, "prune": PretrainingSettings},
    "vqa": {"finetune": VQASettings, "prune": VQAPruning, "eval": VQAEval},
    "nlvr2": {"finetune": NLVR2Settings, "prune": NLVR2Pruning, "eval": Measuring},
    "assignment": {"pretrain": AssignmentSettings},
    "retrieval": {"finetune": RetrievalSettings, "prune": RetrievalSettings, "eval": RetrievalEval},
    "grounding": {"finetune": GroundingSettings, "prune": GroundingSettings, "eval": GroundingEval},
    "captioning": {"finetune": CaptioningSettings, "prune": CaptioningPruning, "eval": CaptionEval},
    "embedding": {"distill": EmbeddingSettings, "finetune": EmbeddingSettings, "prune": EmbeddingPruning},
    "zeroshot": {"eval": ZeroshotEval},
    "linear-probe": {"eval": LinearProbeEval},
    "none": {"prune": Untrained},
}
"""Task → stage that learns or measures it → what only the task knows there."""


class About(NamedTuple):
    """`metrics`: the main ones, the first that was measured counting, and what to call each. `counts` are those that say on how much was
    measured. `tag` is that of the Hub's pipelines."""

    metrics: dict[str, str]
    counts: tuple[str, ...] = ("images",)
    tag: str | None = None
    asked: type[Asking] | None = None
    """What `evlm predict` is given, where the task can be put in one question; its `examples` stand in model cards."""
    parts: bool = True
    """Whether its main metrics are parts of 1."""


ABOUT = {
    "vqa": About({"accuracy": "accuracy"}, ("questions",), "visual-question-answering", VQAQuestion),
    "nlvr2": About({"statement_accuracy": "accuracy on statements"}, ("statements", "pairs"), asked=NLVR2Question),
    "assignment": About({}),
    "retrieval": About(
        {"reranked_mean_recall": "mean recall, reranked", "mean_recall": "mean recall"}, ("images", "captions"), asked=RetrievalQuestion
    ),
    "grounding": About({"box_accuracy": "box accuracy"}, ("phrases", "images"), asked=GroundingQuestion),
    "captioning": About({"cider_d": "CIDEr-D"}, ("images",), "image-to-text", CaptionQuestion, parts=False),
    "embedding": About({"sentence_agreement": "nearest sentence as the teacher's"}, ("images", "sentences")),
    "zeroshot": About({"top1_accuracy": "zero-shot accuracy"}, ("images",), "zero-shot-image-classification", ZeroshotQuestion),
    "linear-probe": About({"probe_accuracy": "linear-probe accuracy"}),
    "pretraining": About({}),
}
