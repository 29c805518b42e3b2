"""Configs from plain values and files: what they take, and what they say otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import placekern as pk

SETTINGS = {
    "bits": 5,
    "threshold": 0.01,
    "group_size": 16,
    "layers": {"0": {"bits": 4}, "head.*": None, "Conv2d": {"sparsity": 0.5}},
}


def test_a_config_from_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SETTINGS))
    assert pk.CompressConfig.from_file(path) == pk.CompressConfig(**SETTINGS)


def test_a_config_from_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(SETTINGS))
    assert pk.CompressConfig.from_file(path) == pk.CompressConfig(**SETTINGS)
    for text, message in (
        ("layers: {0: {bits: 4}}", "layers has the key 0, expected a name; in YAML, put it in q"),
        ("threshold: 1e-3", "threshold is '1e-3', expected a number.*write 1.0e-3"),
        ("bits: [", "config.yml does not parse"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            pk.CompressConfig.from_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "config.json holds list, expected a mapping of names"),
        (b'{"bits": 9}', "bits is 9, expected an integer from 1 to 8"),
        (b'{"bit": 4}', "config has the unknown key 'bit', expected one of bits"),
        (b"{", "config.json does not parse"),
        (b'{"layers": "\xe9"}', "config.json does not parse"),
        (b"[" * 100_000, "config.json does not parse"),
    ],
)
def test_bad_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pk.CompressConfig.from_file(path)


def test_config_of() -> None:
    config = pk.CompressConfig(bits=3)
    assert pk.CompressConfig.of(config) is config
    assert pk.CompressConfig.of({"bits": 3}) == config
    assert pk.CompressConfig.of(None) == pk.CompressConfig()
    with pytest.raises(ValueError, match="config is 5, expected a mapping"):
        pk.CompressConfig.of(5)  # type: ignore[arg-type]


def test_names_of_layers_are_checked() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "head": nn.Linear(2, 2), "act": nn.ReLU()})
    for names in (["a[0]"], ["head"], ["he*"], ["Conv2d"], ["Linear", "a*"]):
        pk.CompressConfig(layers=dict.fromkeys(names)).check_names(model)
    for name in ("b", "act", "Heads"):
        with pytest.raises(ValueError, match="fits no layer of the model; check its spelling"):
            pk.CompressConfig(layers={"head": None, name: None}).check_names(model)
