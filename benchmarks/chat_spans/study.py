"""Are the assistant's spans those of transformers' own mask? Over real chat templates.

A template that marks its answers with ``{% generation %}`` gives two things: transformers' mask,
and, with the marks taken out, a template as most models ship it. The spans that jaxdistill locates
in the latter must be the mask of the former. TRL ships such templates for many families.

    .venv-peers/bin/python -m benchmarks.chat_spans.study                  # TRL's templates
    .venv-peers/bin/python -m benchmarks.chat_spans.study --templates DIR  # those in a folder
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from jaxdistill.errors import UserError
from jaxdistill.models.chat_template import Span, render
from jaxdistill.train.chat_rows import conversation as parsed
from jaxdistill.train.chat_spans import answer_spans, render_chat

HERE = Path(__file__).parent
TAG = re.compile(r"<[|｜]?[^<>\s'\"{}]{2,60}>|\[/?[A-Z_]{2,}\]")
MARK = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells the {name}.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather_now", "tide_table")
]
ANSWERS = (
    "Yes.",
    "\n\nYes, with a line break at both ends.\n\n",
    "  indented\n  code\n",
    "Grüße aus 北京 🙂",
    "a < b [INST] assistant: model\n",
    "one\n\ntwo <b>bold</b>",
    "4",
)


def tokenizer_of(source: str) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer whose added tokens are the tags that a template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tags = sorted(tag for tag in set(TAG.findall(source)) if tag not in ("<b>", "</b>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=tags,
        chat_template=source,
    )


class Features(NamedTuple):
    """What a template can write, as far as its text tells."""

    tools: bool
    calls: bool
    reasoning: bool
    system: bool
    opened: bool  # by the assistant


def features_of(source: str) -> Features:
    """Read from a template's text what its conversations may have."""
    return Features(
        tools=re.search(r"\bin tools\b|render_tool|tools \|", source) is not None,
        calls="tool_calls" in source,
        reasoning="reasoning" in source,
        system="System role not supported" not in source,
        opened="must alternate" not in source and "No user query" not in source,
    )


def conversation(rng: random.Random, can: Features) -> dict[str, Any]:
    """Draw a conversation: system or not, several turns, calls, tool answers, thoughts."""
    messages: list[dict[str, Any]] = []
    calls = can.calls and rng.random() < 0.6
    if can.system and rng.random() < 0.4:
        messages.append({"role": "system", "content": "Be brief."})
    if can.opened and rng.random() < 0.1:
        messages.append({"role": "assistant", "content": "Hello, how can I help?"})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": rng.choice(["Is it?", "Why 4?\n", "北京?"])})
        if calls and rng.random() < 0.6:
            call = {"name": rng.choice(TOOLS)["function"]["name"], "arguments": {"city": "Bergen"}}
            content = rng.choice([None, "", "Let me see."])
            turn: dict[str, Any] = {"role": "assistant", "content": content}
            turn["tool_calls"] = [{"id": "abcdefgh1", "type": "function", "function": call}]
            messages.append(turn)
            if rng.random() < 0.9:
                answer = {"role": "tool", "content": rng.choice(["rain", '{"wind": 4}'])}
                messages.append(answer | {"tool_call_id": "abcdefgh1", "name": call["name"]})
            else:
                break
        last: dict[str, Any] = {"role": "assistant", "content": rng.choice(ANSWERS)}
        if can.reasoning and rng.random() < 0.25:
            last["reasoning_content"] = rng.choice(["Hm.", "\nI see.\n"])
        messages.append(last)
    return {"messages": messages} | ({"tools": TOOLS} if calls and can.tools else {})


