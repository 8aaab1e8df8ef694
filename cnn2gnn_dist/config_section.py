"""What every section of the config has in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

PATH: JsonDict = {"path": True}
"""Marks fields that hold paths: settings.py makes them absolute."""


class Section(BaseModel):
    """A group of fields; unknown keys, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    moved: ClassVar[dict[str, str]] = {}
    """Fields that used to be in this section: their former name → where they are now. Both are accepted
    (settings.py); keys of stages use the former name (pipeline/keys.py)."""
