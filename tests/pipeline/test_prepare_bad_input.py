"""Files that are not what they should be: each ends in a sentence that names the place, in little memory."""

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from support.stages import Workspace
from support.tiny import reviews, write_jsonl
from tuneserve_pipeline import dataset
from tuneserve_pipeline.contract import ClaimFile, ExitCode, PrepareSpec, TemplateSpec
from tuneserve_pipeline.dataset import Problems
from tuneserve_pipeline.encoding import Encoder
from tuneserve_pipeline.errors import Unavailable
from tuneserve_pipeline.files import DataFile
from tuneserve_pipeline.splits import Side
from tuneserve_pipeline.templates import load_template, load_tokenizer
from tuneserve_pipeline.tokenized import tokenize

#: Bytes more than a good file needs.
MORE_MEMORY = 256 * 2**20
#: Runs the stage, and says at the end how much memory it had at its most (KiB). `ru_maxrss` would count what this
#: process had when it forked.
MEASURED = """
import re, sys
from pathlib import Path
from tuneserve_pipeline.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
ROWS = "".join(json.dumps(row) + "\n" for row in reviews(300)).encode()

Write = Callable[[Path], None]


def run(workspace: Workspace, spec: PrepareSpec, file: str) -> tuple[int, str, int]:
    """Exit code, message and peak memory (bytes) of `prepare` on a file of the claim."""
    spec = spec.model_copy(update={"train": (ClaimFile(claim="c", path=file),)})
    command = workspace.command(workspace.config(spec))
    assert command[1:3] == ["-m", "tuneserve_pipeline"]
    command[1:3] = ["-c", MEASURED]
    done = subprocess.run(command, env=workspace.environment(), capture_output=True, text=True, timeout=240)
    error = json.loads(workspace.termination.read_text(encoding="utf-8")).get("error") or {}
    return done.returncode, error.get("message", ""), int(done.stdout) * 1024


@pytest.fixture(scope="session")
def good_memory(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[PrepareSpec], int]:
    found: list[int] = []

    def measure(spec: PrepareSpec) -> int:
        if not found:
            workspace = Workspace(root=tmp_path_factory.mktemp("good"), base_model=tiny_model)
            write_jsonl(workspace.datasets / "c/good.jsonl", reviews(300))
            code, message, peak = run(workspace, spec, "good.jsonl")
            assert code == 0, message
            found.append(peak)
        return found[0]

    return measure


def sparse(begin: bytes, size: int) -> Write:
    """A file of `size` bytes that takes no space on the disk: NUL bytes behind its beginning."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(begin)
            file.truncate(size)

    return write


def content(data: bytes) -> Write:
    return lambda path: path.write_bytes(data) and None


