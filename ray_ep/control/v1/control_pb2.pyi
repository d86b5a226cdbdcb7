from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_FORMING: _ClassVar[RunState]
    RUN_STATE_STEPPING: _ClassVar[RunState]
    RUN_STATE_MIGRATING: _ClassVar[RunState]
    RUN_STATE_RESIZING: _ClassVar[RunState]
    RUN_STATE_RECOVERING: _ClassVar[RunState]
    RUN_STATE_PAUSED: _ClassVar[RunState]
    RUN_STATE_DRAINING: _ClassVar[RunState]
    RUN_STATE_STOPPED: _ClassVar[RunState]
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_FORMING: RunState
RUN_STATE_STEPPING: RunState
RUN_STATE_MIGRATING: RunState
RUN_STATE_RESIZING: RunState
RUN_STATE_RECOVERING: RunState
RUN_STATE_PAUSED: RunState
RUN_STATE_DRAINING: RunState
RUN_STATE_STOPPED: RunState

class Mutation(_message.Message):
    __slots__ = ("request_id", "if_epoch", "if_placement_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IF_EPOCH_FIELD_NUMBER: _ClassVar[int]
    IF_PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    if_epoch: int
    if_placement_version: int
    def __init__(self, request_id: _Optional[str] = ..., if_epoch: _Optional[int] = ..., if_placement_version: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("words", "step", "epoch", "placement_version")
    WORDS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    words: str
    step: int
    epoch: int
    placement_version: int
    def __init__(self, words: _Optional[str] = ..., step: _Optional[int] = ..., epoch: _Optional[int] = ..., placement_version: _Optional[int] = ...) -> None: ...

class Rank(_message.Message):
    __slots__ = ("rank", "member", "node", "host", "address", "device")
    RANK_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    member: str
    node: str
    host: str
    address: str
    device: str
    def __init__(self, rank: _Optional[int] = ..., member: _Optional[str] = ..., node: _Optional[str] = ..., host: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("epoch", "desired", "active", "waiting", "joining", "ready", "ranks", "drained")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    desired: int
    active: int
    waiting: int
    joining: int
    ready: int
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    drained: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., desired: _Optional[int] = ..., active: _Optional[int] = ..., waiting: _Optional[int] = ..., joining: _Optional[int] = ..., ready: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ..., drained: _Optional[_Iterable[str]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "step_seconds", "tokens_per_second", "exchange_seconds", "expert_seconds", "bytes_intra_node", "bytes_inter_node", "balancedness")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EVAL_LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_INTRA_NODE_FIELD_NUMBER: _ClassVar[int]
    BYTES_INTER_NODE_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    eval_loss: float
    grad_norm: float
    learning_rate: float
    step_seconds: float
    tokens_per_second: float
    exchange_seconds: float
    expert_seconds: float
    bytes_intra_node: int
    bytes_inter_node: int
    balancedness: float
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., eval_loss: _Optional[float] = ..., grad_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., step_seconds: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., exchange_seconds: _Optional[float] = ..., expert_seconds: _Optional[float] = ..., bytes_intra_node: _Optional[int] = ..., bytes_inter_node: _Optional[int] = ..., balancedness: _Optional[float] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time", "step", "kind", "message")
    TIME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    time: str
    step: int
    kind: str
    message: str
    def __init__(self, time: _Optional[str] = ..., step: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run", "run_dir", "state", "why", "done", "steps", "placement_version", "membership", "step", "events", "outcome")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RUN_DIR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    run: str
    run_dir: str
    state: RunState
    why: str
    done: int
    steps: int
    placement_version: int
    membership: Membership
    step: Step
    events: _containers.RepeatedCompositeFieldContainer[Event]
    outcome: str
    def __init__(self, run: _Optional[str] = ..., run_dir: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., why: _Optional[str] = ..., done: _Optional[int] = ..., steps: _Optional[int] = ..., placement_version: _Optional[int] = ..., membership: _Optional[_Union[Membership, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., outcome: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: RunStatus
    def __init__(self, status: _Optional[_Union[RunStatus, _Mapping]] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("every_seconds",)
    EVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    every_seconds: float
    def __init__(self, every_seconds: _Optional[float] = ...) -> None: ...

class WatchStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: RunStatus
    def __init__(self, status: _Optional[_Union[RunStatus, _Mapping]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("version", "layers", "ranks", "slots_per_rank", "experts", "slots", "primaries", "shares")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PRIMARIES_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    version: int
    layers: int
    ranks: int
    slots_per_rank: int
    experts: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    primaries: _containers.RepeatedScalarFieldContainer[int]
    shares: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, version: _Optional[int] = ..., layers: _Optional[int] = ..., ranks: _Optional[int] = ..., slots_per_rank: _Optional[int] = ..., experts: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., primaries: _Optional[_Iterable[int]] = ..., shares: _Optional[_Iterable[float]] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class GetPlacementResponse(_message.Message):
    __slots__ = ("placement",)
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class ProposePlacementRequest(_message.Message):
    __slots__ = ("placement",)
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class ProposePlacementResponse(_message.Message):
    __slots__ = ("words", "pays", "step_seconds", "predicted_step_seconds", "move_seconds", "moved_slots", "moved_primaries", "balancedness", "predicted_balancedness", "placement", "epoch", "placement_version")
    WORDS_FIELD_NUMBER: _ClassVar[int]
    PAYS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MOVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MOVED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MOVED_PRIMARIES_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    words: str
    pays: bool
    step_seconds: float
    predicted_step_seconds: float
    move_seconds: float
    moved_slots: int
    moved_primaries: int
    balancedness: float
    predicted_balancedness: float
    placement: Placement
    epoch: int
    placement_version: int
    def __init__(self, words: _Optional[str] = ..., pays: _Optional[bool] = ..., step_seconds: _Optional[float] = ..., predicted_step_seconds: _Optional[float] = ..., move_seconds: _Optional[float] = ..., moved_slots: _Optional[int] = ..., moved_primaries: _Optional[int] = ..., balancedness: _Optional[float] = ..., predicted_balancedness: _Optional[float] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., epoch: _Optional[int] = ..., placement_version: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("step", "request_id", "position")
    STEP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    step: int
    request_id: str
    position: int
    def __init__(self, step: _Optional[int] = ..., request_id: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("position", "row", "column", "text")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    position: int
    row: int
    column: int
    text: str
    def __init__(self, position: _Optional[int] = ..., row: _Optional[int] = ..., column: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class Hop(_message.Message):
    __slots__ = ("layer", "choice", "expert", "weight", "kind", "rank", "node", "host", "device", "why")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    layer: int
    choice: int
    expert: int
    weight: float
    kind: str
    rank: int
    node: str
    host: str
    device: str
    why: str
    def __init__(self, layer: _Optional[int] = ..., choice: _Optional[int] = ..., expert: _Optional[int] = ..., weight: _Optional[float] = ..., kind: _Optional[str] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., host: _Optional[str] = ..., device: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ("tokens", "hops", "placement_version", "epoch")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    hops: _containers.RepeatedCompositeFieldContainer[Hop]
    placement_version: int
    epoch: int
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., hops: _Optional[_Iterable[_Union[Hop, _Mapping]]] = ..., placement_version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("mutation",)
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class ApplyPlacementRequest(_message.Message):
    __slots__ = ("mutation", "placement")
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    placement: Placement
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class ApplyPlacementResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("mutation", "node", "undo")
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    node: str
    undo: bool
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ..., node: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("mutation", "ranks")
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    ranks: int
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ..., ranks: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("mutation",)
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ...) -> None: ...

class CheckpointResponse(_message.Message):
    __slots__ = ("outcome", "url")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    url: str
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ..., url: _Optional[str] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("mutation",)
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ...) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("mutation",)
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("mutation",)
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    mutation: Mutation
    def __init__(self, mutation: _Optional[_Union[Mutation, _Mapping]] = ...) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...
