"""The code that runs on a GPU, as far as a CPU can run it: paged attention's arguments, and decode passes with fixed buffers.

The kernel and the recorder are replaced by plain ones that keep their contracts; everything around them is the real thing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.engine.native import attention, cuda_graph
from steering.decision import ProfileActivation
from tests.engine import answers, asked, tiny_core
from tests.tiny import tiny_model, tiny_profile

PROMPTS = [[(7 * i * j + 3) % 300 for j in range(20 + 23 * i)] for i in range(1, 6)]
OPEN = ProfileActivation("p", 3.0, gate="open")


def attend_pages(query, keys, values, starts, longest_query, lengths, table, *, scaling, sliding_window):
    """What the flash kernel computes, sequence by sequence, from the same arguments."""
    parts = []
    for i, length in enumerate(lengths.tolist()):
        mine = query[int(starts[i]) : int(starts[i + 1])]
        assert len(mine) <= longest_query
        k, v = (pool[table[i].long()].flatten(0, 1)[:length] for pool in (keys, values))
        group = query.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        last = torch.arange(length - len(mine), length)[:, None]
        mask = torch.arange(length) <= last
        if sliding_window is not None:
            mask &= torch.arange(length) > last - sliding_window
        out = F.scaled_dot_product_attention(mine.transpose(0, 1), k, v, attn_mask=mask, scale=scaling)
        parts.append(out.transpose(0, 1))
    rows = torch.cat(parts)
    return torch.cat([rows, rows.new_zeros(len(query) - len(rows), *rows.shape[1:])])


class Replayed:
    """Runs the recorded body again on whatever the buffers hold, and leaves the result in the same place."""

    def __init__(self, body):
        self._body, self.result = body, body()

    def replay(self):
        self.result.copy_(self._body())

    def pool(self):
        return None


def capture(body, pool):
    graph = Replayed(body)
    return graph, graph.result


def requests():
    kinds = [(OPEN,), (), (ProfileActivation("p", 2.0, gate="open", positions="last"),), (OPEN,), ()]
    return [asked(str(i), p, *kinds[i], max_tokens=3 + 2 * i) for i, p in enumerate(PROMPTS)]


def same(found, wanted):
    for name, answer in wanted.items():
        assert found[name].tokens() == answer.tokens()
        assert torch.allclose(torch.tensor(found[name].logprobs()), torch.tensor(answer.logprobs()), atol=1e-4)


def cores(family, monkeypatch):
    """One that reads pages by the kernel's arguments, and one that reads rows."""
    monkeypatch.setattr(attention, "attend_pages", attend_pages)
    profile = tiny_profile(tiny_model(family), 1, name="p", strength=3.0)
    paged, rows = (
        tiny_core([profile], family, paged=p, max_batched_tokens=48, max_model_len=192) for p in (True, False)
    )
    paged.runner.cache.flash = True
    return paged, rows


def test_the_paged_kernels_arguments_say_what_rows_say(monkeypatch):
    for family in ("llama", "mistral"):  # full attention, and a window
        paged, rows = cores(family, monkeypatch)
        same(answers(paged, requests()), answers(rows, requests()))


def test_a_decode_pass_on_fixed_buffers_steers_whoever_is_steered_now(monkeypatch):
    paged, rows = cores("llama", monkeypatch)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    with torch.inference_mode():
        paged.runner.record_graphs()
    for _ in range(2):  # other batch sizes, other slots, other doses
        same(answers(paged, requests()), answers(rows, requests()))
        same(answers(paged, requests()[::-1][:3]), answers(rows, requests()[::-1][:3]))


def test_rows_that_fill_a_batch_up_write_to_nobodys_page(monkeypatch):
    paged, _ = cores("llama", monkeypatch)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    with torch.inference_mode():
        paged.runner.record_graphs()
    answers(paged, requests()[:3])  # three rows in a graph of four
    cache = paged.runner.cache
    assert not cache.table[cache.num_slots].any()
    assert sorted(cache._free) == list(range(1, len(cache._free) + 1)), "every page but nobody's is free again"
