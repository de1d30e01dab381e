"""Logs: one line a request, key=value, without a word of any prompt or answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("finesteer")


def configure_logging(level: str) -> None:
    """Send the server's logs, and uvicorn's warnings, to stderr. Called by the command line, never on import."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s %(message)s", force=True)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "sse_starlette"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING if level == "info" else level.upper())


def log_request(fields: Mapping[str, Any]) -> None:
    """One line for one request; fields that are None are left out."""
    logger.info(" ".join(f"{key}={_shown(value)}" for key, value in fields.items() if value is not None))


def _shown(value: Any) -> str:
    """Numbers short, words as they are, anything with a blank or a quote as JSON: one line whatever a client sends."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)
