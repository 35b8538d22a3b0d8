"""Adapters as the engine has them: which are loaded, which a request gets that names none, which are in the weights.

Loading goes on beside generations. Only what changes the weights is a barrier: requests that came before it end first,
those that come later wait. An adapter that is removed stays with the requests that have it until they end.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.lora_args import LAUNCH_ID, LoraArgs
from sglang.multimodal_gen.configs.sample.lora_params import LoraUse
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EngineStopped, ErrorInfo, MemoryReleased, ServingError
from sglang.multimodal_gen.errors_lora import InvalidLora, LoraNameTaken, UnknownLora
from sglang.multimodal_gen.runtime.managers.clients import Clients
from sglang.multimodal_gen.runtime.managers.kept_loras import KeptAdapter, KeptLoras, LoraFile
from sglang.multimodal_gen.runtime.managers.messages import EngineState, LoraReply, LoraRequest, LoraStatus, LoraWish
from sglang.multimodal_gen.runtime.managers.replica import Replica, Replicas
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.worker_messages import ForgetLora, LoadLora, LoraDone, MergeLora

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """One adapter under the id by which workers know it: its name may come to mean another one."""

    adapter_id: str
    wish: LoraWish

    @classmethod
    def of(cls, kept: KeptAdapter) -> _Loaded:
        """What the scheduler before had."""
        return cls(kept.adapter_id, kept.wish)

    def kept(self) -> KeptAdapter:
        """For the scheduler after this one."""
        return KeptAdapter(adapter_id=self.adapter_id, wish=self.wish)

    def load(self, query_id: str) -> LoadLora:
        """What tells a worker to load it."""
        wish = self.wish
        return LoadLora(
            query_id=query_id,
            adapter_id=self.adapter_id,
            path=wish.path or "",
            weight_name=wish.weight_name,
            alpha=wish.alpha,
            target=wish.target,
        )


@dataclass(frozen=True)
class _Merged:
    """An adapter in the weights."""

    loaded: _Loaded
    scale: float


@dataclass
class _Operation:
    """The one that is under way. `new` are loaded for it, then later requests get `uses`; where the weights change, to
    `merge`, it then waits for all requests up to number `barrier`. `expected`: the answers that are still to come."""

    client: bytes
    request: LoraRequest
    uses: tuple[LoraUse, ...] = ()
    new: tuple[_Loaded, ...] = ()
    merge: tuple[LoraUse, ...] | None = None
    expected: set[tuple[int, str]] = field(default_factory=set)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    error: ErrorInfo | None = None
    barrier: int | None = None
    merging: bool = False
    before: tuple[LoraUse, ...] = ()


class Loras:
    """Takes LoraRequests and answers each once, one after the other but for lists. The scheduler calls `advance` every
    time round."""

    def __init__(
        self,
        args: LoraArgs,
        replicas: Replicas,
        clients: Clients,
        requests: Mapping[str, RequestRecord],
        *,
        state: Callable[[], EngineState],
        num_arrived: Callable[[], int],
        file: LoraFile,
    ) -> None:
        """`num_arrived`: the number of the request that came last."""
        self._replicas = replicas
        self._clients = clients
        self._requests = requests
        self._state = state
        self._num_arrived = num_arrived
        self._file = file
        self._number = 0
        self._loaded: dict[str, _Loaded] = {}
        self._dropped: list[_Loaded] = []
        self._inherited: set[str] = set()
        self._uses: tuple[LoraUse, ...] = ()
        self._merged: tuple[_Merged, ...] = ()
        self._merged_at_launch = False
        self._waiting: deque[tuple[bytes, LoraRequest]] = deque()
        self._operation: _Operation | None = None
        if args.lora_path is not None:
            self._take_launch(args, args.lora_path)
        if (kept := file.read()) is not None:
            self._take_kept(kept)

    def _take_launch(self, args: LoraArgs, path: str) -> None:
        wish = LoraWish(name=args.lora_nickname, path=path, weight_name=args.lora_weight_name, alpha=args.lora_alpha)
        loaded = self._loaded[wish.name] = _Loaded(LAUNCH_ID, wish)
        if args.lora_merge_mode == "merge":
            self._merged, self._merged_at_launch = (_Merged(loaded, args.lora_scale),), True
        else:
            self._uses = (LoraUse(wish.name, args.lora_scale),)

    def _take_kept(self, kept: KeptLoras) -> None:
        """All that this server's scheduler before had; of another server's, what jobs of it may name."""
        self._number = kept.number
        loaded = {each.wish.name: _Loaded.of(each) for each in kept.loaded}
        if kept.server == self._file.server:
            self._loaded, self._uses = loaded, kept.uses
            self._merged = tuple(_Merged(_Loaded.of(each), scale) for each, scale in kept.merged)
        else:
            others = {name: each for name, each in loaded.items() if each.adapter_id != LAUNCH_ID}
            self._inherited = {_again(each) for each in others.values()}
            self._loaded = others | self._loaded

    def _keep(self) -> None:
        self._file.write(
            KeptLoras(
                server=self._file.server,
                number=self._number,
                loaded=tuple(each.kept() for each in self._loaded.values()),
                uses=self._uses,
                merged=tuple((each.loaded.kept(), each.scale) for each in self._merged),
            )
        )

    # -- requests --

    def stamped(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the adapters that are set, where they name none. Whoever asks for none has the
        parameters of a request for which none were set: what it makes is the same."""
        if params.lora is None and self._uses:
            return dataclasses.replace(params, lora=tuple(use.as_field() for use in self._uses))
        return dataclasses.replace(params, lora=None) if params.lora == () else params

    def refusal(self, params: SamplingParams) -> ErrorInfo | None:
        """Why a request cannot have what it names."""
        for use in params.lora_uses:
            if use.name not in self._loaded:
                return UnknownLora(use.name, sorted(self._loaded)).info()
        return None

    def ids_of(self, params: SamplingParams) -> dict[str, str]:
        """Under which ids the adapters are that a request names."""
        return {use.name: self._loaded[use.name].adapter_id for use in params.lora_uses if use.name in self._loaded}

    def holds(self, record: RequestRecord) -> bool:
        """Whether a waiting request must go on waiting, since the weights change before it."""
        barrier = None if self._operation is None else self._operation.barrier
        return barrier is not None and record.order > barrier and not record.started_at

    # -- what clients ask --

    def asked(self, client: bytes, request: LoraRequest) -> None:
        """Queue an operation, or answer at once what only reads."""
        if request.operation == "list":
            self._reply(client, request, f"{len(self._loaded)} adapters are loaded")
            return
        self._waiting.append((client, request))
        self.advance()

    def advance(self) -> None:
        """Go on as far as that needs no answer."""
        self._forget_unused()
        while True:
            if self._operation is None:
                if not self._waiting:
                    return
                self._begin(*self._waiting.popleft())
                continue
            running = {replica.index for replica in self._replicas.running}
            self._operation.expected = {pair for pair in self._operation.expected if pair[0] in running}
            if self._operation.expected or not self._proceed(self._operation):
                return

    def _begin(self, client: bytes, request: LoraRequest) -> None:
        try:
            self._check_state()
            operation = self._planned(client, request)
        except ServingError as error:
            self._reply(client, request, error=error.info())
            return
        self._operation = operation
        for loaded in operation.new:
            self._ask_all(operation, loaded.load(_query(request, loaded.adapter_id)))

    def _check_state(self) -> None:
        state = self._state().state
        if state == "asleep":
            raise MemoryReleased("the engine's memory is released; resume it first")
        if state in ("failed", "stopping"):
            raise EngineStopped("the engine has failed or is stopping; start the server anew")

    def _planned(self, client: bytes, request: LoraRequest) -> _Operation:
        if request.operation == "set":
            return self._planned_set(client, request)
        uses = self._uses
        merge: tuple[LoraUse, ...] | None = None
        if request.operation == "merge":
            merge = tuple(LoraUse(use.name, use.scale * request.scale) for use in uses)
            uses = ()
            if not merge:
                raise InvalidLora("no adapter is set that could be merged; set_lora comes first")
        elif request.operation == "unmerge":
            merge = () if self._merged else None
        else:
            names = [wish.name for wish in request.adapters]
            self._require(names)
            uses = tuple(use for use in uses if use.name not in names)
        return _Operation(client, request, uses=uses, merge=merge)

    def _planned_set(self, client: bytes, request: LoraRequest) -> _Operation:
        new: list[_Loaded] = []
        for wish in request.adapters:
            known = self._loaded.get(wish.name)
            if known is None and wish.path is not None:
                self._number += 1
                new.append(_Loaded(f"{wish.name}#{self._number}", wish))
            elif known is None:
                raise UnknownLora(wish.name, sorted(self._loaded))
            elif wish.path is not None and _source(known.wish) != _source(wish):
                raise LoraNameTaken(wish.name)
        uses = tuple(LoraUse(wish.name, wish.scale) for wish in request.adapters)
        if request.merge:
            return _Operation(client, request, new=tuple(new), merge=uses)
        return _Operation(client, request, uses=uses, new=tuple(new), merge=() if self._merged else None)

    def _require(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._loaded:
                raise UnknownLora(name, sorted(self._loaded))

    def _proceed(self, operation: _Operation) -> bool:
        """The next part of an operation of which all answers have come; False when it must wait."""
        if operation.error is not None:
            self._give_up(operation, operation.error)
        elif operation.barrier is None:
            self._take_over(operation)
        elif operation.merging:
            self._merged = tuple(_Merged(self._loaded[use.name], use.scale) for use in operation.merge or ())
            self._finish(operation)
        elif any(r.order <= operation.barrier and r.status != "saving" for r in self._requests.values()):
            return False
        else:
            operation.merging = True
            self._ask_all(operation, self._merge_message(operation))
        return True

    def _take_over(self, operation: _Operation) -> None:
        """All is loaded: later requests get it."""
        self._loaded |= {loaded.wish.name: loaded for loaded in operation.new}
        if operation.request.operation == "remove":
            self._dropped += [self._loaded.pop(wish.name) for wish in operation.request.adapters]
        operation.before, self._uses = self._uses, operation.uses
        if operation.merge is None:
            self._finish(operation)
        else:
            operation.barrier = self._num_arrived()

    def _give_up(self, operation: _Operation, error: ErrorInfo) -> None:
        """With adapters and weights as they were."""
        if operation.merging:
            self._uses = operation.before
            for replica in self._replicas.running:
                replica.workers.send(MergeLora(query_id="", uses=self._merged_uses()))
        for loaded in operation.new:
            self._loaded.pop(loaded.wish.name, None)
            self._dropped.append(loaded)
        self._operation = None
        self._forget_unused()
        self._reply(operation.client, operation.request, error=error)

    def _finish(self, operation: _Operation) -> None:
        self._operation = None
        self._keep()
        notes = "; ".join(f"{name}: {note}" for name, found in operation.notes.items() for note in found)
        self._reply(operation.client, operation.request, self._done_in_words(operation) + (notes and f" ({notes})"))

    def _done_in_words(self, operation: _Operation) -> str:
        if operation.request.operation == "remove":
            return "removed; requests that have it keep it until they end"
        if operation.request.operation == "unmerge":
            return "the weights are the checkpoint's" + ("" if operation.merge is not None else ", as before")
        names = ", ".join(f"{use.name} ({use.scale:g})" for use in operation.merge or operation.uses) or "no adapter"
        return f"{names} {'merged into the weights' if operation.merge else 'set for requests that name none'}"

    def _forget_unused(self) -> None:
        """Removed adapters that no request has any more, and no weights."""
        if not self._dropped:
            return
        used = {adapter_id for record in self._requests.values() for adapter_id in record.lora_ids.values()}
        used |= {adapter_id for adapter_id, _ in self._merged_uses()}
        for loaded in self._dropped:
            if loaded.adapter_id not in used:
                self._send_all(ForgetLora(adapter_id=loaded.adapter_id))
        self._dropped = [loaded for loaded in self._dropped if loaded.adapter_id in used]

    # -- workers --

    def done(self, replica: Replica, message: LoraDone) -> None:
        """A replica has loaded or merged."""
        operation = self._operation
        if operation is None or (replica.index, message.query_id) not in operation.expected:
            if message.error is not None:
                logger.error("an adapter cannot be loaded again: %s", message.error.message)
                self._disinherit(message.query_id)
            return
        operation.expected.discard((replica.index, message.query_id))
        operation.error = operation.error or message.error
        if message.notes:
            operation.notes[message.query_id.partition("/")[2].partition("#")[0]] = message.notes
        self.advance()

    def _disinherit(self, query_id: str) -> None:
        """An adapter of the server before cannot be had any more: whoever names it is told that nobody knows it."""
        if query_id in self._inherited:
            self._loaded = {name: loaded for name, loaded in self._loaded.items() if _again(loaded) != query_id}
            self._keep()

    def ready(self, replica: Replica) -> None:
        """Its workers are new: they load what the others have, and what an operation waits for."""
        operation = self._operation
        for loaded in (*self._loaded.values(), *self._dropped):
            replica.workers.send(loaded.load(_again(loaded)))
        for loaded in () if operation is None or operation.barrier is not None else operation.new:
            assert operation is not None, "its adapters are asked for"
            replica.workers.send(loaded.load(_query(operation.request, loaded.adapter_id)))
        if operation is not None and operation.merging:
            replica.workers.send(self._merge_message(operation))
        elif self._merged or self._merged_at_launch:
            replica.workers.send(MergeLora(query_id="", uses=self._merged_uses()))

    def _merge_message(self, operation: _Operation) -> MergeLora:
        uses = tuple((self._loaded[use.name].adapter_id, use.scale) for use in operation.merge or ())
        return MergeLora(query_id=_query(operation.request, "merge"), uses=uses)

    def _merged_uses(self) -> tuple[tuple[str, float], ...]:
        return tuple((merged.loaded.adapter_id, merged.scale) for merged in self._merged)

    def _ask_all(self, operation: _Operation, message: LoadLora | MergeLora) -> None:
        operation.expected |= {(replica.index, message.query_id) for replica in self._replicas.running}
        self._send_all(message)

    def _send_all(self, message: LoadLora | MergeLora | ForgetLora) -> None:
        """To those that are ready; the others get it when they are."""
        for replica in self._replicas:
            if replica.workers.ready:
                replica.workers.send(message)

    def _reply(self, client: bytes, request: LoraRequest, message: str = "", *, error: ErrorInfo | None = None) -> None:
        if request.operation != "list":
            logger.info("%s of adapters: %s", request.operation, message if error is None else error.message)
        reply = LoraReply(query_id=request.query_id, message=message, adapters=self._statuses(), error=error)
        self._clients.send(client, reply)

    def _statuses(self) -> tuple[LoraStatus, ...]:
        scales = {use.name: use.scale for use in self._uses}
        merged = {each.loaded.adapter_id: each.scale for each in self._merged}
        found = []
        for name, loaded in self._loaded.items():
            is_merged = loaded.adapter_id in merged
            scale = merged[loaded.adapter_id] if is_merged else scales.get(name)
            wish = loaded.wish
            found.append(LoraStatus(name=name, path=wish.path or "", target=wish.target, scale=scale, merged=is_merged))
        return tuple(found)


def _query(request: LoraRequest, part: str) -> str:
    return f"{request.query_id}/{part}"


def _again(loaded: _Loaded) -> str:
    """As which a worker that is new answers for what the others have."""
    return f"again/{loaded.adapter_id}"


def _source(wish: LoraWish) -> tuple[object, ...]:
    return wish.path, wish.weight_name, wish.alpha, wish.target
