"""From a component's directory to a module that is ready to run.

A module is constructed without memory, then given the checkpoint's tensors one by one, each at its dtype and device,
so that a model never lies in memory twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sglang.multimodal_gen.configs.encoder_dealing import EncoderSize, deal_encoder
from sglang.multimodal_gen.configs.model_info import ComponentRead
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidRequest, UnsupportedModel
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.layers.compiled_blocks import use_compiled_blocks
from sglang.multimodal_gen.runtime.layers.context import EncoderAxes, LayerContext
from sglang.multimodal_gen.runtime.layers.forward_graphs import use_forward_graphs
from sglang.multimodal_gen.runtime.layers.fused import join_projections
from sglang.multimodal_gen.runtime.layers.quantization.products import SCALE_NAME
from sglang.multimodal_gen.runtime.layers.shards import shards_of, whole_shapes
from sglang.multimodal_gen.runtime.loader.foreign_keys import with_own_names
from sglang.multimodal_gen.runtime.loader.image_processor import ImageProcessor, load_image_processor
from sglang.multimodal_gen.runtime.loader.quantized_layers import LayerQuantizer, takes_quantization
from sglang.multimodal_gen.runtime.loader.stored_quantization import check_stored_method
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer, load_tokenizer
from sglang.multimodal_gen.runtime.loader.weight_utils import StoredWeights, open_weights, read_header, tensors_of

_SHOWN_KEYS = 8
_NOT_COMPILED = "enable_torch_compile: no effect on a transformer whose weights come and go"
ModuleT = TypeVar("ModuleT", bound=nn.Module)
DtypeOf = Callable[[str], torch.dtype]


class ComponentSource(Protocol):
    """Where what fills a component comes from."""

    def tensors_for(
        self,
        directory: Path,
        module: nn.Module,
        *,
        dtype_of: DtypeOf,
        device: torch.device,
        quantizer: LayerQuantizer | None = None,
    ) -> dict[str, Tensor]:
        """One tensor for each name of the module's state, floating-point ones at `dtype_of(name)`, on the device; those
        that a quantizer takes as it places them.

        The module itself has shapes and no memory.
        """
        ...

    def tokenizer(self, directory: Path) -> TextTokenizer:
        """What belongs to the directory of a tokenizer."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """The files in the directories. `replaced`: by name of a component, a file or directory in place of its own.
    `reads` says what reading each took."""

    replaced: Mapping[str, Path] = field(default_factory=dict)
    reads: list[ComponentRead] = field(default_factory=list)

    def tensors_for(
        self,
        directory: Path,
        module: nn.Module,
        *,
        dtype_of: DtypeOf,
        device: torch.device,
        quantizer: LayerQuantizer | None = None,
    ) -> dict[str, Tensor]:
        """See ComponentSource. Raises CorruptCheckpoint naming all keys that do not fit, or what a file lacks."""
        stored, shards = self._open(directory, module, quantized=quantizer is not None), shards_of(module)
        if quantizer is not None:
            stored = quantizer.take_apart(stored)
        names = _match_keys(module, stored, directory.name)
        name_of_key = {key: name for name, key in names.items()}
        dtype_of_key = {key: dtype_of(name) for name, key in names.items()}
        shard_of_key = {names[name]: shard for name, shard in shards.items()}
        quantized = {
            key
            for key, name in name_of_key.items()
            if quantizer is not None and quantizer.takes(name, key, stored.tensors[key].dtype)
        }

        def place(key: str, tensor: Tensor) -> Tensor:
            """Of this rank's part, or of the whole where a quantizer cuts it; the tensor is on the device."""
            if key in quantized and quantizer is not None:
                held = quantizer.placed(name_of_key[key], key, tensor, shard_of_key.get(key), dtype_of_key[key])
                assert held is not None, "it takes it"
                return held
            return tensor.to(dtype_of_key[key]) if tensor.is_floating_point() else tensor

        begin = time.perf_counter()
        parts = {key: shard for key, shard in shard_of_key.items() if key not in quantized}
        tensors = stored.load(list(names.values()), place, device=device, parts=parts)
        self.note(directory.name, stored.num_bytes(list(names.values())), time.perf_counter() - begin)
        return {name: tensors[key] for name, key in names.items()}

    def note(self, component: str, num_bytes: int, seconds: float) -> None:
        """That a component's files were read, of which other ranks may have taken other parts."""
        self.reads.append(ComponentRead(component=component, num_bytes=num_bytes, seconds=seconds))

    def _open(self, directory: Path, module: nn.Module, *, quantized: bool) -> StoredWeights:
        other = self.replaced.get(directory.name, directory)
        if other.is_file():
            stored = StoredWeights(other, read_header(other, quantized=quantized))
        else:
            stored = open_weights(other, quantized=quantized)
        return with_own_names(stored, module)

    def tokenizer(self, directory: Path) -> TextTokenizer:
        """See ComponentSource. Raises CorruptCheckpoint without one."""
        return load_tokenizer(directory)


