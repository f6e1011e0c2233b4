"""The latency table of a pruning run: given, found beside the gates that are cut again, kept by the run that goes on, or measured now."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import resolve, write_atomic
from efficientvlm.checkpoints.folder import Output, fingerprint, require_complete
from efficientvlm.compression.latency import LatencyTable, check_shapes
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.hardware import machine_of, pick_device
from efficientvlm.runtime.progress import say
from efficientvlm.settings.stages import Bench, Prune
from efficientvlm.stages import bench, latency
from efficientvlm.stages.workspace import Workspace
from efficientvlm.tasks.task import Asked

TABLE = "latency_table.json"


def read_table(spec: str | Path) -> LatencyTable:
    """The table in a result of `evlm bench --table`, in a file of its own, or in a checkpoint that was pruned by it.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    path = resolve(str(spec))
    path = path / TABLE if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"there is no latency table {path}", "", "make one with evlm bench --table --out FILE")
    values = manifest.read_json(path)
    if isinstance(values, dict) and values.get("stage") == "bench":
        values = values.get("table")
    try:
        return LatencyTable.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise BadInput(f"{path} holds no latency table", why, "make one with evlm bench --table --out FILE") from None


def given(config: Prune, workspace: Workspace | None = None) -> LatencyTable | None:
    """The table that `config` names, or that lies beside the gates that are cut again, unless other requests are asked for than there.

    None where none is needed, or one has to be measured; or where it will be, by an earlier stage of what `workspace` knows.

    Raises:
        BadInput: as :func:`read_table`.
    """
    if config.budget != "latency":
        return None
    if workspace and not all(workspace.is_made(spec) for spec in (config.table, config.from_gates) if spec):
        return None
    if config.table:
        return read_table(config.table)
    if not config.from_gates or not (beside := resolve(config.from_gates) / TABLE).is_file():
        return None
    earlier, now = require_complete(config.from_gates).config, config.model_dump(mode="json")
    alike = all(earlier.get(name) == now[name] for name in ("requests", "text_length"))
    return read_table(beside) if alike else None


def settle(config: Prune, loaded: Loaded, output: Output, quiet: bool) -> LatencyTable:
    """The table that this run counts by, kept with its state, so that it goes on with the same one; measured where there is none yet.

    Args:
        loaded: what is pruned, with weights, able to do the task and with its list of answers. It stays as it is.

    Raises:
        BadInput: a table of another network, or of another request.
    """
    kept = output.state_dir / TABLE
    table = read_table(kept) if kept.is_file() else given(config)
    timed = deployed(config, loaded)
    task = asked_of(timed)
    if table is None:
        table = measured(config, timed, task, quiet)
    else:
        check_request(table, timed, task)
    say(f"prune: by a latency table of {table.described()}; {table.whole_ms:.2f} ms the whole, {table.rest_ms:.2f} stay", quiet=quiet)
    differing(table, timed)
    for doubt in table.doubts():
        say(f"WARNING: prune: the latency table is not to be trusted: {doubt}; measure one with more rounds on a quiet machine")
    if not kept.is_file():
        write_atomic(kept, as_json(table))
    return table


def asked_of(loaded: Loaded) -> Asked | None:
    """What a network is asked while it is timed for a budget; None where it is the forward pass."""
    return bench.tabled(loaded, bench.timed_of([loaded]))


def fitting(config: Prune, loaded: Loaded, workspace: Workspace) -> LatencyTable | None:
    """As :func:`given`, for `loaded`, as shapes, able to do the task.

    Raises:
        BadInput: also a table of another network, or of another request.
    """
    table = given(config, workspace)
    if table is not None:
        timed = deployed(config, loaded)
        check_request(table, timed, asked_of(timed))
    return table


def timing_device(config: Prune) -> torch.device:
    """Where layers are timed; :class:`BadInput` if it is not there."""
    try:
        return pick_device(config.requests.device)
    except BadInput as error:
        fix = "leave --set requests.device=... out, or bring a table that was measured there: --table FILE"
        raise BadInput(f"layers cannot be timed: {error.what}", error.why, fix) from None


def reads(config: Prune) -> dict[str, str | None]:
    """Role → the file of a table that is read."""
    return {"table": config.table if config.budget == "latency" else None}


def keep_table(output: Output) -> None:
    """Put the table that a run counted by, if it did, among its final files."""
    kept = output.state_dir / TABLE
    if kept.is_file():
        shutil.copyfile(kept, output.staging / TABLE)


def as_json(table: LatencyTable) -> bytes:
    return (json.dumps(table.model_dump(mode="json"), indent=2, allow_nan=False) + "\n").encode()


def deployed(config: Prune, loaded: Loaded) -> Loaded:
    """`loaded` as what will be written of it says of itself: it was trained for the task of `config`."""
    known = loaded.manifest.model_copy(update={"config": config.model_dump(mode="json")})
    return replace(loaded, manifest=known)


def measured(config: Prune, loaded: Loaded, task: Asked | None, quiet: bool) -> LatencyTable:
    """A table of `loaded`, as `config.requests` says."""
    asked = config.requests
    device = timing_device(config)
    settings = Bench(
        models=[str(loaded.path)],
        batch_sizes=[asked.batch_size],
        text_length=config.text_length,
        table=True,
        round_to=config.round_to,
        **asked.model_dump(exclude={"batch_size"}),
    )
    with latency.threads(asked.threads) as threads:
        machine = {**machine_of(device), "threads": threads}
        say("prune: measuring what layers take of a request; a table that is given with --table is not measured again", quiet=quiet)
        return bench.table_of(loaded, task, settings, machine, fingerprint(loaded.path), quiet)


def check_request(table: LatencyTable, loaded: Loaded, task: Asked | None) -> None:
    """:class:`BadInput` for a table of another network than `loaded`, or of something else than it is asked."""
    check_shapes(loaded.model, table)
    asked = task.timed_as if task else bench.FORWARD
    for what, of_table, own in (("request", table.timed, asked), ("image size", table.image_size, loaded.sizes.image_size)):
        if of_table != own:
            why = f"its {what} is {of_table}; that of the pruned model is {own}"
            raise BadInput("the latency table is of another request", why, "measure one of this network: evlm bench --table")


def differing(table: LatencyTable, loaded: Loaded) -> None:
    """Say where a table is of another number of answers than `loaded` has, or of another machine than this one."""
    answers = len(loaded.config.answers or [])
    if answers != table.answers:
        say(f"WARNING: prune: the latency table is of a choice among {table.answers} answers; the pruned model has {answers}")
    try:
        here = machine_of(pick_device(str(table.machine.get("device"))))
    except BadInput:  # there is no such device here
        here = {}
    told = [name for name in ("device", "name", "instructions", "torch") if name in table.machine]
    if others := [name for name in told if table.machine[name] != here.get(name)]:
        there = ", ".join(f"{name} {table.machine.get(name)}" for name in others)
        say(f"WARNING: prune: the latency table is of another machine ({there}): its milliseconds are those of that one")