def bomb(path: Path) -> None:
    """A gigabyte in a megabyte."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(ROWS + b'{"text": "')
        for _ in range(1024):
            file.write(b"a" * 2**20)
        file.write(b'"}\n')


def changed(line: int, text: bytes) -> bytes:
    lines = ROWS.splitlines(keepends=True)
    lines[line - 1] = text + b"\n"
    return b"".join(lines)


def wide_parquet(path: Path) -> None:
    """One text of 32 MiB among others: fine as a file, no row of a training set."""
    rows = [{"text": "a" * 2**25 if n == 7 else f"Text {n}", "label": "neutral"} for n in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


GZIPPED = gzip.compress(ROWS, mtime=0)
MIDDLE = len(GZIPPED) // 2


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("cut.jsonl.gz", content(GZIPPED[:MIDDLE]), ["cut.jsonl.gz: the gzip file is broken or cut off behind", ":"]),
        (
            "damaged.jsonl.gz",
            content(GZIPPED[:MIDDLE] + b"\xff" * 64 + GZIPPED[MIDDLE + 64 :]),
            ["damaged.jsonl.gz", "gzip file is broken"],
        ),
        ("line.jsonl", sparse(ROWS + b'{"text": "', 2**30), ["line.jsonl:301: a row of more than 4 MiB"]),
        ("bomb.jsonl.gz", bomb, ["bomb.jsonl.gz:301: a row of more than 4 MiB"]),
        ("list.json", sparse(b'[{"text": "a", "label": "neutral"}, {"text": "', 2**30), ["list.json:1: "]),
        ("quotes.csv", sparse(b'text,label\na,neutral\n"', 2**30), ["quotes.csv:3: not valid CSV (a row of more than"]),
        ("header.csv", sparse(b"text,label", 2**30), ["header.csv:1: not valid CSV (a row of more than"]),
        (
            "quotes.csv.gz",
            content(gzip.compress(b'text,label\n"' + b"a,neutral\n" * 10_000_000)),
            ["quotes.csv.gz:", "a row of more than 4 MiB"],
        ),
        ("latin.jsonl", content(changed(17, '{"text": "ä"}'.encode("latin-1"))), ["latin.jsonl:17: not UTF-8"]),
        ("latin.json", content('[{"text": "a"},\n{"text": "ä"}]'.encode("latin-1")), ["latin.json:2: not UTF-8"]),
        ("wide.csv", content("text,label\na,neutral\n".encode("utf-16")), ["wide.csv:1: not UTF-8 (it is UTF-16)"]),
        (
            "nul.jsonl",
            content(changed(9, b'{"text": "a\\u0000b", "label": "neutral"}')),
            ["nul.jsonl:9: 'text' holds a NUL character"],
        ),
        ("nul.csv", content(b"text,label\na\x00b,neutral\n"), ["nul.csv:2: 'text' holds a NUL character"]),
        ("raw-nul.jsonl", content(changed(9, b'{"text": "a\x00b"}')), ["raw-nul.jsonl:9: not valid JSON"]),
        (
            "mixed.jsonl",
            content(changed(200, b'{"prompt": "a", "completion": "b"}')),
            ["mixed.jsonl:200: has no 'text'"],
        ),
        (
            "label.jsonl",
            content(changed(33, b'{"text": "a", "label": "sarcastic"}')),
            ["label.jsonl:33: 'label' is 'sarcastic', which is none of the labels"],
        ),
        ("digits.jsonl", content(changed(2, b'{"text": ' + b"1" * 5000 + b"}")), ["digits.jsonl:2: not valid JSON"]),
        (
            "deep.json",
            content(b'[{"text": "a", "label": "neutral"},\n' + b"[" * 100_000),
            ["deep.json:2: not valid JSON (too deep)"],
        ),
        ("wide.parquet", wide_parquet, ["wide.parquet: row 8: 'text' has 33554432 characters"]),
        ("cut.parquet", content(b"PAR1" + b"\x00" * 1000 + b"PAR1"), ["cut.parquet: not a readable Parquet file"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_named_and_takes_no_memory(
    workspace: Workspace,
    classification: PrepareSpec,
    good_memory: Callable[[PrepareSpec], int],
    name: str,
    write: Write,
    says: list[str],
) -> None:
    path = workspace.datasets / "c" / name
    path.parent.mkdir(parents=True)
    write(path)
    code, message, peak = run(workspace, classification, name)
    assert code == ExitCode.INVALID_DATA, message
    for part in says:
        assert part in message
    assert peak < good_memory(classification) + MORE_MEMORY


def test_a_row_far_too_long_to_train_on_is_left_out_without_its_tokens(
    workspace: Workspace, classification: PrepareSpec, good_memory: Callable[[PrepareSpec], int]
) -> None:
    long = {"text": "so " * 1_000_000, "label": "neutral"}
    write_jsonl(workspace.datasets / "c" / "long.jsonl", [*reviews(300), *({**long, "n": n} for n in range(30))])
    code, message, peak = run(workspace, classification, "long.jsonl")
    assert code == 0, message
    assert peak < good_memory(classification) + MORE_MEMORY


@pytest.mark.parametrize("rows", [299, 301])
def test_a_file_that_changes_while_it_is_read_is_read_again_later(
    tmp_path: Path, classification: PrepareSpec, tiny_model: Path, rows: int
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", reviews(300))
    given = {"train": [DataFile(path=path, name="claim c: rows.jsonl")], "validation": [], "test": []}
    plan = dataset.plan(given, dataset.survey(given, spec=classification, problems=Problems()), spec=classification)
    write_jsonl(path, reviews(rows))
    template = load_template(tiny_model, name="tiny", spec=TemplateSpec())
    tokenizer = load_tokenizer(tiny_model, name="tiny", special_tokens=template.special_tokens)
    with pytest.raises(Unavailable, match=r"claim c: rows\.jsonl: changed while it was read"):
        tokenize(
            given,
            plan=plan,
            spec=classification,
            encoder=Encoder(template=template, tokenizer=tokenizer, name="tiny"),
            limits=dict.fromkeys(Side, 256),
            directory=tmp_path,
            report=lambda share: None,
        )


def test_a_template_that_does_not_render_takes_no_memory(
    workspace: Workspace, classification: PrepareSpec, good_memory: Callable[[PrepareSpec], int]
) -> None:
    write_jsonl(workspace.datasets / "c" / "rows.jsonl", reviews(300))
    spec = classification.model_copy(update={"template": TemplateSpec(inline="{{ nothing.at.all }}")})
    code, message, peak = run(workspace, spec, "rows.jsonl")
    assert code == ExitCode.INVALID_CONFIG and "cannot render claim c: rows.jsonl:" in message
    assert peak < good_memory(classification) + MORE_MEMORY
