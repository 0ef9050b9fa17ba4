"""Where the training data of a FineTune lies and how rows are held out for validation and test."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tuneserve.api.meta import INT32_MAX, ClaimFile, ConfigMapKey, DecimalString, HubRepo, HubRevision
from tuneserve.api.rules import Part, Rule, decimal, is_decimal


class FileFormat(StrEnum):
    AUTO = "Auto"
    JSONL = "JSONL"
    JSON = "JSON"
    CSV = "CSV"
    PARQUET = "Parquet"


class HubDataset(Part):
    """A data set of a Hugging Face-compatible hub. Only its data files are read; a loading script is never run."""

    repo: HubRepo
    """Repository of the data set, as owner/name."""
    revision: HubRevision = "main"
    """Commit, tag or branch. A branch or tag is resolved to a commit once."""
    subset: Annotated[str, Field(min_length=1, max_length=128)] = "default"
    """Configuration of the data set."""
    split: Annotated[str, Field(min_length=1, max_length=128)] = "train"
    """Split of the data set, as the hub names it."""


class HttpFile(Part):
    """A file that is fetched over HTTPS, without a login."""

    url: Annotated[
        str,
        Field(max_length=2048),
        Rule(
            rule="self.matches('^https://[^@/ ]+/[^ ]*$')",
            message="must be an address such as https://data.example/rows.jsonl: https, without a user or a password",
        ),
    ]
    """Address of the file. It may lead on to another host, but never out of HTTPS."""
    sha256: Annotated[
        str,
        Field(max_length=64),
        Rule(
            rule="self.matches('^[0-9a-f]{64}$')",
            message="must be the sha256 of the file, 64 digits from 0 to 9 and a to f, as sha256sum prints it",
        ),
    ]
    """SHA-256 of the file in hex. Another content is an error, so the data never change unnoticed."""


class DataSource(Part):
    """One source of rows: a file on a claim, a key of a ConfigMap, a data set of the hub, or a file at an address."""

    one_of = ("claim", "config_map", "hugging_face", "http")
    rules = (
        Rule(
            rule="!has(self.huggingFace) || self.format == 'Auto'",
            message="must be left out, or Auto, with huggingFace: the hub says in what format its files are",
            field_path=".format",
        ),
    )

    claim: ClaimFile | None = None
    """A file on a PersistentVolumeClaim. Its content is looked at when the data is prepared; after a change in
    place, change dataset.revision."""
    config_map: ConfigMapKey | None = None
    """A key of a ConfigMap, for small data."""
    hugging_face: HubDataset | None = None
    """A data set of a Hugging Face-compatible hub."""
    http: HttpFile | None = None
    """A file that is fetched over HTTPS."""
    format: FileFormat = FileFormat.AUTO
    """Format of the file. Auto goes by the ending of its name: .jsonl, .json, .csv or .parquet, each also with .gz."""
    weight: Annotated[DecimalString, decimal(above=0, at_most=100, example="0.5")] = "1"
    """How often each row is learned from in an epoch, for data of several sources: "2" is twice, "0.5" a random half
    of the rows. Rows that are held out for validation or test are not weighed."""
    limit: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    """Rows to read, the first ones. Left out: all of them."""


Fraction = Annotated[DecimalString, decimal(at_least=0, below=1, example="0.1")]
Sources = Annotated[tuple[DataSource, ...], Field(max_length=16)]


class Split(Part):
    """Shares of the training rows held out, at random, for the splits that have no sources of their own."""

    rules = (
        Rule(
            rule=f"!{is_decimal('self.validation')} || !{is_decimal('self.test')} || "
            "double(self.validation) + double(self.test) < 1.0",
            message="must leave rows to train on: make validation and test together less than 1",
        ),
    )

    validation: Fraction = "0.1"
    """Share of the rows, from 0 to below 1, for the loss measured while training. Unused with dataset.validation."""
    test: Fraction = "0.1"
    """Share of the rows, from 0 to below 1, for the evaluation of the exports. Unused with dataset.test."""
    seed: Annotated[int, Field(ge=0, le=INT32_MAX)] = 42
    """Seed of the random choice; the same seed and data give the same split."""


class Dataset(Part):
    """The rows to learn from, to validate with, and to test on."""

    rules = (
        Rule(
            rule=f"has(self.test) && self.test.size() > 0 || !{is_decimal('self.split.test')} || "
            "double(self.split.test) > 0.0",
            message="must hold out rows for the test: set split.test above 0, or give sources in test",
            field_path=".split.test",
        ),
        *(
            Rule(
                rule=f"!has(self.{split}) || self.{split}.all(source, source.weight == '1')",
                message="must not weigh rows that are not trained on: leave weight out",
                field_path=f".{split}",
            )
            for split in ("validation", "test")
        ),
    )

    train: Annotated[Sources, Field(min_length=1)]
    """Sources of the rows to learn from; at most 16, read in this order."""
    validation: Sources = ()
    """Sources of the rows whose loss is measured while training. Left out: split.validation of the training rows."""
    test: Sources = ()
    """Sources of the rows that the exports are evaluated on. Left out: split.test of the training rows."""
    split: Split = Split()
    """Shares held out when validation or test have no sources."""
    revision: Annotated[str, Field(max_length=128)] | None = None
    """Any text. Change it to say that files changed in place: the data is then prepared again."""
    columns: Annotated[
        Mapping[str, Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=8),
    ] = Field(default_factory=dict)
    """The task's field -> the file's column, where the names differ, such as "text: tweet". A classification has the
    fields text and label; an instruction has instruction, input and output; a completion prompt and completion; a
    conversation messages; a text text; a preference prompt, chosen and rejected."""
