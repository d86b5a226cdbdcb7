"""Text -> values: a key's own type decides how what was typed is read, on the command line as in a file.

What a key is called and where it comes from is load.py's affair. Imports nothing of the package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]{1,9})?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_PLAIN_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,9})?")
_QUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*(?=,|$)""", re.DOTALL)
_BOOL = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_NULL = ("null", "Null", "NULL", "~")
_KNOWN = ("null", "bool", "int", "float", "str", "timestamp", "map", "seq", "value")
_TAGS = [f"tag:yaml.org,2002:{tag}" for tag in _KNOWN]
_TAB = "lines are indented with spaces, not with tabs"
_QUOTE = "text that begins with one of * & ! % @ ` needs quotes there"


class WrongValue(ValueError):
    """A value that its key's type does not take; the message is what goes after `key=value: `."""


class Plain(str):
    """A YAML scalar that nobody put in quotes: what it is, is still to be decided."""

    __slots__ = ()


def parse(text: str) -> Any:
    """YAML -> dicts, lists and text: `Plain` where it stood without quotes, None for an empty document.

    Raises:
        WrongValue: not YAML, a key that is there twice, or a tag such as !!python/name.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        return None if node is None else _plain(node)
    except yaml.YAMLError as e:
        said = str(e)
        hint = f" ({_QUOTE})" if "alias" in said or "cannot start any token" in said or "anchor" in said else ""
        hint = f" ({_TAB})" if "character '\\t'" in said else hint
        raise WrongValue(f"is not YAML{hint}: {_where_and_why(e)}") from None
    except RecursionError:
        raise WrongValue("is not YAML that ends: an alias within its own anchor") from None


def _where_and_why(e: yaml.YAMLError) -> str:
    """PyYAML's words in one line; its own show the text around the place, in several."""
    if not isinstance(e, yaml.MarkedYAMLError) or e.problem_mark is None:
        return " ".join(str(e).split())
    return f"line {e.problem_mark.line + 1}, column {e.problem_mark.column + 1}: {e.problem or e.context or 'damaged'}"


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise WrongValue(f"is not a configuration: line {key.start_mark.line + 1} has a key that is not text")
            if key.value in seen:
                raise WrongValue(f"has {key.value!r} twice, again in line {key.start_mark.line + 1}: give it once")
            seen.add(key.value)
        yaml.constructor.SafeConstructor().flatten_mapping(node)  # merge keys: <<
        return {key.value: _plain(value) for key, value in node.value}
    if node.tag not in _TAGS:
        raise WrongValue(f"has the tag {node.tag} in line {node.start_mark.line + 1}: only plain values are read")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return str(node.value) if quoted else Plain(node.value)


def scalar_or_tree(text: str) -> Any:
    """What was typed for a key of an open mapping: YAML where it begins like a list, a mapping or a quoted text."""
    return parse(text) if text.lstrip()[:1] in ("[", "{", '"', "'") else Plain(text.strip())


def flow_list(text: str) -> list[str]:
    """`[a, b]` -> its elements as typed; any other text is one element, no text none.

    Commas within quotes, brackets or braces do not part: `["a, b", c[0,1].txt]` has two elements.

    Raises:
        WrongValue: a bracket or a quote that nothing closes, or nothing between two commas.
    """
    inner = text.strip()
    if not inner.startswith("[") or ("]" in inner and not inner.endswith("]")):  # a glob such as [ab]*.txt
        return [text] if text else []
    if not inner.endswith("]"):
        raise WrongValue("is a list that nothing closes: expected [one, two]")
    parts = [p.strip() for p in _split(inner[1:-1])]
    if parts and not parts[-1]:
        parts.pop()
    if not all(parts):
        raise WrongValue("has nothing between two commas: expected [one, two]")
    return [str(parse(p)) if p[0] in "\"'" else p for p in parts]


def _split(text: str) -> Iterator[str]:
    """Parts between the commas that stand outside quotes, brackets and braces."""
    pairs = [(o, c) for o, c in ("[]", "{}") if text.count(o) == text.count(c)]
    begin, i, depth = 0, 0, 0
    while i < len(text):
        if not text[begin:i].strip() and text[i] in "\"'":
            quoted = _QUOTED.match(text, i)
            if quoted is None:
                raise WrongValue("has a quote that nothing closes before the next comma")
            i = quoted.end()
            continue
        depth += sum((text[i] == o) - (text[i] == c) for o, c in pairs)
        if text[i] == "," and depth <= 0:
            yield text[begin:i]
            begin, depth = i + 1, 0
        i += 1
    yield text[begin:]


