"""Small data sets that the tests put on claims."""

import json
import random
from pathlib import Path

from support.tiny import reviews, write_jsonl

WORDS = ("lovely", "dull", "film", "phone", "hotel", "book")


def write_instructions(path: Path, *, rows: int, seed: int = 7) -> None:
    """Rows with `instruction`, `input` and `output`: repeat the first word."""
    dice = random.Random(seed)
    picked = [dice.choice(WORDS) for _ in range(rows)]
    write_jsonl(
        path, ({"instruction": "Repeat the word.", "input": f"{w} {i}", "output": w} for i, w in enumerate(picked))
    )


def write_data(directory: Path) -> None:
    """Good and bad files by name: what a claim of data looks like to the tests."""
    rows = reviews(240)
    write_jsonl(directory / "reviews.jsonl", rows)
    write_instructions(directory / "instructions.jsonl", rows=120)
    write_jsonl(directory / "unlabelled.jsonl", ({"text": row["text"]} for row in rows[:20]))
    lines = [json.dumps(row) for row in rows[:40]]
    (directory / "broken.jsonl").write_text("\n".join([*lines[:16], '{"text": "half a row', *lines[16:]]) + "\n")
