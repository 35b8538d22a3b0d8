"""How long a denoising step takes in a layout, how much memory it needs and what it sends: arithmetic, no GPU.

A step is as long as its work on the GPU or as launching it from the host, whichever is longer. The work is matrix
products, attention and everything else, which is as fast as memory is; each has one rate. What ranks send each other
has one bandwidth and one latency. All constants are here, with what they were measured on; docs/parallel.md compares
the model with measurements, and `sglang plan --compare` does so for new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.transformer_shape import BlockRun, Segment, TransformerShape

HALF_PRECISION_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What one kind of GPU does, in bf16, and what its links carry.

    Attributes:
        product_flops: FLOPs a second of a large matrix product.
        half_rate_tokens: tokens of a product at half of that.
        attention_flops, small_head_flops: of the fastest exact kernel with heads of 128, and of at most 64 channels.
        memory_bandwidth: bytes a second that elementwise kernels and norms read and write, counted as if no kernel
            found anything in a cache, so that it may be more than the memory's own.
        link_bandwidth: bytes a second that a rank sends to the others of its host, through NCCL.
        link_latency_s: of each exchange.
        launch_s: seconds that the host takes for each kernel, whichever GPU.
        exchange_launch_s: likewise for each exchange, with the copies around it.
        host_bandwidth: bytes a second from the host's pinned memory to the GPU.
    """

    name: str
    product_flops: float
    half_rate_tokens: float
    attention_flops: float
    small_head_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    link_latency_s: float
    launch_s: float
    exchange_launch_s: float
    host_bandwidth: float


# Rates: fitted to one forward of several transformers on one H100, scripts/cost_table.py. Links: all-to-all, ring step
# and all-reduce of two blocks on two H100 through NVLink, within 20 % of `latency + bytes / bandwidth`. Launching: 46
# ms for the 970 kernels of a forward of 57 blocks with fused kernels, what runs between them in Python included, and 71
# to 146 ms with exchanges on two and four H100.
H100 = Hardware(
    name="h100",
    product_flops=0.72e15,
    half_rate_tokens=200,
    attention_flops=0.65e15,
    small_head_flops=0.45e15,
    memory_bandwidth=4.0e12,
    link_bandwidth=280e9,
    link_latency_s=60e-6,
    launch_s=48e-6,
    exchange_launch_s=270e-6,
    host_bandwidth=53.6e9,
)
# The same chip and links with faster memory.
H200 = Hardware(**{**vars(H100), "name": "h200", "memory_bandwidth": 4.6e12})
HARDWARE = {hardware.name: hardware for hardware in (H100, H200)}

