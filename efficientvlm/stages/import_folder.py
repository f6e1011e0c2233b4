"""import of a Hugging Face folder: any network that a family opens, with its tokenizer, image settings and licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientvlm import families
from efficientvlm.checkpoints.files import MIB, is_hub_id, read_limited, resolve
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import MANIFEST, Manifest
from efficientvlm.control import Control
from efficientvlm.data.preprocessing import FILE, NAMES, unfollowed
from efficientvlm.data.tokenizer import load_tokenizer, require_ids
from efficientvlm.errors import BadInput
from efficientvlm.families.image_settings import preprocessing_of
from efficientvlm.families.loading import image_processor, read_json
from efficientvlm.families.structure import Sizes
from efficientvlm.loaded import shapes
from efficientvlm.runtime.progress import say
from efficientvlm.settings.plain_yaml import parse_yaml
from efficientvlm.settings.stages import ImportConfig
from efficientvlm.stages.common import making, open_output, write
from efficientvlm.stages.workspace import Beginning, Workspace

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md")
COLUMNS = 64  # a head has in nearly all published models
LARGEST_CARD = MIB


def run(config: ImportConfig, control: Control) -> Manifest:
    """Read the folder or hub id `config.model` and write it as a checkpoint.

    Raises:
        BadInput: a folder that is a checkpoint already, holds no network that a family opens, or only pickled weights; a tokenizer of
            another vocabulary; a hub that cannot be reached.
    """
    prepare(config, Workspace(control.quiet))
    path = fetch(config.model)
    output = open_output(config, "import", control, inputs(config, path))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        family, model, tokenizer, adopted = read(config, path)
        settings, licence = settings_of(path, model, model.config.sizes()), licence_of(path)
        heads = heads_of(read_json(path / "config.json"), model.config.sizes())
        say(f"import: heads of a layer: {'; '.join(f'{tower} {text}' for tower, text in heads.items())}", quiet=control.quiet)
        if adopted:
            say(f"import: taken from the tokenizer, against the configuration: {'; '.join(adopted)}", quiet=control.quiet)
        if settings is None:
            say("import: the folder has no image processor; images are taken as resized to a square", quiet=control.quiet)
        elif ignored := unfollowed(settings):
            say(f"import: not followed in {FILE}, as transformers does not either: {', '.join(ignored)}", quiet=control.quiet)
        say(f"import: licence {licence or 'not stated in a model card'}", quiet=control.quiet)
        extra = {"source": config.model, "revision": revision(path), "licence": licence, "heads": heads, "token_ids": adopted}
        return write(output, family, model, tokenizer, control=control, image_processor=settings, origin="imported", extra=extra)


def prepare(config: ImportConfig, workspace: Workspace) -> Beginning:
    """What is imported; :class:`BadInput` as :func:`run`. Weights are not fetched."""
    path = fetch(config.model, weights=False)
    family, model, tokenizer, _ = read(config, path, weights=False)
    settings = settings_of(path, model, model.config.sizes())
    return Beginning(lambda: (family, model, tokenizer, []), settings, inputs=inputs(config, path))


def is_folder(spec: str) -> bool:
    """Whether `import` takes `spec` as a folder or hub id rather than as a published file; :class:`BadInput` if it is nothing."""
    return is_hub_id(spec) or resolve(spec).is_dir()


def inputs(config: ImportConfig, path: Path) -> dict[str, str | None]:
    """Role → what is read, for the output's manifest."""
    return {"model": str(path), "tokenizer": config.tokenizer}


def read(config: ImportConfig, path: Path, *, weights: bool = True) -> tuple[Any, Any, Any, list[str]]:
    """Family, model and tokenizer of the folder, and the token ids that are the tokenizer's, against its configuration.

    Without `weights` the model is on the meta device.

    Raises:
        BadInput: as :func:`run`.
    """
    _check(config, path, weights or not is_hub_id(config.model))
    family = families.of_folder(path)
    model = family.load(path) if weights else shapes(family, family.read_config(path))
    folder = resolve(config.tokenizer) if config.tokenizer else path
    tokenizer = load_tokenizer(folder)
    require_ids(tokenizer, model.config.sizes().vocab_size, folder)
    return family, model, tokenizer, model.config.adopt(tokenizer)


def settings_of(path: Path, model: Any, sizes: Sizes) -> dict[str, Any] | None:
    """The image settings of the folder, which say whose they are; :class:`BadInput` if they cannot be followed."""
    settings = image_processor(path)
    kind: str = model.config.processor
    preprocessing_of(settings, sizes, path, kind)
    return settings if settings is None or any(settings.get(name) for name in NAMES) else {"image_processor_type": kind, **settings}


def fetch(name: str, *, weights: bool = True) -> Path:
    """The folder `name`, or else the cached snapshot of the repository `owner/name` of the Hugging Face hub.

    Raises:
        BadInput: it is neither, or the hub cannot be reached.
    """
    if not is_hub_id(name):
        return resolve(name)
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in WANTED if weights or "safetensors" not in pattern]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # noqa: BLE001  the library and its network raise what they like
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "check the name and the connection, or download the repository and give its folder"
        raise BadInput(f"cannot fetch {name} from the hub", why[:200], fix) from None


def _check(config: ImportConfig, path: Path, weights: bool) -> None:
    if (path / MANIFEST).is_file():
        raise BadInput(f"{path} is a checkpoint already", f"it holds {MANIFEST}", "use it as --model of the next stage")
    if config.settings or config.layout != "auto":
        raise BadInput(
            "settings and --layout are for published X-VLM files", f"{path} is a folder, whose config.json says it all", "leave them out"
        )
    if weights and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        why = "pickled weights are not opened"
        raise BadInput(f"{path} has no safetensors", why, "save the model as safetensors with transformers' save_pretrained")


def heads_of(values: Mapping[str, Any], sizes: Sizes) -> dict[str, str]:
    """Tower → its heads, their width, and where the number comes from: tensors do not show it, and published files have been wrong."""
    found = {}
    for tower in (tower for tower, layers in sizes.heads.items() if layers):
        part = tower if f"{tower}_config" in values else "text"
        said = any("num_attention_heads" in (values.get(name) or {}) for name in (f"{part}_config", f"{part}_config_dict"))
        said = said or f"{'vision' if tower == 'vision' else 'text'}_heads" in values
        columns = {heads: width // heads for width, heads in zip(sizes.widths[tower], sizes.heads[tower], strict=False)}
        source = "config.json" if said else "not in config.json, transformers' default"
        doubt = "" if {*columns.values()} == {COLUMNS} else f", where {COLUMNS} are usual: check it" if not said else ""
        found[tower] = f"{', '.join(f'{heads} of {width}' for heads, width in columns.items())} columns ({source}{doubt})"
    return found


def licence_of(path: Path) -> str | None:
    """The licence that the head of the folder's model card names."""
    try:
        text = read_limited(path / "README.md", LARGEST_CARD, "a model card").decode()
        header = parse_yaml(text.split("---")[1], "the model card", "correct its head") if text.startswith("---") else {}
    except (BadInput, OSError, ValueError, IndexError):
        return None
    named = header.get("license_name") or header.get("license") if isinstance(header, dict) else None
    return str(named) if named else None


def revision(path: Path) -> str | None:
    """The commit of a snapshot in the cache of the hub."""
    return path.name if path.parent.name == "snapshots" else None
