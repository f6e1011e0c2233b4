"""Addresses of data: what opens them is used, and never written down; a renewed token is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_stage
from test_data_files import jsonl, pictures

from efficientvlm.errors import BadInput, printable, shorten, without_secrets
from efficientvlm.settings.compose import of, stage_settings
from efficientvlm.settings.stages import STAGES


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://ann:WORD@host/d.tar", "https://***@host/d.tar"),
        ("stream:HTTPS://WORD@host:8080/d.tar?part=2", "stream:HTTPS://***@host:8080/d.tar?part=2"),
        ("https://a:WORD@WORD@host/x", "https://***@host/x"),
        ("s3://KEY:WORD@bucket/d-{000..010}.tar", "s3://***@bucket/d-{000..010}.tar"),
        ("zip://in.csv::https://ann:WORD@host/d.zip", "zip://in.csv::https://***@host/d.zip"),
        ("https://host/d.tar?token=WORD&part=2", "https://host/d.tar?token=***&part=2"),
        ("https://host/d.tar?part=2&access_token=WORD#top", "https://host/d.tar?part=2&access_token=***#top"),
        ("https://host/d.tar?a=1&amp;api-key=WORD", "https://host/d.tar?a=1&amp;api-key=***"),
        ("https://host/d.tar#id_token=WORD", "https://host/d.tar#id_token=***"),
        ("https://host/d.tar?%74oken=WORD", "https://host/d.tar?%74oken=***"),
        (
            "https://b.s3.host/d.tar?X-Amz-Credential=WORD%2Fx&X-Amz-Date=WORD&X-Amz-Signature=WORD&versionId=3",
            "https://b.s3.host/d.tar?X-Amz-Credential=***&X-Amz-Date=***&X-Amz-Signature=***&versionId=3",
        ),
        ("https://host/d.tar?Expires=1&Signature=W~ORD&Key-Pair-Id=K", "https://host/d.tar?Expires=***&Signature=***&Key-Pair-Id=***"),
        ("https://host/d.tar?sv=1&se=WORD&sig=WORD%3D", "https://host/d.tar?sv=1&se=***&sig=***"),
        ("https://host/d.tar?key=WORD&password=WORD", "https://host/d.tar?key=***&password=***"),
        ("403, url='https://host/d.tar?token=WORD', tried", "403, url='https://host/d.tar?token=***', tried"),
        ("Max retries exceeded with url: /d.tar?token=WORD (Caused by", "Max retries exceeded with url: /d.tar?token=*** (Caused by"),
    ],
)
def test_what_opens_an_address_is_left_out(address: str, shown: str) -> None:
    assert without_secrets(address) == shown == without_secrets(shown)
    assert printable(address) == shown and "WORD" not in shorten("x " * 900 + address + " y" * 900)
    error = BadInput(f"data {address}", "x" * 190 + address, address)
    assert "WORD" not in error.what + error.why + error.fix + str(error)


@pytest.mark.parametrize(
    "text",
    [
        "https://host/d.tar?part=2&st=WA&tokenizer=bert&max_tokens=7&author=ann&monkeys=3",
        "github://org:repo@main/d.csv",
        "abfs://container@account.host/d.parquet",
        "hf://datasets/org/name@v1/d.csv",
        "write to ann@host; x = token, key=value, what?",
        "runs/a@b/d.jsonl",
    ],
)
def test_what_says_where_data_lies_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_no_setting_that_names_data_is_dumped_with_what_opens_it() -> None:
    named = [(name, field) for name, stage in STAGES.items() for field in ("data", "val") if field in stage.model_fields]
    assert len(named) >= 10
    for name, field in named:
        required = dict.fromkeys(of(name, {}).lacking({}), "x")
        required |= {"export": {"format": "onnx"}, "embed": {"side": "images"}}.get(name, {"data": "easy-vqa"})
        spec = "" if name == "embed" else "stream:"  # it reads no stream
        config = stage_settings(name, required | {field: f"{spec}https://h/d.tar?token=WORD"})
        assert getattr(config, field).endswith("WORD")
        assert "WORD" not in config.model_dump_json() + str(config.model_dump()) and config.model_dump()[field].endswith("token=***")


def test_a_run_goes_on_with_a_renewed_token_and_writes_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": (tmp_path / path).as_posix(), "caption": f"c{n}"} for n, path in enumerate(pictures(tmp_path, 8))]
    rows[3]["image"] = "none.png"
    file = Path(jsonl(tmp_path / "p.jsonl", rows))
    val = jsonl(tmp_path / "val.jsonl", rows[4:])
    asked: list[str] = []

    def fake(name: str, mode: str) -> Any:
        def open_now() -> Any:
            asked.append(name)
            if "FIRST" in name and len(asked) == 6:  # the fifth pass; one was for the names of the columns
                raise OSError(f"403, url='{name}'")
            return file.open(mode)

        return SimpleNamespace(open=open_now)

    monkeypatch.setattr("fsspec.open", fake)
    out = tmp_path / "out"
    settings: dict[str, Any] = {"out": str(out), "model": "bundled:easy-vqa-pretrained", "val": val, "max_steps": 20, "batch_size": 2}
    settings |= {"shuffle_buffer": 2, "save_every": 1, "max_bad": 5}

    def written() -> str:
        return "".join(path.read_text("utf-8", "replace") for path in out.rglob("*") if path.suffix in (".json", ".jsonl", ".md"))

    with pytest.raises(BadInput, match="cannot be opened") as caught:
        run_stage("pretrain", data="stream:https://ann:FIRST@far/p.jsonl?X-Amz-Signature=FIRST&part=1", **settings)
    assert "FIRST" not in f"{caught.value} {caught.value.fix}" and all(name.count("FIRST") == 2 for name in asked)
    assert (out / "training_state" / "request.json").is_file() and "FIRST" not in written() and "part=1" in written()

    with pytest.raises(BadInput, match="unfinished"):
        run_stage("pretrain", data="stream:https://ann:NEXT@far/p.jsonl?X-Amz-Signature=NEXT&part=2", **settings)
    renewed = "stream:https://ann:NEXT@far/p.jsonl?X-Amz-Signature=NEXT&part=1"
    made = run_stage("pretrain", data=renewed, **settings)
    assert made.data[0].name == made.config["data"] == "stream:https://***@far/p.jsonl?X-Amz-Signature=***&part=1"
    assert json.loads((out / "skipped.jsonl").read_text().splitlines()[0])["sample"].startswith("https://***@far")
    before = len(asked)
    again = run_stage("pretrain", data=renewed.replace("NEXT", "LAST"), **settings)
    assert again.created == made.created and len(asked) > before
    said = capsys.readouterr()
    assert not any(word in written() + said.out + said.err for word in ("FIRST", "NEXT", "LAST"))