# Ulysses exchanges queries, keys and values of so many tokens a rank at once, and those of more one after the other,
# while the next are projected: 2,304 tokens wait for the host, 16,380 for the exchange (two H100).
MOST_PACKED_TOKENS = 8192
STEPS_AHEAD = 16
"""Steps of a request for which what a transformer makes of them is computed at once: on a GPU that takes as long as for
one, since it is the weights that have to be read."""
# Forwards of so many tokens of all rows on one rank are begun as CUDA graphs: above, computing takes far longer than
# beginning, and the memory that graphs keep is missed elsewhere. A picture of 1024x1024 has 4,608 of them.
MOST_GRAPHED_TOKENS = 12_288
# Of the time of an exchange, what the GPU does nothing else in: traces of steps on two H200.
ALL_TO_ALL_EXPOSED = 0.8
RING_EXPOSED = 0.9
ALL_REDUCE_EXPOSED = 1.0
# What smaller kernels, and those beside an exchange, lose: steps on two H200 against half of one GPU's step.
SPREAD_LOSS = 1.03
# Of the traffic of elementwise kernels, that of heads and of feed-forward features, which tensor parallelism divides:
# by the kernels of a block 0.3 to 0.7.
HEADS_SHARE_OF_TRAFFIC = 0.4
# What a norm over all heads together takes more where ranks share the heads, and no kernel does all of it: launches,
# and bytes for each channel of each token.
NORM_SUM_LAUNCHES = 8
NORM_SUM_TRAFFIC = 36
# Of each step round a ring: attention to one more part of the keys, and merging it.
RING_STEP_LAUNCHES = 7
# Of an attention round a ring however many steps: what the two or four H100 took more than those.
RING_LAUNCHES = 6
# Bytes that merging the parts of a ring reads and writes, for each channel of each token and each step round.
RING_MERGE_TRAFFIC = 24
# Peak of activations for each channel of each token in half precision: 14 billion parameters on one and two H200.
ACTIVATION_BYTES = 21
# Of each GPU for the CUDA context, buffers of collectives and the allocator's waste.
CONTEXT_BYTES = 2**30
# What encoding or decoding takes at least, while no step is computed.
CODING_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step computes: `rows` forwards (two with guidance), each of so many tokens."""

    rows: int
    image_tokens: int
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one rank and one step: seconds on the GPU, those of them that it only waits for exchanges, seconds on the
    host, and bytes sent to other ranks."""

    gpu_s: float
    waiting_s: float
    host_s: float
    sent_bytes: float

    @property
    def seconds(self) -> float:
        """How long the step takes."""
        return max(self.gpu_s, self.host_s)

    @property
    def is_host_bound(self) -> bool:
        """Whether launching takes longer than computing."""
        return self.host_s >= self.gpu_s


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What a rank holds: rows and tokens of each kind, padding included."""

    layout: ReplicaShape
    rows: int
    image: int
    text: int
    whole_image: int
    whole_text: int

    @classmethod
    def of(cls, shape: TransformerShape, work: StepWork, layout: ReplicaShape) -> _Share:
        ranks = layout.ring * layout.ulysses
        return cls(
            layout=layout,
            rows=-(-work.rows // layout.cfg),
            image=-(-work.image_tokens // ranks),
            text=-(-work.text_tokens // ranks) if shape.text_is_dealt else work.text_tokens,
            whole_image=work.image_tokens,
            whole_text=work.text_tokens,
        )

    def tokens(self, segment: Segment) -> int:
        """Of all rows."""
        return self.rows * {"image": self.image, "text": self.text, "joint": self.image + self.text}[segment]

    def pairs(self, segment: Segment) -> int:
        """Of a query and a key, over all rows and ranks of the sequence."""
        whole = {"image": self.whole_image, "text": self.whole_text, "joint": self.whole_image + self.whole_text}
        return self.rows * whole[segment] ** 2

    @property
    def is_graphed(self) -> bool:
        """Whether the forward is begun at once, as a CUDA graph."""
        return self.tokens("joint") <= MOST_GRAPHED_TOKENS

    def for_text_alone(self) -> _Share:
        """The same for blocks that every rank computes whole."""
        return _Share(**{**vars(self), "text": self.whole_text, "layout": ReplicaShape(tp=self.layout.tp)})


def step_cost(shape: TransformerShape, work: StepWork, layout: ReplicaShape, hardware: Hardware) -> StepCost:
    """What a step costs in a layout."""
    share = _Share.of(shape, work, layout)
    computing = waiting = host = sent = 0.0
    for run in (run for run in shape.runs if not run.once):
        held = share.for_text_alone() if run.of_text_alone else share
        exchanges = _exchanges(run, shape, held, hardware)
        computing += run.count * _compute_s(run, shape, held, hardware)
        waiting += run.count * exchanges.waiting_s
        sent += run.count * exchanges.sent_bytes
        if not share.is_graphed:
            host += run.count * _launches(run, held) * hardware.launch_s
            host += run.count * exchanges.number * hardware.exchange_launch_s
    if layout.cfg > 1 or layout.ring * layout.ulysses > 1:  # the predictions come together on every rank
        waiting += hardware.link_latency_s
    if layout.num_ranks > layout.cfg:
        computing *= SPREAD_LOSS
    return StepCost(gpu_s=computing + waiting, waiting_s=waiting, host_s=host, sent_bytes=sent)


def _is_packed(run: BlockRun, share: _Share) -> bool:
    """Whether queries, keys and values go in one exchange; those under a norm of all heads together never do."""
    few = max((share.tokens(segment) for segment in run.attentions), default=0) <= MOST_PACKED_TOKENS
    return few and not run.norm_sums


def _launches(run: BlockRun, share: _Share) -> int:
    """Of one block on one rank, without exchanges."""
    launches, layout = run.launches, share.layout
    if layout.ulysses > 1 and not _is_packed(run, share):
        launches += run.launches_apart
    if layout.ring > 1:
        launches += ((layout.ring - 1) * RING_STEP_LAUNCHES + RING_LAUNCHES) * len(run.attentions)
    if layout.tp > 1:
        launches += run.norm_sums * NORM_SUM_LAUNCHES
    return launches


def _compute_s(run: BlockRun, shape: TransformerShape, share: _Share, hardware: Hardware) -> float:
    """One block on one rank."""
    layout = share.layout
    segments: tuple[tuple[Segment, int], ...] = (
        ("image", run.image_weights),
        ("text", run.text_weights),
        ("joint", run.joint_weights),
    )
    products = 0.0
    channel_tokens = 0
    for segment, weights in segments:
        tokens = share.tokens(segment)
        if weights and not (run.crosses and segment == "text"):
            rate = hardware.product_flops * tokens / (tokens + hardware.half_rate_tokens)
            products += 2 * tokens * weights / layout.tp / rate
            channel_tokens += tokens
    pairs = sum(share.pairs(segment) for segment in run.attentions)
    if run.crosses:
        pairs += share.rows * share.whole_image * share.whole_text
    head_rate = hardware.attention_flops if shape.head_dim > 64 else hardware.small_head_flops
    attention = 4 * pairs * shape.width / (layout.ring * layout.ulysses * layout.tp) / head_rate
    traffic = channel_tokens * shape.width * run.traffic
    traffic *= 1 - HEADS_SHARE_OF_TRAFFIC + HEADS_SHARE_OF_TRAFFIC / layout.tp
    if layout.tp > 1:
        traffic += run.norm_sums * channel_tokens * shape.width / layout.tp * NORM_SUM_TRAFFIC
    traffic += run.sample_weights * HALF_PRECISION_BYTES / STEPS_AHEAD
    if layout.ring > 1:
        merged = sum(share.tokens(segment) for segment in run.attentions) * shape.width / layout.tp
        traffic += (layout.ring - 1) * merged * RING_MERGE_TRAFFIC
    return products + attention + traffic / hardware.memory_bandwidth


def link_seconds(num_bytes: float, hardware: Hardware) -> float:
    """How long it takes a rank to send so much to others of its host."""
    return num_bytes / hardware.link_bandwidth + hardware.link_latency_s


@dataclass(frozen=True, kw_only=True)
class _Exchanges:
    number: int
    waiting_s: float
    sent_bytes: float


def _exchanges(run: BlockRun, shape: TransformerShape, share: _Share, hardware: Hardware) -> _Exchanges:
    """What one block sends: queries, keys, values and results over Ulysses, keys and values round the ring, sums of
    activations over tensor-parallel ranks."""
    layout = share.layout
    number, waiting, sent = 0, 0.0, 0.0

    def exchange(num_bytes: float, count: int, exposed: float) -> None:
        nonlocal number, waiting, sent
        number += count
        waiting += exposed * link_seconds(num_bytes, hardware)
        sent += num_bytes

    for segment in run.attentions:
        held = share.tokens(segment) * shape.width / layout.tp * HALF_PRECISION_BYTES
        if layout.ulysses > 1:
            leaving = held * (layout.ulysses - 1) / layout.ulysses
            exchange(3 * leaving, 1 if _is_packed(run, share) else 3, ALL_TO_ALL_EXPOSED)
            exchange(leaving, 1, ALL_TO_ALL_EXPOSED)
        for _ in range(layout.ring - 1):
            exchange(2 * held, 1, RING_EXPOSED)
    if layout.tp > 1:
        for segment in run.sums:
            summed = share.tokens(segment) * shape.width * HALF_PRECISION_BYTES
            exchange(2 * summed * (layout.tp - 1) / layout.tp, 1, ALL_REDUCE_EXPOSED)
        for _ in range(run.norm_sums):
            exchange(0.0, 1, ALL_REDUCE_EXPOSED)
    return _Exchanges(number=number, waiting_s=waiting, sent_bytes=sent)


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """What the weights take on one GPU: of the transformers the part that tensor parallelism shares and the rest, and
    of the autoencoder."""

    shared: float
    whole: float
    autoencoder: float

    def transformer_on_each(self, layout: ReplicaShape) -> float:
        """Those of the transformers alone."""
        return self.shared / layout.tp + self.whole


def activation_bytes(
    shape: TransformerShape, work: StepWork, layout: ReplicaShape, *, element_bytes: int = HALF_PRECISION_BYTES
) -> float:
    """Peak of a step's activations on one rank."""
    share = _Share.of(shape, work, layout)
    scale = ACTIVATION_BYTES * element_bytes / HALF_PRECISION_BYTES
    return share.tokens("joint") * shape.width * scale
