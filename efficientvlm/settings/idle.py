"""Settings that have no effect beside the others: where nothing is trained they are refused, elsewhere it is said."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from efficientvlm.settings.base import Strict
from efficientvlm.settings.common import Data, Learning, Stage, Taught, Train
from efficientvlm.settings.dime_fm import DimeFm, compares_sentences
from efficientvlm.settings.methods import METHODS
from efficientvlm.settings.stages import Bench, Embed, Export, InitConfig, Prune
from efficientvlm.settings.tasks import CaptioningSettings, Contrasting, EmbeddingSettings, PretrainingSettings, VQAEval

OF_THE_GATES = {"sparsity_hold", "sparsity_warmup", "freeze_at", "gates"}
OF_VALIDATION = {"eval_limit", "eval_batch_size"}
UNTRAINED = {*Taught.model_fields, *OF_THE_GATES, "calibration_batches"} - {"out", "seed", "model", "task", "device"}
MEASURED = {*Data.model_fields, *OF_VALIDATION, "precision", "max_tokens", "quirks", "rank_top"}
"""What a cut from learnt gates needs: it reads validation data and measures."""


def refused(config: Strict, given: Collection[str]) -> list[str]:
    """Problems of settings in `given` that do nothing, in a mode in which nothing is trained."""
    if not isinstance(config, Prune) or not (config.from_gates or config.task == "none"):
        return []
    names, why = UNTRAINED, "nothing is trained with task none"
    if config.from_gates:
        of_the_task = type(config).model_fields.keys() - Prune.model_fields.keys()
        names, why = (UNTRAINED | of_the_task) - MEASURED, "the gates were learnt before"
    wrong = _changed(config, names & set(given)) | ({"device"} & set(given) if config.device not in ("auto", "cpu") else set())
    return [f"{name}: it has no effect, as {why}" for name in sorted(wrong)]


def said(config: Strict, given: Collection[str]) -> list[str]:
    """Lines about settings in `given` that do nothing beside the others."""
    idle = {name: why for names, why in _idle(config) for name in _changed(config, names & set(given))}
    return [f"{name} has no effect {why}" for name, why in sorted(idle.items())]


def _idle(config: Strict) -> Iterator[tuple[set[str], str]]:
    if isinstance(config, Embed) and config.vectors:
        yield {"batch_size", "workers", *({} if config.model else {"precision", "device", "max_tokens"})}, "on vectors that are taken over"
    elif isinstance(config, Stage) and not isinstance(config, Train | Embed):
        yield {"precision"} | ({"device"} if config.device not in ("auto", "cpu") else set()), "in a stage that does not train"
    if isinstance(config, InitConfig) and config.tokenizer != "train":
        yield {"data", "columns", "vocab_size"}, "with a tokenizer that is there"
    if isinstance(config, Data) and config.val:
        yield {"val_fraction"}, "with validation data of its own"
    if isinstance(config, Data) and not config.data.startswith("stream:"):
        yield {"shuffle_buffer"}, "unless data is a stream"
    if isinstance(config, PretrainingSettings) and config.losses and "box" not in config.losses:
        yield {"region_probability", "regions_per_image"}, "without box among the losses"
    if isinstance(config, PretrainingSettings) and config.losses and "mlm" not in config.losses:
        yield {"mask_probability", "max_masks"}, "without mlm among the losses"
    if isinstance(config, PretrainingSettings) and config.losses and "lm" not in config.losses:
        yield {"label_smoothing"}, "without lm among the losses"
    if isinstance(config, Contrasting) and config.momentum == 0:
        yield {"queue", "queue_start", "alpha", "alpha_warmup", "contrast_over"}, "with momentum 0"
    if isinstance(config, EmbeddingSettings) and isinstance(config, DimeFm) and not compares_sentences(config):
        names = {name for name in EmbeddingSettings.model_fields if name.startswith("sentence")}
        yield names, "on what is learnt, as no term with a weight compares sentences"
    if isinstance(config, Taught) and not config.taught:
        of_the_method = {name for tasks in METHODS.values() for kind in tasks.values() for name in kind.model_fields}
        yield {"distillation", "decoder_init"} | (of_the_method - Learning.model_fields.keys() - {"quirks"}), "without a teacher"
    if isinstance(config, Prune) and config.to is not None:
        yield {"sparsity"}, "beside to"
    inherited = (
        isinstance(config, Prune) and config.from_gates and "budget" not in config.model_fields_set
    )  # from the run that is cut again
    if isinstance(config, Prune) and config.budget == "parameters" and not inherited:
        yield {"text_length"}, "with budget parameters"
    if isinstance(config, Prune) and config.budget != "latency" and not inherited:
        yield {"table", "requests"}, f"with budget {config.budget}"
    elif isinstance(config, Prune) and config.table:
        yield {"text_length", "requests"}, "beside table"
    if isinstance(config, Prune) and config.task != "none" and not config.from_gates:
        if config.method != "l0":
            yield OF_THE_GATES, f"with method {config.method}"
        if config.method != "taylor":
            yield {"calibration_batches"}, f"with method {config.method}"
    if isinstance(config, Train) and config.eval_limit == 0:
        yield {"eval_batch_size"}, "with eval_limit 0"
    if isinstance(config, VQAEval) and config.mode == "generate":
        yield {"answers", "rank_top", "first_token_twice", "rank_smoothing"}, "with mode generate"
    if isinstance(config, CaptioningSettings) and config.self_critical:
        yield {"label_smoothing", "smoothing", "captions_per_image"}, "with self_critical"
    elif isinstance(config, CaptioningSettings):
        yield {"samples", "baseline"}, "without self_critical"
    if isinstance(config, Bench) and not config.table:
        yield {"round_to"}, "without table"
    if isinstance(config, Export) and config.format != "onnx":
        yield {"fuse", "tolerance", "rounds", "batch_sizes", "text_length", "batch_size"}, f"with format {config.format}"


def _changed(config: Strict, names: set[str]) -> set[str]:
    """Those of `names` that the stage knows and that are not left at their default."""
    fields = type(config).model_fields
    usual = {name: fields[name].get_default(call_default_factory=True, validated_data={}) for name in names & fields.keys()}
    return {name for name, value in usual.items() if getattr(config, name) != value}
