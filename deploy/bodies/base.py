"""The base of all request bodies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def packed(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`data` with its lists of token ids checked and packed. Raises RequestError."""
        return data