def _tell_nobody(_: str) -> None:
    """Keeps the choices that were made to itself."""


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """Where and how components are placed, and what fills them. The autoencoder may have a dtype of its own. Those
    `on_host` are brought to the device later, and have no graphs."""

    device: torch.device
    dtype: torch.dtype
    layers: LayerContext
    fp32_components: Collection[str] = ()
    vae_dtype: torch.dtype | None = None
    source: ComponentSource = field(default_factory=Checkpoint)
    encoder_parallel: str = "auto"
    cuda_graphs: bool = False
    on_host: Collection[str] = ()
    compile_blocks: bool = False
    quantization: QuantizationArgs = field(default_factory=QuantizationArgs)
    report: Callable[[str], None] = _tell_nobody

    def device_of(self, component: str) -> torch.device:
        """Where a component is loaded."""
        return torch.device("cpu") if component in self.on_host else self.device

    def dtype_of(self, component: str) -> torch.dtype:
        """The dtype that a component computes in."""
        if component == "vae" and self.vae_dtype is not None:
            return self.vae_dtype
        return torch.float32 if component in self.fp32_components else self.dtype

    def encoder_axes(self, component: str, size: EncoderSize | str, *, weight_bytes: int) -> EncoderAxes:
        """To which ranks a text encoder is dealt, or the reason why it cannot be in place of its size; reported."""
        parallel = self.layers.parallel
        if parallel.world.size == 1:
            return EncoderAxes()
        dealing = deal_encoder(
            component, size, weight_bytes=weight_bytes, shape=parallel.shape, wish=self.encoder_parallel
        )
        self.report(dealing.reason)
        return EncoderAxes.of(dealing, parallel)


@dataclass(frozen=True)
class NativeModule:
    """A component with an implementation of ours: its class and the config that the class takes."""

    module_class: type[nn.Module]
    config_class: type[ModelConfig]

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> nn.Module:
        """Raises UnsupportedModel for another class, CorruptCheckpoint when config or weights do not fit."""
        if class_name != self.module_class.__name__:
            raise UnsupportedModel(
                f"the checkpoint's {directory.name} is a {class_name}; supported is {self.module_class.__name__}"
            )
        check_stored_method(directory)
        config = self.config(directory)
        self.check_layout(config, context.layers.parallel.shape)
        module = load_module(
            self.module_class,
            config,
            directory,
            dtype=context.dtype_of(directory.name),
            device=context.device_of(directory.name),
            context=self.layers_for(directory.name, config, context),
            source=context.source,
            quantization=context.quantization,
            runs_on=context.device,
        )
        stays = directory.name not in context.on_host
        if context.compile_blocks and hasattr(module, "block_runner"):
            context.report(use_compiled_blocks(module) if stays else _NOT_COMPILED)
        if context.cuda_graphs and hasattr(module, "tokens") and stays:
            use_forward_graphs(module)
        return module

    def check_layout(self, config: ModelConfig, shape: ReplicaShape) -> None:
        """Raises InvalidRequest when the replica's ranks cannot share its heads."""
        if num_heads := getattr(config, "num_attention_heads", None):
            shape.check_heads(num_heads)

    def layers_for(self, component: str, config: ModelConfig, context: LoadContext) -> LayerContext:
        """What the module's layers are built with."""
        return context.layers

    def config(self, directory: Path) -> ModelConfig:
        """What `config.json` says. Raises CorruptCheckpoint without one, UnsupportedModel when we cannot be that."""
        try:
            return self.config_class.from_dict(read_json_object(directory / "config.json"))
        except InvalidRequest as error:
            raise UnsupportedModel(f"{directory.name}/config.json: {error.message}") from error


