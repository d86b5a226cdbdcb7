"""What a control.proto breaks of the released one: programs that were built with that go on working, or it is named.

The rules are those of buf's category FILE that this file can break; buf itself is not needed.
`python -m tests.control.breaking` compares the two, and `--release` makes the present one the released one.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTO = "ray_ep/control/v1/control.proto"
RELEASED = ROOT / "ray_ep/control/v1/released.binpb"
"""Descriptor set of the control.proto of the last release."""


def compiled(root: Path = ROOT) -> bytes:
    """Descriptor set of the control.proto below `root`."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        if protoc.main(["protoc", f"-I{root}", f"--descriptor_set_out={out}", PROTO]):
            raise SystemExit(f"{root / PROTO}: protoc refuses it")
        return out.read_bytes()


def broken(before: bytes, after: bytes) -> list[str]:
    """What the second of two descriptor sets breaks of the first, a sentence each."""
    old, new = (FileDescriptorSet.FromString(raw).file[0] for raw in (before, after))
    return list(_file(old, new))


def _file(old: FileDescriptorProto, new: FileDescriptorProto) -> Iterator[str]:
    for what in ("name", "package", "syntax"):
        if getattr(old, what) != getattr(new, what):
            yield f"{what} {getattr(old, what)!r} is {getattr(new, what)!r} now"
    for _, was, now in _pairs("service", old.service, new.service):
        if now is None:
            yield f"service {was.name} is gone"
            continue
        for _, method, there in _pairs("method", was.method, now.method):
            if there is None:
                yield f"call {was.name}.{method.name} is gone"
            elif _signature(method) != _signature(there):
                yield f"call {was.name}.{method.name} was {_signature(method)}, is {_signature(there)}"
    yield from _messages("", old.message_type, new.message_type)
    yield from _enums("", old.enum_type, new.enum_type)


def _messages(inside: str, old: Any, new: Any) -> Iterator[str]:
    for name, was, now in _pairs(inside, old, new):
        if now is None:
            yield f"message {name} is gone"
            continue
        fields = {field.number: field for field in now.field}
        for field in was.field:
            there = fields.get(field.number)
            if there is None:
                yield f"field {field.number} of {name} ({field.name}) is gone"
            elif _kind(was, field) != _kind(now, there):
                yield f"field {field.number} of {name} was {_kind(was, field)}, is {_kind(now, there)}"
        yield from _messages(f"{name}.", was.nested_type, now.nested_type)
        yield from _enums(f"{name}.", was.enum_type, now.enum_type)


def _enums(inside: str, old: Any, new: Any) -> Iterator[str]:
    for name, was, now in _pairs(inside, old, new):
        if now is None:
            yield f"enum {name} is gone"
            continue
        values = {value.number: value.name for value in now.value}
        for value in was.value:
            if values.get(value.number) != value.name:
                there = values.get(value.number, "gone")
                yield f"value {value.number} of {name} was {value.name}, is {there}"


def _pairs(inside: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, what was, what is under that name now or None)."""
    now = {it.name: it for it in new}
    return ((f"{inside}{it.name}", it, now.get(it.name)) for it in old)


def _signature(method: Any) -> str:
    streams = ["stream " * flag for flag in (method.client_streaming, method.server_streaming)]
    return f"({streams[0]}{method.input_type}) -> ({streams[1]}{method.output_type})"


def _kind(message: DescriptorProto, field: Any) -> str:
    """All of a field that its number stands for."""
    label = {field.LABEL_REPEATED: "repeated "}.get(field.label, "optional " * field.proto3_optional)
    inside = field.HasField("oneof_index") and not field.proto3_optional
    oneof = f" in oneof {message.oneof_decl[field.oneof_index].name}" if inside else ""
    kind = field.type_name or field.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"{label}{kind} {field.name}{oneof}"


def main() -> None:
    """As the module says."""
    if sys.argv[1:] == ["--release"]:
        RELEASED.write_bytes(compiled())
    elif found := broken(RELEASED.read_bytes(), compiled()):
        raise SystemExit("\n".join(f"{PROTO}: {words}" for words in found))


if __name__ == "__main__":
    main()
