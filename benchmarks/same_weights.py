"""Whether two versions of the code train the same weights, to the bit: a short chain of stages on tiny networks, run by each.

python benchmarks/same_weights.py BEFORE [AFTER] [--processes 2] [--within 1e-5] [--keep FOLDER]

BEFORE and AFTER are commits; without AFTER the files of this checkout as they are now. The chain is that of X-VLM on both tasks with every
quirk and criterion once, BLIP on questions, and a CLIP cut by its weights. Compared are all tensors that the stages write, and what they
measured. The exit code is 4 where something differs by more than `--within`, which is 0 by default. A difference between machines, or
numbers of threads, is none of the code's: both versions run here, on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from published import ROOT

from efficientvlm.errors import BadInput, EvlmError

DATA = "shapes:difficulty=2,size=40"
WIDTHS = {"vision_width": 16, "text_width": 16, "vision_heads": 4, "text_heads": 4, "vision_intermediate": 32, "text_intermediate": 32}
SIZES = {**WIDTHS, "patch_size": 16, "embed_dim": 8, "dropout": 0.1}
BLIP_SIZES = {**SIZES, "vision_layers": 2, "text_layers": 2, "decoder_layers": 2}
TRAIN = {"data": DATA, "max_steps": 6, "batch_size": 4, "log_every": 2, "limit": 40, "eval_limit": 8}
CUT = {"data": DATA, "limit": 40, "eval_limit": 8, "sparsity": 0.6}
LEFT_OUT = {"seconds", "samples_per_s", "data_ms", "teacher_ms", "student_ms", "optimizer_ms"}
DONE = "done"

Settings = dict[str, Any]


def only(weights: Settings, *kept: str) -> Settings:
    """Weights of distillation terms, all 0 but those `kept`."""
    return {name: float(name in kept) for name in weights}


def taps(*names: str) -> Settings:
    return dict.fromkeys(names, 1.0)


# The names of term weights, as they are and as they were called before.
TERMS = taps(
    *(f"{tower}_{kind}" for tower in ("text", "vision", "fusion") for kind in ("hidden", "self_attention")), "fusion_cross_attention"
)
OLD_TERMS = taps(*(f"{tower}_{kind}" for tower in ("text", "image", "fusion") for kind in ("hidden", "attention")), "cross_attention")
DECODER, OLD_DECODER = (taps("decoder_hidden", f"decoder_{kind}", "decoder_cross_attention") for kind in ("self_attention", "attention"))
QUIRKS = ("independent_negatives", "unmasked_padding", "skip_last_hidden")
TASK_QUIRKS = (
    *QUIRKS[1:],
    "mask_offsets",
    "epoch_step",
    "gates_in_main_optimizer",
    "unfrozen_structure",
    "double_sep",
    "first_token_twice",
)


def both(settings: Settings, new: Settings, old: Settings, *groups: str) -> list[Settings]:
    """`settings` with term weights, in the names of today, or else in older ones."""
    return [{**settings, group: weights} for weights in (new, old) for group in ("weights", *groups)]


def xvlm() -> Iterator[tuple[str, str, list[Settings]]]:
    """Stages: name, kind, and the settings in the spellings of different versions, of which the first that is valid is used."""
    yield "init", "init", [{"size": "tiny", "data": DATA, "settings": SIZES}]
    yield "pretrained", "pretrain", [{**TRAIN, "model": "@init"}]
    yield "student", "shrink", [{"model": "@pretrained"}]
    yield "distilled", "distill", [{**TRAIN, "model": "@student", "teacher": "@pretrained"}]
    logits = taps("itm_logits", "mlm_logits", "itc_logits")
    everything = {**TRAIN, "model": "@student", "teacher": "@pretrained", "region_probability": 1.0, "temperature": 2.0}
    everything |= {"scale_by_temperature": True, "quirks": dict.fromkeys(QUIRKS, True)}
    yield "distilled-all", "distill", both(everything, {**logits, **TERMS}, {**logits, **OLD_TERMS})
    cached = {**TRAIN, "model": "@student", "teacher": "@pretrained", "region_probability": 0, "augment": "none", "cache_teacher": True}
    contrast = only({**logits, **TERMS}, "itc_logits"), only({**logits, **OLD_TERMS}, "itc_logits")
    yield "distilled-cached", "distill", both(cached, *contrast)
    for task in ("vqa", "retrieval"):
        teacher = f"{task}-teacher"
        taught = {**TRAIN, "task": task, "teacher": f"@{teacher}"}
        yield teacher, "finetune", [{**TRAIN, "task": task, "model": "@pretrained"}]
        yield f"{task}-pruned", "prune", [{**taught, "model": "@distilled", "sparsity": 0.4}]
        again = {**CUT, "task": task, "from_gates": f"@{task}-pruned"}
        yield f"{task}-recut", "prune", [again, {**again, "model": f"@{task}-pruned"}]
        yield f"{task}-final", "finetune", [{**taught, "model": f"@{task}-pruned", "freeze": []}, {**taught, "model": f"@{task}-pruned"}]
    taught = {**TRAIN, "task": "vqa", "teacher": "@vqa-teacher", "model": "@distilled"}
    yield "vqa-quirks", "prune", [{**taught, "sparsity": 0.4, "quirks": dict.fromkeys(TASK_QUIRKS, True), "allow_blind": True}]
    yield "vqa-taylor", "prune", [{**taught, "sparsity": 0.4, "method": "taylor", "calibration_batches": 2}]
    kept = (
        only({"logits": 1, **TERMS, **DECODER, "text_cross_attention": 1}, "logits"),
        only({"logits": 1, **OLD_TERMS, **OLD_DECODER}, "logits"),
    )
    yield "vqa-cached", "finetune", both({**taught, "augment": "none", "cache_teacher": True}, *kept)
    pairs = {**TRAIN, "task": "retrieval", "teacher": "@retrieval-teacher", "model": "@distilled"}
    matched = {name: value for name, value in logits.items() if name != "mlm_logits"}
    all_terms = {**matched, **TERMS}, {**matched, **OLD_TERMS}
    yield "retrieval-quirks", "finetune", both({**pairs, "quirks": dict.fromkeys(QUIRKS, True)}, *all_terms, "retrieval_weights")


def blip() -> Iterator[tuple[str, str, list[Settings]]]:
    yield "blip", "init", [{"family": "blip", "size": "tiny", "data": DATA, "settings": BLIP_SIZES}]
    yield "blip-teacher", "finetune", [{**TRAIN, "model": "@blip"}]
    yield "blip-student", "shrink", [{"model": "@blip-teacher", "layers": {"decoder": 2}}]
    yield "blip-pruned", "prune", [{**TRAIN, "model": "@blip-student", "teacher": "@blip-teacher", "sparsity": 0.4}]
    again = {**CUT, "from_gates": "@blip-pruned"}
    yield "blip-recut", "prune", [again, {**again, "model": "@blip-pruned"}]
    yield "blip-final", "finetune", [{**TRAIN, "model": "@blip-pruned", "teacher": "@blip-teacher"}]


def clip() -> Iterator[tuple[str, str, list[Settings]]]:
    yield "clip", "import", [{"model": "clip-files"}]
    yield "clip-pruned", "prune", [{"model": "@clip", "task": "none", "method": "magnitude", "sparsity": 0.3}]


CHAINS = {"xvlm": xvlm, "blip": blip, "clip": clip}


def run(out: Path, chains: list[str]) -> None:
    """Run `chains` with the version of the code that is imported, in folder `out`, which holds the files of a CLIP."""
    import torch

    from efficientvlm import recipe
    from efficientvlm.control import Control
    from efficientvlm.stages.run import run_recipe

    torch.set_num_threads(1)
    os.chdir(out)
    for chain in chains:
        stages: list[Settings] = []
        for name, kind, spellings in CHAINS[chain]():
            for number, settings in enumerate(spellings, 1):
                try:
                    trial = [*stages, {"name": name, "stage": kind, **settings}]
                    recipe.validate(recipe.Recipe(name="same", stages=trial), out=".")
                except BadInput:
                    if number == len(spellings):
                        raise
                else:
                    stages = trial
                    break
        run_recipe(recipe.validate(recipe.Recipe(name="same", stages=stages), out="."), Control(quiet=True))


class Version(NamedTuple):
    """A commit, or None for the files of this checkout, and what is to be run of it."""

    commit: str | None
    chains: list[str]
    processes: int


def made_by(version: Version, keep: Path) -> Path:
    """The folder that holds what `version` writes; what a commit wrote once into `keep` is taken from there.

    Raises:
        BadInput: no such commit, or it cannot run the chain.
    """
    commit = version.commit and git("rev-parse", "--verify", "--quiet", f"{version.commit}^{{commit}}")
    out = keep / f"{commit or 'checkout'}-{'-'.join(version.chains)}-{version.processes}"
    if commit and (out / DONE).exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copytree(clip_files(keep), out / "clip-files")
    code = ROOT
    with tempfile.TemporaryDirectory() as folder:
        try:
            if commit:
                code = Path(folder) / "code"
                git("worktree", "add", "--detach", "--quiet", str(code), commit)
            start(code, out, version)
        finally:
            if commit:
                git("worktree", "remove", "--force", str(code))
    (out / DONE).touch()
    return out


def start(code: Path, out: Path, version: Version) -> None:
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [str(Path(__file__).resolve()), "--here", str(out), str(code), "--chains", *version.chains]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(version.processes)] if version.processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, *words], env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        what = f"{version.commit or 'this checkout'} does not run the chain"
        raise BadInput(what, "its error stands above", "see what it refuses; other names of settings belong into this script")


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        why = next(iter(done.stderr.strip().splitlines()), "git says no more")
        raise BadInput(f"git {words[0]} fails", why, f"look at {words[-1]}")
    return done.stdout.strip()


def clip_files(keep: Path) -> Path:
    """A folder of a tiny CLIP as transformers writes it, the same for both versions."""
    folder = keep / "clip-files"
    if not folder.exists():
        sys.path.insert(0, str(ROOT / "tests"))
        from clip_folder import byte_pairs, write_clip

        partial = Path(tempfile.mkdtemp(dir=keep))
        write_clip(partial, byte_pairs())
        partial.rename(folder)
    return folder


def compare(before: Path, after: Path) -> Iterator[tuple[str, float]]:
    """How far each file of tensors, and the metrics of each stage, lie apart; 0 where they are equal, infinity where form differs."""
    names = {
        path.relative_to(root).as_posix()
        for root in (before, after)
        for pattern in ("*/*.safetensors", "*/evlm_manifest.json")
        for path in root.glob(pattern)
    }
    for name in sorted(names - {name for name in names if name.startswith("clip-files/")}):
        ours, theirs = before / name, after / name
        if not (ours.exists() and theirs.exists()):
            yield name, float("inf")
        elif name.endswith(".json"):
            yield name, apart(*(json.loads(path.read_text("utf-8"))["metrics"] for path in (ours, theirs)))
        else:
            yield name, 0.0 if digest(ours) == digest(theirs) else tensors_apart(ours, theirs)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_apart(ours: Path, theirs: Path) -> float:
    from safetensors.torch import load_file

    first, second = load_file(ours), load_file(theirs)
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        return float("inf")
    return max((float((first[name].double() - second[name].double()).abs().max()) for name in first if first[name].numel()), default=0.0)


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference of numbers at the same place; infinity where there is something else."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return float("inf")
        return max((apart(ours[name], theirs[name]) for name in ours.keys() - LEFT_OUT if "_ms" not in name), default=0.0)
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return abs(ours - theirs)
    return 0.0 if ours == theirs else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--processes", type=int, default=1, help="several are launched by torchrun")
    parser.add_argument("--within", type=float, default=0.0, help="the largest difference that passes")
    parser.add_argument("--keep", type=Path, help="a folder in which what a commit wrote is kept for the next time")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.here:
            import efficientvlm

            if Path(efficientvlm.__file__).parent.parent.resolve() != Path(options.here[1]).resolve():
                raise BadInput("other code is run", f"efficientvlm is {efficientvlm.__file__}", "see to PYTHONPATH")
            run(Path(options.here[0]), options.chains)
            return 0
        if not options.before:
            parser.error("a commit to compare with is needed")
        with tempfile.TemporaryDirectory() as folder:
            keep = Path(options.keep or folder).resolve()
            keep.mkdir(parents=True, exist_ok=True)
            made = [made_by(Version(commit, options.chains, options.processes), keep) for commit in (options.before, options.after)]
            found = dict(compare(*made))
    except EvlmError as error:
        print("\n".join(filter(None, (f"error: {error.what}", error.why, error.fix))), file=sys.stderr)
        return error.exit_code
    for name, difference in found.items():
        print(f"{'same' if difference == 0 else f'{difference:.2e}':10}{name}")
    wrong = [name for name, difference in found.items() if not difference <= options.within]
    print(f"{len(found)} files, {sum(value == 0 for value in found.values())} the same, {len(wrong)} beyond {options.within:g}")
    return 4 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
