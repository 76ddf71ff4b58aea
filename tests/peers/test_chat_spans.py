"""Spans of answers against transformers' own mask, on the chat templates that TRL ships."""

from pathlib import Path

import pytest

trl = pytest.importorskip("trl")

from benchmarks.chat_spans.study import HERE, study  # noqa: E402

LOCATED = {  # families that the loader reads, and how a conversation's spans may differ from TRL's
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5",
    "gemma", "gemma3", "deepseekv3", "mistral_style",
}  # fmt: skip


def test_spans_are_transformers_mask_or_refused():
    folders = (Path(trl.__file__).parent / "chat_templates", HERE / "templates")
    rows = {row["template"]: row["counts"] for f in folders for row in study(f, 20, only=LOCATED)}
    assert set(rows) == LOCATED
    for name, counts in rows.items():
        assert not counts.get("different") and not counts.get("other text"), (name, counts)
        assert counts.get("refused", 0) <= 10, (name, counts)
