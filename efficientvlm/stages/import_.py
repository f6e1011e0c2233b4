"""import: a published X-VLM, EfficientVLM or BLIP file, or a Hugging Face folder, becomes a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from efficientvlm import families
from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.control import Control
from efficientvlm.data.tokenizer import load_tokenizer, with_special
from efficientvlm.errors import BadInput
from efficientvlm.families.network import ABILITIES
from efficientvlm.families.published import Report, read_published
from efficientvlm.loaded import shapes
from efficientvlm.runtime.progress import say
from efficientvlm.settings.stages import ImportConfig
from efficientvlm.stages import import_folder
from efficientvlm.stages.common import making, open_output, write
from efficientvlm.stages.workspace import Beginning, Workspace, inputs_of


def run(config: ImportConfig, control: Control) -> Manifest:
    """Read a published file, account for each of its entries, and write it with its tokenizer; or read a folder or hub id.

    What names and shapes show to be wrong is refused before the output is claimed, and before any value is read.

    Raises:
        BadInput: a file or tokenizer that cannot be used (see :func:`read_published`), or that do not belong together; a folder as in
            :func:`import_folder.run`.
    """
    if import_folder.is_folder(config.model):
        return import_folder.run(config, control)
    beginning = prepare(config, Workspace(control.quiet))
    beginning.shapes()
    output = open_output(config, "import", control, inputs_of(beginning))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        tokenizer, values, state, report = read(config)
        able = sorted(values.abilities())
        _tell(report, able, control)
        family = families.get(report.family)
        model = shapes(family, values)
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights()
        extra = {"layout": report.layout, "tensors": report.mapped, "ignored": report.ignored, "assumed": report.assumed}
        extra |= {"added_tokens": report.added} if report.added else {}
        return write(output, family, model, tokenizer, control=control, origin="imported", extra=extra)


def prepare(config: ImportConfig, workspace: Workspace) -> Beginning:
    """What is imported; a published file is not looked at before its shapes are asked for."""
    if import_folder.is_folder(config.model):
        return import_folder.prepare(config, workspace)
    if not config.tokenizer:
        raise BadInput(f"{config.model} comes without a tokenizer", "published files hold weights only", "give its folder: --tokenizer DIR")

    def network() -> tuple[Any, Any, Any, list[str]]:
        tokenizer, values, _, report = read(config, weights=False)
        remark = f"{report.layout} layout, {report.mapped} tensors; values are not looked at before the import"
        family = families.get(report.family)
        return family, shapes(family, values), tokenizer, [remark]

    return Beginning(network, inputs={"model": config.model, "tokenizer": config.tokenizer})


def read(config: ImportConfig, *, weights: bool = True) -> tuple[Any, Any, dict[str, Any], Report]:
    """Tokenizer, configuration, state and account of a published file; without `weights` only the shapes of the state are read.

    Raises:
        BadInput: as :func:`run`.
    """
    tokenizer = load_tokenizer(resolve(str(config.tokenizer)), bert=True)
    path = resolve(config.model)
    added: list[str] = []

    def vocabulary(found: Any, report: Report) -> dict[str, int]:
        embedded, family = found.sizes().vocab_size, families.get(report.family)
        absent = [token for token in family.extra_tokens if token not in tokenizer.get_vocab()]
        if len(tokenizer) + len(absent) == embedded:
            added.extend(absent)
            with_special(tokenizer, absent)
        if len(tokenizer) != embedded:
            why = f"{path} embeds {embedded}: they are not of one vocabulary"
            raise BadInput(f"the tokenizer has {len(tokenizer)} tokens", why, "give the tokenizer the model was trained with")
        if missing := [token for token in absent if token not in added]:
            raise BadInput(f"the tokenizer has no {missing[0]}", f"{path} is of a {family.name}, which needs it", "give its own tokenizer")
        return dict(tokenizer.get_vocab())

    values, state, report = read_published(path, config.layout, config.settings, vocabulary=vocabulary, values=weights)
    report.added = added
    return tokenizer, values, state, report


def _tell(report: Report, able: Sequence[str], control: Control) -> None:
    can = ", ".join(ABILITIES[name][0] for name in able)
    say(f"import: {report.layout} layout, {report.mapped} tensors; it can {can}", quiet=control.quiet)
    if report.added:
        say(f"import: added to the tokenizer, as published: {', '.join(report.added)}", quiet=control.quiet)
    for remark in report.remarks:
        say(f"import: {remark}", quiet=control.quiet)
    for reason, names in report.ignored.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        say(f"import: ignored {shown} ({reason})", quiet=control.quiet)
    if report.assumed:
        guesses = ", ".join(f"{name}={value}" for name, value in report.assumed.items())
        say(f"import: the file does not say, so taken: {guesses} (change with --set settings.NAME=VALUE)", quiet=control.quiet)
