"""What a diffusion transformer is made of, as far as its speed and size go: what cost model and layouts reckon with.

Each architecture gives its own from its `config.json`. Numbers of weights are those of matrices, each of which is one
multiply-add for a token that goes through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Segment = Literal["image", "text", "joint"]
"""Tokens of the picture or clip, of the text, or of both as one sequence."""


@dataclass(frozen=True, kw_only=True)
class BlockRun:
    """`count` equal blocks.

    Attributes:
        image_weights, text_weights, joint_weights: of the matrices that such tokens go through; tensor-parallel ranks
            share them.
        sample_weights: of those that a sample goes through once, such as modulations; whole on every rank.
        other_parameters: norms, biases and tables, whole on every rank.
        attentions: which tokens attend to each other, once for each time that they do.
        crosses: whether image tokens also attend to the text, apart: its keys and values are made once for a request.
        once: whether a request goes through them once, and not at each step.
        sums: activations that tensor-parallel ranks add up, by the tokens that they are of.
        norm_sums: sums of squares that tensor-parallel ranks add up for norms over all heads together.
        launches: kernels that one forward launches, with fused kernels and one product for queries, keys and values.
        launches_apart: how many more where these are products of their own, as Ulysses has them.
        traffic: bytes in half precision that kernels other than matrix products and attention read and write, fused as
            they are on a GPU, for each channel of each token.
    """

    count: int
    image_weights: int = 0
    text_weights: int = 0
    joint_weights: int = 0
    sample_weights: int = 0
    other_parameters: int = 0
    attentions: tuple[Segment, ...] = ()
    crosses: bool = False
    once: bool = False
    sums: tuple[Segment, ...] = ()
    norm_sums: int = 0
    launches: int
    launches_apart: int = 0
    traffic: float

    @property
    def shared_weights(self) -> int:
        """Weights of one block that tensor parallelism divides."""
        return self.image_weights + self.text_weights + self.joint_weights

    @property
    def of_text_alone(self) -> bool:
        """Whether the blocks refine the text before it meets the image; every rank has all of it then."""
        return not self.image_weights and not self.joint_weights


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """A whole transformer. `outside_parameters` are those of embeddings and of the last layers, whole on every rank;
    `patch` is a token's latent frames, rows and columns; `extra_text_tokens` stand in front of those of the prompt.
    With `text_is_dealt` sequence-parallel ranks share the text as well."""

    num_heads: int
    head_dim: int
    runs: tuple[BlockRun, ...]
    outside_parameters: int
    patch: tuple[int, int, int]
    text_is_dealt: bool
    extra_text_tokens: int = 0

    @property
    def width(self) -> int:
        """Channels of a token: all heads together."""
        return self.num_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Of all blocks and what is around them."""
        blocks = (run.count * (run.shared_weights + run.sample_weights + run.other_parameters) for run in self.runs)
        return sum(blocks) + self.outside_parameters

    @property
    def shared_parameters(self) -> int:
        """Those that tensor-parallel ranks share."""
        return sum(run.count * run.shared_weights for run in self.runs)


def time_embedding_parameters(frequency_dim: int, width: int) -> int:
    """Of two linear layers with biases: F -> D -> D. Timesteps, pooled texts and guidance scales are embedded so."""
    return (frequency_dim + width + 2) * width


def dual_stream_run(count: int, width: int, *, ffn_dim: int) -> BlockRun:
    """Blocks of image and text with weights of their own, joined in attention, under AdaLN-zero. arXiv:2403.03206."""
    stream = 4 * width**2 + 2 * width * ffn_dim
    return BlockRun(
        count=count,
        image_weights=stream,
        text_weights=stream,
        sample_weights=12 * width**2,
        other_parameters=2 * (11 * width + ffn_dim),
        attentions=("joint",),
        sums=("image", "image", "text", "text"),
        launches=17,
        launches_apart=6,
        traffic=26,
    )


def single_stream_run(count: int, width: int, *, ffn_dim: int) -> BlockRun:
    """Blocks of one sequence, attention and MLP side by side, under AdaLN-zero. arXiv:2302.05442."""
    return BlockRun(
        count=count,
        joint_weights=4 * width**2 + 2 * width * ffn_dim,
        sample_weights=3 * width**2,
        other_parameters=7 * width + ffn_dim,
        attentions=("joint",),
        sums=("joint",),
        launches=8,
        launches_apart=2,
        traffic=38,
    )