def reference(tokenizer: PreTrainedTokenizerFast, chat: Any, source: str) -> tuple[str, list[Span]]:
    """Return the text and the spans of transformers' mask, by the template with marks."""
    text, spans = render_jinja_template(
        conversations=[[{k: v for k, v in m.items() if v is not None} for m in chat.messages]],
        tools=chat.tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text[0], sorted(spans[0])


def verdict(
    source: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> tuple[str, str]:
    """Return ``equal``, ``refused``, or how a row's spans differ, and the detail."""
    said = parsed(row, "row")
    try:
        chat = render_chat(tokenizer, said.messages, said.tools, "row")
        spans = answer_spans(chat)
    except UserError as error:
        return "refused", re.sub(r"^row ", "", str(error))
    text, masked = reference(tokenizer, chat, source)
    if text != chat.text:
        return "other text", ""
    ours = sorted(span for answer in spans.values() for span in answer)
    prompts = [
        render(tokenizer, chat.messages[:i], tools=chat.tools, prompt=True)
        for i in range(1, len(chat.messages))
        if chat.messages[i]["role"] == "assistant" and chat.messages[i - 1]["role"] != "system"
    ]
    question = [{"role": "user", "content": "?"}]
    prompts.append(render(tokenizer, question, prompt=True))
    return compared(text, ours, masked, prompts)


def compared(
    text: str, ours: list[Span], theirs: list[Span], prompts: list[str]
) -> tuple[str, str]:
    """Tell how two sets of spans differ.

    Two conventions differ without harm: transformers' masks may cover white space after an end of
    turn, and the last pieces of the generation prompt, which the model is given.
    """
    covered = [{i for a, b in spans for i in range(a, b)} for spans in (ours, theirs)]
    if covered[0] == covered[1]:
        return "equal", ""
    kind = "equal but for white space around"
    for run in _runs(covered[1] - covered[0]):
        piece = text[run[0] : run[1]]
        if not piece.strip():
            continue
        if run[1] not in {a for a, _ in ours} or not any(
            piece.strip() in prompt[-80:] for prompt in prompts
        ):
            return "different", json.dumps([piece, "not ours", text], ensure_ascii=False)
        kind = "equal but for the generation prompt"
    for run in _runs(covered[0] - covered[1]):
        if text[run[0] : run[1]].strip():
            return "different", json.dumps(
                [text[run[0] : run[1]], "ours", text], ensure_ascii=False
            )
    return kind, ""


def _runs(places: set[int]) -> list[Span]:
    runs: list[Span] = []
    for i in sorted(places):
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


# Llama 3.1's and 3.2's templates as TRL ships them have no marks: these edits put them in.
_TURN = (
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}"
)
_HEAD = "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
_TOOL = '{%- elif message.role == "tool" or message.role == "ipython" %}'
LLAMA = (
    (
        _TURN,
        f"{{%- if message['role'] == 'assistant' %}}{_HEAD}{{%- generation %}}"
        "{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}"
        f"{{%- else %}}{_TURN}{{%- endif %}}",
    ),
    (
        "{%- set tool_call = message.tool_calls[0].function %}\n",
        "{%- set tool_call = message.tool_calls[0].function %}{%- generation %}\n",
    ),
    (_TOOL, "{%- endgeneration %}" + _TOOL),
)


def templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and source of each template with marks in a folder."""
    for path in sorted(folder.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        if path.stem in ("llama3_1", "llama3_2"):
            for old, new in LLAMA:
                assert old in source, old
                source = source.replace(old, new)
        if MARK.search(source):
            yield path.stem.removesuffix("_training"), source


def study(
    folder: Path, number: int, seed: int = 0, only: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield for each template how many conversations were equal, refused and different."""
    for name, source in templates(folder):
        if only is not None and name not in only:
            continue
        bare = MARK.sub(lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], source)
        tokenizer = tokenizer_of(bare)
        rng = random.Random(seed)
        counts: Counter[str] = Counter()
        details: Counter[tuple[str, str]] = Counter()
        can = features_of(source)
        for _ in range(number):
            what, detail = verdict(source, conversation(rng, can), tokenizer)
            counts[what] += 1
            details[what, detail] += bool(detail)
        yield {"template": name, "counts": dict(counts), "details": details}


def main() -> None:
    """Print the table, and what was refused or different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--templates", type=Path)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--details", action="store_true")
    o = parser.parse_args()
    folders = [o.templates]
    if o.templates is None:
        import trl

        folders = [Path(trl.__file__).parent / "chat_templates", HERE / "templates"]
    kinds = ("equal", "equal but for white space around", "equal but for the generation prompt")
    kinds += ("refused", "different", "other text")
    print("| template | " + " | ".join(kinds) + " |\n|---|" + "---:|" * len(kinds))
    for row in (row for folder in folders for row in study(folder, o.number)):
        print(
            "| "
            + " | ".join([row["template"], *(str(row["counts"].get(k, 0)) for k in kinds)])
            + " |"
        )
        for (what, detail), n in row["details"].most_common(4) if o.details else ():
            print(f"    {n} {what}: {detail[:400]}")


if __name__ == "__main__":
    main()