@dataclass(frozen=True)
class NativeEncoder(NativeModule):
    """A text encoder of ours, dealt to the ranks of a replica where that pays. Its config says a `size`, or why it has
    none."""

    def check_layout(self, config: ModelConfig, shape: ReplicaShape) -> None:
        """Any will do: what cannot be dealt is whole on every rank."""

    def layers_for(self, component: str, config: ModelConfig, context: LoadContext) -> LayerContext:
        """See NativeModule."""
        if context.layers.parallel.world.size == 1:
            return context.layers
        num_parameters, _ = weight_totals([without_memory(self.module_class, config, context.layers)])
        weight_bytes = num_parameters * context.dtype_of(component).itemsize
        size: EncoderSize | str = config.size  # type: ignore[attr-defined]
        return replace(context.layers, encoder=context.encoder_axes(component, size, weight_bytes=weight_bytes))


@dataclass(frozen=True)
class Tokenizer:
    """A component that turns text into token ids; any class that saves a `tokenizer.json`."""

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> TextTokenizer:
        return context.source.tokenizer(directory)


@dataclass(frozen=True)
class ImagePreprocessor:
    """A component that makes pixels of pictures for an image encoder; any class that says how in its JSON file."""

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> ImageProcessor:
        return load_image_processor(directory)


@dataclass(frozen=True)
class SchedulerConfig:
    """The content of `scheduler_config.json`; each request makes its own sampler of it."""

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> dict[str, Any]:
        return {**read_json_object(directory / "scheduler_config.json"), "_class_name": class_name}


ComponentLoader = Callable[[Path, str, LoadContext], Any]
"""(directory, class name of model_index.json, context) -> the component."""


def load_module(
    cls: type[ModuleT],
    config: ModelConfig,
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    context: LayerContext,
    source: ComponentSource | None = None,
    quantization: QuantizationArgs | None = None,
    runs_on: torch.device | None = None,
) -> ModuleT:
    """A `cls(config, context)` with the weights of `directory`, in evaluation mode and without gradients.

    The class may say `keep_in_fp32` (parts of dotted names whose parameters stay in fp32), `keep_in_fp32_with_fp16`
    (the same for fp16 only), `key_aliases` (a second name under which files store a shared tensor -> its own name),
    `stored_prefixes` (what may stand before all names in a file) and `unread_keys` (how the names of tensors begin that
    files may hold besides).
    A method `settle_weights` is called once the weights are there. Of a class with `keep_unquantized` (names of parts,
    where `*` is any text) the other linear layers are quantised where the files or `quantization` say so. `runs_on`
    is where it will compute, when that is not the device that it is loaded on.

    Raises: what the source (None: the checkpoint's files) raises when it has not all that the module needs.
    """
    module = without_memory(cls, config, context)
    kept, quantizer = _kept_in_fp32(cls, dtype), None
    if takes_quantization(cls):
        quantizer = LayerQuantizer(
            module, quantization or QuantizationArgs(), dtype=dtype, device=device, runs_on=runs_on
        )
    tensors = (source or Checkpoint()).tensors_for(
        directory,
        module,
        dtype_of=lambda name: _dtype_for(name, kept, dtype),
        device=device,
        quantizer=quantizer,
    )
    if quantizer is not None:
        tensors |= quantizer.install()
    module.load_state_dict(tensors, strict=True, assign=True)
    unset = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not unset, f"{cls.__name__}: buffers that no checkpoint holds must be computed where they are used: {unset}"
    join_projections(module)
    if (settle := getattr(module, "settle_weights", None)) is not None:
        settle()
    return module.eval().requires_grad_(False)