def convert(value: Any, kind: str) -> Any:
    """A value for a field whose annotation is `kind`, such as "int", "list[str]" or "float | None".

    Raises:
        WrongValue: not of that kind, not finite, or more than 64 bits hold.
    """
    if kind.endswith(" | None"):
        if value is None or (isinstance(value, str) and value.strip() in (*_NULL, "none", "None", "")):
            return None
        kind = kind.removesuffix(" | None")
    return _OF_KIND[kind.partition("[")[0]](value)


def as_text(value: Any) -> str:
    """Text as typed."""
    if isinstance(value, Plain) and value in _NULL:
        raise WrongValue("expected text: '' for none, and quotes if the word itself is meant")
    if isinstance(value, (bool, list, dict)) or value is None:
        raise WrongValue("expected text")
    text = str(value)
    if "${" in text:
        raise WrongValue("${...} is not replaced here: write what it stands for")
    if text == "???":
        raise WrongValue("??? stands for a value that is missing: give another text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WrongValue("expected text in UTF-8") from None
    return text


def as_int(value: Any) -> int:
    """A whole number of at most 64 bits: decimal digits, also 1e3."""
    if isinstance(value, str):
        text = value.strip()
        if _NOT_FINITE.fullmatch(text):
            raise WrongValue("must be a finite number: expected int")
        if not _FLOAT.fullmatch(text):
            raise WrongValue("expected int in decimal digits")
        number = Decimal(text.replace("_", ""))
        if number and number.adjusted() > 18:
            raise WrongValue("more than 64 bits hold: expected int")
        if number != number.to_integral_value():
            raise WrongValue("expected int, a whole number")
        value = int(number)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongValue("expected int, a whole number")
    if not -(2**63) <= value < 2**63:
        raise WrongValue("more than 64 bits hold: expected int")
    return value


def as_float(value: Any) -> float:
    """A finite number."""
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        if _NOT_FINITE.fullmatch(text):
            raise WrongValue("must be a finite number: expected float")
        if not _FLOAT.fullmatch(text):
            raise WrongValue("expected float")
        number = float(text)
        if not number and Decimal(text):
            raise WrongValue("too small for a float: expected 0 or a larger one")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WrongValue("expected float")
    else:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise WrongValue("must be a finite number: expected float")
    return number


def as_bool(value: Any) -> bool:
    """true, yes, on, 1 or false, no, off, 0."""
    word = str(value).strip().lower()
    if word not in _BOOL:
        raise WrongValue("expected bool: true or false")
    return _BOOL[word]


def as_list(value: Any) -> list[str]:
    """A list of texts; one text is a list of one."""
    if isinstance(value, str):
        return [as_text(value)] if value and not (isinstance(value, Plain) and value in _NULL) else []
    if not isinstance(value, (list, tuple)):
        raise WrongValue("expected a list")
    return [as_text(item) for item in value]


def as_mapping(value: Any) -> dict[str, Any]:
    """A mapping with text as keys, and whatever JSON may hold."""
    if isinstance(value, Plain) and value in ("", *_NULL):  # a section of which every line is a comment
        return {}
    if not isinstance(value, dict):
        raise WrongValue("expected a mapping, such as {num_experts: 8}")
    return {str(k): _any(v) for k, v in value.items()}


def _any(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(k): _any(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_any(v) for v in value]
    if isinstance(value, Plain):
        return _guess(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return as_float(value)
    if isinstance(value, int):
        return as_int(value)
    return as_text(value)


def _key(key: Any) -> Any:
    return int(key) if isinstance(key, str) and _PLAIN_INT.fullmatch(key) else key


def _guess(text: Plain) -> Any:
    """A scalar of an open mapping; words such as yes stay text: whoever owns the mapping knows whether they are."""
    if text in _NULL or text == "":
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if _PLAIN_INT.fullmatch(text):
        return as_int(str(text))
    if _PLAIN_FLOAT.fullmatch(text) or (_NOT_FINITE.fullmatch(text) and "." in text):
        return as_float(str(text))
    return as_text(str(text))


_OF_KIND = {
    "str": as_text,
    "int": as_int,
    "float": as_float,
    "bool": as_bool,
    "list": as_list,
    "dict": as_mapping,
}
