"""Messages of the service as hypothesis draws them, made from their descriptors: whatever the wire can carry."""

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from ray_ep.control.service import SERVICE

METHODS = list(SERVICE.methods)

_SCALARS = {
    Field.TYPE_STRING: st.text(max_size=20),
    Field.TYPE_BYTES: st.binary(max_size=20),
    Field.TYPE_BOOL: st.booleans(),
    Field.TYPE_DOUBLE: st.floats(),
    Field.TYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 9),
    Field.TYPE_UINT64: st.integers(0, 2**64 - 1) | st.integers(0, 9),
    Field.TYPE_SINT32: st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 9),
}


@st.composite
def messages_of(draw, descriptor):
    """A message of any content; each field may be left out."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        values = messages_of(field.message_type) if field.message_type else _SCALARS[field.type]
        if field.is_repeated:
            for value in draw(st.lists(values, max_size=8)):
                target = getattr(message, field.name)
                target.append(value)
        elif field.message_type:
            getattr(message, field.name).CopyFrom(draw(values))
        else:
            setattr(message, field.name, draw(values))
    return message
