"""Exact-match scorers of final answers: GSM8K's number, MATH's \\boxed{}, and plain text."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_UNITS = re.compile(r"(?<=[\d}])\s*\\(?:text|mbox|mathrm)\{[^{}]*\}\s*$")


def last_number(text: str) -> str | None:
    """The number after the last "####", or else the last number of the text, without commas and currency; None: there is none.

    Source: GSM8K's own answer format, and the usual reading of free answers (lm-eval's `flexible-extract`).
    """
    marked = text.rsplit("####", 1)[-1] if "####" in text else text
    found = _NUMBER.findall(marked) or _NUMBER.findall(text)
    if not found:
        return None
    number = (found[0] if "####" in text else found[-1]).replace(",", "").replace("$", "")
    try:
        return format(Decimal(number).normalize(), "f")
    except InvalidOperation:
        return None


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} (or \\fbox{…}), braces balanced; None: there is none."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[match.end() : i]
    short = re.findall(r"\\boxed\s+([^\s${}]+)", text)
    return short[-1] if short else None


def normalise_math(text: str) -> str:
    """An answer without what does not change its value: spaces, \\left, \\right, \\!, dollar signs, units, "x =", \\dfrac.

    Source: MATH's `is_equiv` normalisation. Deviation: plain numbers are compared as numbers, "0.50" as "0.5".
    """
    text = text.strip().strip("$").strip().rstrip(".")
    text = re.sub(r"\\(?:left|right|!|,|;|:|quad|displaystyle)(?![a-zA-Z])", "", text)
    text = text.replace("\\$", "").replace("\\%", "").replace("%", "").replace("^{\\circ}", "").replace("^\\circ", "")
    text = text.replace("dfrac", "frac").replace("tfrac", "frac")
    text = _UNITS.sub("", text)
    text = re.sub(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text.strip())
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text.replace(" ", ""))
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    try:
        return format(Decimal(text).normalize(), "f")
    except InvalidOperation:
        return text


def gsm8k(text: str, answer: str) -> bool:
    """Whether the answer's last number is the reference's."""
    found = last_number(text)
    return found is not None and found == last_number(answer)


def math(text: str, answer: str) -> bool:
    """Whether the last \\boxed{} holds the reference (itself boxed or bare)."""
    found, wanted = boxed(text), boxed(answer)
    return found is not None and normalise_math(found) == normalise_math(answer if wanted is None else wanted)


def text_match(text: str, answer: str) -> bool:
    """Whether answer and reference are the same words, whatever case and punctuation."""
    return re.findall(r"\w+", text.lower()) == re.findall(r"\w+", answer.lower())


SCORERS: dict[str, Callable[[str, str], bool]] = {"gsm8k": gsm8k, "math": math, "text": text_match}
