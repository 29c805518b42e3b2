"""Settings from a file, JSON or YAML by its ending; YAML needs PyYAML, an optional package."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_settings(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping that a .json, .yaml or .yml file holds.

    Raises:
        ModuleNotFoundError: a YAML file, and PyYAML is not installed.
        ValueError: another ending, a file that does not parse, or that holds no mapping.
    """
    path = Path(path)
    if path.suffix == ".json":
        parse, broken = json.loads, json.JSONDecodeError
    elif path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{path} is YAML, which needs PyYAML: pip install pyyaml, or write JSON",
                name="yaml",
            ) from None
        parse, broken = yaml.safe_load, yaml.YAMLError
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .json, .yaml or .yml")
    try:
        settings = parse(path.read_text(encoding="utf-8"))
    except (broken, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} does not parse: {error}") from None
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path} holds {type(settings).__name__}, expected a mapping of names")
    return settings
