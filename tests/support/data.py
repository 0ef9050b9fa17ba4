"""Small data sets that a model can learn: made-up reviews with an opinion word, and copying tasks."""

import json
import random
from pathlib import Path

GOOD = ["lovely", "great", "brilliant", "charming"]
BAD = ["awful", "dull", "broken", "boring"]
THINGS = ["film", "phone", "hotel", "book", "game", "chair"]


def write_reviews(path: Path, *, rows: int, seed: int = 7) -> None:
    """Rows with `text` and `label` (positive or negative), balanced."""
    dice = random.Random(seed)
    with path.open("w") as file:
        for number in range(rows):
            positive = number % 2 == 0
            word = dice.choice(GOOD if positive else BAD)
            text = f"the {dice.choice(THINGS)} number {dice.randrange(10_000)} was {word}"
            file.write(json.dumps({"text": text, "label": "positive" if positive else "negative"}) + "\n")


def write_instructions(path: Path, *, rows: int, seed: int = 7) -> None:
    """Rows with `instruction`, `input` and `output`."""
    dice = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            word = dice.choice(GOOD + BAD + THINGS)
            row = {"instruction": "Repeat the word.", "input": f"{word} {dice.randrange(1000)}", "output": word}
            file.write(json.dumps(row) + "\n")
