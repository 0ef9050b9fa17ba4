"""What the API server checks beyond types: CEL rules with sentences, forms that exclude each other, merge keys.

They are declared on the models and end up in the CRDs. Python does not evaluate CEL: of all rules only `one_of` is
checked again when a stored object is parsed, because code that follows would otherwise meet an object without a form.
A message starts with "must" and says what to write instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

VALIDATIONS = "x-kubernetes-validations"
LIST_TYPE = "x-kubernetes-list-type"
LIST_MAP_KEYS = "x-kubernetes-list-map-keys"

#: Digits, an optional fraction, an optional exponent; no backslash, so that it reads the same in CEL and in YAML.
DECIMAL_PATTERN = "^[0-9]+([.][0-9]+)?([eE][-+]?[0-9]{1,2})?$"
DECIMAL_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A CEL rule over `self` and the sentence a user reads when it does not hold."""

    rule: str
    message: str
    field_path: str | None = None
    """JSON path, relative to `self`, of the field that the error points at; none: `self`."""

    def to_schema(self) -> dict[str, str]:
        schema = {"rule": self.rule, "message": self.message}
        if self.field_path is not None:
            schema["fieldPath"] = self.field_path
        return schema

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        schema[VALIDATIONS] = [*schema.get(VALIDATIONS, []), self.to_schema()]
        return schema


@dataclass(frozen=True)
class ListMap:
    """Marks a list whose items are told apart, and merged, by one of their fields."""

    key: str

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(core_schema), LIST_TYPE: "map", LIST_MAP_KEYS: [self.key]}


class Part(BaseModel):
    """Base of all API types: camelCase outside, immutable, and unknown fields are ignored.

    They are ignored because a field that a newer version stored must not stop an older operator; users who mistype a
    field are told by the API server.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    one_of: ClassVar[tuple[str, ...]] = ()
    """Attributes of which exactly one must be set."""
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if self.one_of and sum(getattr(self, name) is not None for name in self.one_of) != 1:
            raise ValueError(_one_of_message(self.one_of))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /) -> JsonSchemaValue:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        rules = [*_one_of_rules(cls.one_of), *cls.rules]
        if rules:
            schema[VALIDATIONS] = [rule.to_schema() for rule in rules]
        return reference

    def to_body(self) -> dict[str, Any]:
        """The JSON object as the API server stores it, without what is not set."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)


def words(names: Sequence[str], *, last: str = "and") -> str:
    """An English list: `a, b and c`."""
    *head, tail = names
    return f"{', '.join(head)} {last} {tail}" if head else tail


def decimal(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    example: str,
    hint: str = "",
) -> Rule:
    """Range of a decimal string. Text that is no number fails this rule too, instead of failing its evaluation."""
    bounds = (
        (">", above, "greater than"),
        (">=", at_least, "at least"),
        ("<", below, "less than"),
        ("<=", at_most, "at most"),
    )
    given = [(operator, bound, text) for operator, bound, text in bounds if bound is not None]
    checks = [f"double(self) {operator} {float(bound)}" for operator, bound, _ in given]
    range_text = words([f"{text} {bound:g}" for _, bound, text in given])
    return Rule(
        rule=" && ".join([f"self.matches('{DECIMAL_PATTERN}')", *checks]),
        message=f'must be a decimal number in quotes, {range_text}, such as "{example}"{hint}',
    )


def is_decimal(path: str) -> str:
    """CEL: the string at `path` is a decimal number, so that `double(path)` cannot fail."""
    return f"{path}.matches('{DECIMAL_PATTERN}')"


def _one_of_message(attributes: Sequence[str]) -> str:
    return f"must set exactly one of {words([to_camel(name) for name in attributes])}"


def _one_of_rules(attributes: Sequence[str]) -> list[Rule]:
    if not attributes:
        return []
    count = " + ".join(f"(has(self.{to_camel(name)}) ? 1 : 0)" for name in attributes)
    return [Rule(rule=f"{count} == 1", message=_one_of_message(attributes))]