def without_memory(cls: type[ModuleT], config: ModelConfig, context: LayerContext) -> ModuleT:
    """A `cls(config, context)` whose tensors have shapes and no memory."""
    with built_without_memory():
        return cls(config, context)


@contextmanager
def built_without_memory() -> Iterator[None]:
    """Layers that are made meanwhile have tensors with shapes and no memory."""
    with torch.device("meta"), _NoInitialisation():
        yield


@contextmanager
def built_uninitialised(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Layers that are made meanwhile lie on the device, in this dtype, and hold whatever was there."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, _NoInitialisation():
            yield
    finally:
        torch.set_default_dtype(usual)


class _NoInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are.

    The checkpoint sets them anyway, and drawing random numbers without memory makes torch import its compiler: 5 s.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in ("torch.nn.init", "transformers.initialization"):
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            # A table that a constructor draws itself is small enough to be drawn.
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _match_keys(module: nn.Module, stored: StoredWeights, component: str) -> dict[str, str]:
    """Name in the module -> key in the file, for every name; raises CorruptCheckpoint unless all fit."""
    expected, aliases = whole_shapes(module), getattr(module, "key_aliases", {})
    unread: tuple[str, ...] = getattr(module, "unread_keys", ())
    names = {name: name for name in expected if name in stored.tensors}
    for alias, name in aliases.items():
        if alias in stored.tensors and name in expected:
            names.setdefault(name, alias)
    missing = [name for name in expected if name not in names]
    unexpected = [
        key for key in stored.tensors if key not in expected and key not in aliases and not key.startswith(unread)
    ]
    misshaped = [
        f"{key} (file {_shape(stored.tensors[key].shape)}, model {_shape(expected[name])})"
        for name, key in names.items()
        if stored.tensors[key].shape != expected[name]
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN_KEYS])}{', …' if len(keys) > _SHOWN_KEYS else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if keys
    ]
    if problems:
        raise CorruptCheckpoint(
            f"the weights in {stored.directory.name} do not fit {component}/config.json: " + "; ".join(problems)
        )
    return names


def _kept_in_fp32(cls: type[nn.Module], dtype: torch.dtype) -> frozenset[str]:
    kept = set(getattr(cls, "keep_in_fp32", ()))
    if dtype == torch.float16:
        kept.update(getattr(cls, "keep_in_fp32_with_fp16", ()))
    return frozenset(kept)


def _dtype_for(name: str, kept: frozenset[str], dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if kept.intersection(name.split(".")) else dtype


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def explain_reads(reads: Collection[ComponentRead]) -> Iterator[str]:
    """Sentences on how fast weights came to the device."""
    for read in reads:
        rate = read.num_bytes / max(read.seconds, 1e-9)
        yield f"{read.component}: {read.num_bytes / 1e9:.2f} GB read in {read.seconds:.2f} s, {rate / 1e9:.1f} GB/s"


def weight_totals(modules: Collection[nn.Module]) -> tuple[int, int]:
    """Number of parameters of the whole modules, and bytes of all tensors that this rank holds of them. Scales of
    quantised weights count as bytes alone."""
    num_parameters = 0
    for module in modules:
        shards = shards_of(module)
        for name, parameter in module.named_parameters():
            if name.endswith(f".{SCALE_NAME}"):
                continue
            num_parameters += parameter.numel() * (shards[name].axis.size if name in shards else 1)
    return num_parameters, sum(tensor.nbytes for module in modules for tensor in tensors_of(module))
