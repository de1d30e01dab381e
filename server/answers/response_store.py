"""Responses that can be asked for again and continued: in memory, bounded, gone with the process."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from server.wire.response_items import KeptItem
from server.wire.response_objects import ResponseObject

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredResponse:
    """A response with what led to it.

    Attributes:
        response: as it was sent, JSON.
        own_input: the items of its own request, a JSON list.
        item_ids: of its own request's and its answer's items.
        previous: the response that it continues; kept with it, even where that one is deleted or forgotten.
        owner: the name of the key that made it; no other one finds it.
        num_bytes: of all JSON that it keeps in memory, the previous responses' included.
    """

    id: str
    response: bytes
    own_input: bytes
    item_ids: tuple[str, ...]
    previous: StoredResponse | None
    num_bytes: int
    owner: str = ""

    @classmethod
    def of(
        cls,
        response: ResponseObject,
        own_input: Sequence[KeptItem],
        previous: StoredResponse | None,
        owner: str = "",
    ) -> StoredResponse:
        """A finished response, its request's items, and the response that it continues."""
        sent = response.to_json().encode()
        items = json.dumps(own_input, ensure_ascii=False).encode()
        ids = (*(item["id"] for item in own_input), *(item.id for item in response.output))
        num_bytes = len(sent) + len(items) + (0 if previous is None else previous.num_bytes)
        return cls(response.id, sent, items, ids, previous, num_bytes, owner)

    def input_items(self) -> list[KeptItem]:
        """All that the model was given, oldest first: the previous responses' input and output, then the request's items."""
        before = [] if self.previous is None else self.previous.items()
        return before + json.loads(self.own_input)

    def items(self) -> list[KeptItem]:
        """The whole conversation, oldest first, with this response's output."""
        chain = [self]
        while chain[-1].previous is not None:
            chain.append(chain[-1].previous)
        return [item for link in reversed(chain) for item in link.own_items()]

    def own_items(self) -> Iterator[KeptItem]:
        """What its own request and answer added."""
        yield from json.loads(self.own_input)
        yield from json.loads(self.response)["output"]


class ResponseStore:
    """The responses used last, as many as fit into both bounds. For the event loop's thread only."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_bytes: int | None = None) -> None:
        """`max_bytes`: of JSON text; None = `MAX_BYTES`, 0 = nothing is kept."""
        self._max_responses = max_responses
        self._max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()  # least recently used first
        self._items: dict[str, str] = {}  # item id → id of the response that added it
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def num_items(self) -> int:
        """Items that can be referred to."""
        return len(self._items)

    def put(self, stored: StoredResponse) -> None:
        """Keep it, and forget others to make room. One that is larger than the whole store is not kept."""
        if stored.num_bytes > self._max_bytes:
            return
        self._responses[stored.id] = stored
        self.num_bytes += stored.num_bytes
        for item_id in stored.item_ids:
            self._items[item_id] = stored.id
        while len(self._responses) > self._max_responses or self.num_bytes > self._max_bytes:
            self.delete(next(iter(self._responses)))

    def get(self, response_id: str, owner: str = "") -> StoredResponse | None:
        """The owner's response, which now counts as used last; None where there is none."""
        stored = self._responses.get(response_id)
        if stored is None or stored.owner != owner:
            return None
        self._responses.move_to_end(response_id)
        return stored

    def delete(self, response_id: str) -> bool:
        """Whether there was one. Its items can no longer be referred to."""
        stored = self._responses.pop(response_id, None)
        if stored is None:
            return False
        self.num_bytes -= stored.num_bytes
        for item_id in stored.item_ids:
            if self._items.get(item_id) == response_id:
                del self._items[item_id]
        return True

    def item(self, item_id: str, owner: str = "") -> KeptItem | None:
        """An item of one of the owner's stored responses, of its own request or answer."""
        stored = self.get(self._items.get(item_id, ""), owner)
        if stored is None:
            return None
        return next(item for item in stored.own_items() if item["id"] == item_id)
