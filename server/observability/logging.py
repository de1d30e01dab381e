"""Logs: one line a request, key=value or JSON, without a word of any prompt or answer unless asked."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

LogFormat = Literal["human", "json"]
logger = logging.getLogger("finesteer")


def configure_logging(level: str, log_format: LogFormat = "human") -> None:
    """Send the server's logs, and uvicorn's warnings, to stderr. Called by the command line, never on import."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s %(message)s", force=True)
    if log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())
        logging.captureWarnings(True)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "sse_starlette"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING if level == "info" else level.upper())


def log_request(fields: Mapping[str, Any]) -> None:
    """One line for one request; fields that are None are left out."""
    log_fields("request", fields)


def log_fields(message: str, fields: Mapping[str, Any]) -> None:
    """One line of fields. `message` names it where the format is JSON; fields that are None are left out."""
    shown = {key: value for key, value in fields.items() if value is not None}
    if logger.isEnabledFor(logging.INFO):
        line = " ".join(f"{key}={_shown(value)}" for key, value in shown.items())
        logger.info("%s", line, extra={"json": {"message": message} | shown})


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, and the fields of `log_fields` or a traceback. ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        content: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        content |= getattr(record, "json", None) or {"message": record.getMessage()}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            content["stack"] = self.formatStack(record.stack_info)
        return json.dumps(content, default=str)


def _shown(value: Any) -> str:
    """Numbers short, words as they are, anything with a blank or a quote as JSON: one line whatever a client sends."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ",".join(value) if isinstance(value, list) else str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)
