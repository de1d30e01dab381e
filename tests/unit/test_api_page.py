"""The API page's tables are the code's, and its errors and paths are those that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.app import MODULES
from server.errors import ApiError
from server.wire.base import Unsupported
from server.wire.chat import ChatCompletionRequest
from server.wire.fields import COMMAND, MODELS, PAGE, page, table

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_tables_are_the_codes():
    assert page(TEXT) == TEXT, f"the request models have changed: run `{COMMAND}` and look at {PAGE.name}'s diff"


def test_every_request_model_has_its_table():
    assert re.findall(r"<!-- fields of (\w+) -->", TEXT) == list(MODELS)


def test_a_changed_field_changes_the_page(monkeypatch):
    changed = dict(ChatCompletionRequest.unsupported) | {"mood": Unsupported("Be calm.", ("calm",))}
    monkeypatch.setattr(ChatCompletionRequest, "unsupported", changed)
    ChatCompletionRequest.model_rebuild(force=True)
    try:
        assert '| `mood` | refused | `"calm"` is let pass. Be calm. |' in page(TEXT)
    finally:
        monkeypatch.undo()
        ChatCompletionRequest.model_rebuild(force=True)
    assert page(TEXT) == TEXT


@pytest.mark.parametrize("model", MODELS.values())
def test_each_field_has_one_row_with_its_status(model):
    rows = dict(re.findall(r"^\| `(\w+)` \| (done|no-op|refused) \| .+ \|$", table(model), re.M))
    assert set(rows) == set(model.model_fields) | set(model.unsupported)
    assert {name for name, status in rows.items() if status == "refused"} == set(model.unsupported)
    assert {name for name, status in rows.items() if status == "no-op"} == model.no_ops
    assert len(rows) == table(model).count("\n") - 1


def test_what_a_client_may_send_and_we_do_not_use_is_said():
    assert ChatCompletionRequest.no_ops == {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}


def test_every_error_of_the_server_is_on_the_page():
    classes = [ApiError]
    for kind in classes:
        classes += kind.__subclasses__()
    sources = Path(PAGE).parents[1].glob("**/*.py")
    named = {code for source in sources for code in re.findall(r'code="([a-z_]+)"', source.read_text("utf-8"))}
    codes = named | {kind.code for kind in classes if kind.code is not None and kind.code != "not_found"}
    assert {code for code in codes if f"`{code}`" not in TEXT} == set(), f"to be added under Errors in {PAGE}"


def test_every_path_is_on_the_page():
    paths = {route.path.replace(":path", "") for module in MODULES for route in module.router.routes}
    assert {path for path in paths if f"{path}`" not in TEXT} == set(), f"to be added to {PAGE}"
