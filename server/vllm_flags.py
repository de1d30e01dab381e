"""vLLM's own flags on this server's command line: `--vllm.NAME`, gathered before anything else reads it."""

from __future__ import annotations

from collections.abc import Sequence

PREFIX = "--vllm."
FLAG_OPTION = "--vllm-flag"  # what each gathered word becomes a value of


def gather(arguments: Sequence[str]) -> list[str]:
    """The arguments with each `--vllm.NAME`, and the values behind it, as values of `FLAG_OPTION`.

    Its values are the words that follow up to the next that begins with two dashes, as vLLM's own command line takes them.
    """
    gathered: list[str] = []
    within = False
    for word in arguments:
        if word.startswith(PREFIX):
            within = True
            gathered.append(f"{FLAG_OPTION}=--{word.removeprefix(PREFIX)}")
        elif within and not word.startswith("--"):
            gathered.append(f"{FLAG_OPTION}={word}")
        else:
            within = False
            gathered.append(word)
    return gathered
