"""Finds out how the served model writes reasoning and tool calls."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.parsing.formats import AnswerForm, chosen_form, loaded
from elastic_moe.deploy.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def answer_form(tokenizer: Tokenizer, model_dir: str, config: ServeConfig) -> AnswerForm:
    """The form of the checkpoint's answers. Raises ConfigError for an unknown name of a parser."""
    form = chosen_form(
        tokenizer.all_templates,
        model_type=_model_type(model_dir),
        own=_usable(tokenizer.response_template),
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    if form.own is not None:
        logger.info("reasoning and tool calls are parsed by the checkpoint's own response template")
    elif form.has_tools or form.has_reasoning:
        names = [family.name if family is not None else "none" for family in (form.tools, form.reasoning)]
        logger.info("tool calls are parsed in the form %s, and reasoning in the form %s", *names)
    return form


def check_parsers(config: ServeConfig) -> None:
    """Raises ConfigError for an unknown name of a parser."""
    chosen_form("", tool_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser)


def _usable(template: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    try:
        loaded(template)
    except Exception as error:  # noqa: BLE001 - what a stranger's template makes of transformers' checks
        logger.warning("the checkpoint's response template is not used, because it cannot be read: %s", error)
        return None
    return template


def _model_type(model_dir: str) -> str | None:
    try:
        data = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = data.get("model_type") if isinstance(data, dict) else None
    return kind if isinstance(kind, str) else None
