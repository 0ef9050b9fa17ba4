"""From the JSON schema of a pydantic model to a structural schema, the subset that a CRD may use.

Pure: it knows nothing of files and of the kinds. It inlines references, turns optional fields into fields that are not
required, leaves out what says nothing (titles, empty defaults), and adds what only Kubernetes asks for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from tuneserve.api.meta import INT32_MAX, LARGEST_INTEGER
from tuneserve.api.rules import LIST_TYPE, VALIDATIONS

Schema = dict[str, Any]

#: Everything that may stay as it is; a keyword that is neither here nor handled below is an error, not a loss.
_KEPT = (
    "type",
    "format",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "maxProperties",
    "default",
    "required",
    LIST_TYPE,
    "x-kubernetes-list-map-keys",
    VALIDATIONS,
)
_HANDLED = ("$ref", "$defs", "anyOf", "const", "title", "description", "properties", "items", "additionalProperties")


def structural_schema(model: type[BaseModel], *, omit: Sequence[str] = ()) -> Schema:
    """The structural schema of `model` as users write it, without the properties in `omit`.

    Raises:
        ValueError: The model uses a form that a CRD cannot express; the message names the keyword.
    """
    schema = model.model_json_schema(by_alias=True, mode="validation")
    properties = {name: value for name, value in schema["properties"].items() if name not in omit}
    required = [name for name in schema.get("required", []) if name not in omit]
    return _convert({**schema, "properties": properties, "required": required}, schema.get("$defs", {}))


def _convert(schema: Mapping[str, Any], definitions: Mapping[str, Schema]) -> Schema:
    schema = _resolve(schema, definitions)
    unknown = sorted(set(schema) - {*_KEPT, *_HANDLED})
    if unknown:
        raise ValueError(f"a structural schema has no {', '.join(unknown)}: {schema}")

    result: Schema = {}
    if "description" in schema:
        result["description"] = _describe(schema)
    result.update({keyword: schema[keyword] for keyword in _KEPT if keyword in schema})
    if "const" in schema:
        result["enum"] = [schema["const"]]
    _set_default(result, schema)
    if result["type"] == "integer":
        result["format"] = "int32" if result.get("maximum", LARGEST_INTEGER) <= INT32_MAX else "int64"
    if result["type"] == "array":
        result.setdefault(LIST_TYPE, "atomic")
        result["items"] = _convert(schema["items"], definitions)
    if result["type"] == "object":
        if "properties" in schema:
            result["properties"] = {name: _convert(value, definitions) for name, value in schema["properties"].items()}
        elif isinstance(schema.get("additionalProperties"), Mapping):
            result["additionalProperties"] = _convert(schema["additionalProperties"], definitions)
    return result


def _resolve(schema: Mapping[str, Any], definitions: Mapping[str, Schema]) -> Schema:
    """`schema` with a reference or an optional form replaced by what it stands for; the outer keywords win."""
    outer = dict(schema)
    if "anyOf" in outer:
        forms = [form for form in outer.pop("anyOf") if form.get("type") != "null"]
        if len(forms) != 1:
            raise ValueError(f"a structural schema has no choice of types: {schema}")
        inner = forms[0]
    elif "$ref" in outer:
        inner = definitions[outer.pop("$ref").removeprefix("#/$defs/")]
    else:
        return outer
    inner = _resolve(inner, definitions)
    rules = [*inner.get(VALIDATIONS, []), *outer.get(VALIDATIONS, [])]
    merged = {**inner, **outer}
    return {**merged, VALIDATIONS: rules} if rules else merged


def _set_default(result: Schema, schema: Mapping[str, Any]) -> None:
    """Defaults that say nothing go. That of an object has all that its own fields default to, because the API server
    checks it against the rules of the object before it fills it."""
    default = _without_empty(result.pop("default", None))
    if default or default == 0 or (default == {} and "properties" in schema):
        result["default"] = default


def _without_empty(default: Any) -> Any:
    if isinstance(default, dict):
        return {name: _without_empty(value) for name, value in default.items() if value not in (None, "", [])}
    if isinstance(default, list):
        return [_without_empty(value) for value in default]
    return default


def _describe(schema: Mapping[str, Any]) -> str:
    """One paragraph that ends, for a plain value, with its default: `kubectl explain` shows no defaults."""
    text = " ".join(schema["description"].split())
    default = schema.get("default")
    if isinstance(default, bool):
        return f"{text} Default: {str(default).lower()}."
    if isinstance(default, str) and default[:1].isdigit():
        return f'{text} Default: "{default}".'
    if isinstance(default, int | str) and default != "":
        return f"{text} Default: {default}."
    return text
