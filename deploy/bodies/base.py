"""The base of all request bodies."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    """Fields that may be ignored in silence, since the answer is the same without them."""

    _unknown: tuple[str, ...] = PrivateAttr(())

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the fields that the client has sent and that are ignored."""
        return self._unknown

    def compared_with(self, data: dict[str, Any]) -> Self:
        """The body itself, which knows now what of `data`, from which it was made, it has ignored."""
        self._unknown = tuple(sorted(data.keys() - _known(type(self))))
        return self

    @classmethod
    def known(cls) -> frozenset[str]:
        """The fields that are read, that are refused, and that are ignored for a reason."""
        aliases = (field.alias for field in cls.model_fields.values() if field.alias is not None)
        return frozenset({*cls.model_fields, *aliases, *getattr(cls, "UNSUPPORTED", {}), *cls.HARMLESS})

    @classmethod
    def packed(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`data` with its lists of token ids checked and packed. Raises RequestError."""
        return data


@functools.cache
def _known(kind: type[Body]) -> frozenset[str]:
    return kind.known()
