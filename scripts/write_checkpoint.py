"""Write a checkpoint of random numbers in the shape of a published one, to measure loading without a download.

    scripts/write_checkpoint.py black-forest-labs/FLUX.1-dev /scratch/flux
    sglang bench startup --model-path /scratch/flux

Configs are those of `configs/published/`; `--layers 2` writes fewer blocks of each kind, for a small one. What is
written is what a block of random numbers holds, again and again, straight to the disk: memory does not grow with the
checkpoint. Tokenizers are of a few words.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from sglang.multimodal_gen.configs.published import published_directory

_SHARD_BYTES = 10_000_000_000
_BLOCK_NUMBERS = 16 << 20
_DTYPES = {"bf16": (torch.bfloat16, "BF16"), "fp32": (torch.float32, "F32"), "fp16": (torch.float16, "F16")}
# How configs call the number of their blocks.
_LAYER_KEYS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_refiner_layers", "num_decoder_layers")
_VOCABULARY = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5}


def write_checkpoint(hub_id: str, target: Path, *, dtype: str, layers: int | None) -> dict[str, int]:
    """Bytes of the weights by component. Raises FileExistsError when the directory is there."""
    source = published_directory(hub_id)
    shutil.copytree(source, target)
    index = json.loads((target / "model_index.json").read_text(encoding="utf-8"))
    written = {}
    for name, listed in index.items():
        if not isinstance(listed, list) or None in listed:
            continue
        if name.startswith("tokenizer"):
            _write_tokenizer(target / name)
        elif (target / name / "config.json").is_file():
            _shorten(target / name / "config.json", layers)
            written[name] = _write_weights(target / name, *listed, dtype=dtype)
            sys.stdout.write(f"{name}: {written[name] / 1e9:.2f} GB\n")
    return written


def _shorten(path: Path, layers: int | None) -> None:
    if layers is None:
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {key: min(config[key], layers) for key in _LAYER_KEYS if isinstance(config.get(key), int)}
    path.write_text(json.dumps(config), encoding="utf-8")


def _write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_weights(directory: Path, library: str, class_name: str, *, dtype: str) -> int:
    torch_dtype, stored_dtype = _DTYPES[dtype]
    block = memoryview(_random_block(torch_dtype).view(torch.uint8).numpy())
    shapes = {name: tuple(tensor.shape) for name, tensor in _stored_tensors(directory, library, class_name).items()}
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    shards = list(_sharded(shapes, torch_dtype.itemsize))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / file).open("wb") as stream:
            _write_file(stream, {name: shapes[name] for name in names}, torch_dtype.itemsize, stored_dtype, block)
        weight_map |= dict.fromkeys(names, file)
    num_bytes = sum(map(math.prod, shapes.values())) * torch_dtype.itemsize
    if len(shards) > 1:
        content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return num_bytes


def _random_block(dtype: torch.dtype) -> torch.Tensor:
    """Small numbers around zero: activations of a model that nobody trained stay finite."""
    return (torch.randn(_BLOCK_NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def _stored_tensors(directory: Path, library: str, class_name: str) -> Mapping[str, torch.Tensor]:
    """Those that the class saves, without memory; of tied ones the first."""
    module = _module(directory, library, class_name)
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in module.state_dict().items() if name not in tied}


def _module(directory: Path, library: str, class_name: str) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers":
            cls: Any = getattr(diffusers, class_name)
            return cls.from_config(cls.load_config(directory))
        cls = getattr(transformers, class_name)
        return cls(cls.config_class.from_pretrained(directory))


def _sharded(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        size += math.prod(shape) * itemsize
        if names and size > _SHARD_BYTES:
            yield names
            names, size = [], math.prod(shape) * itemsize
        names.append(name)
    yield names


def _write_file(
    stream: BinaryIO, shapes: Mapping[str, tuple[int, ...]], itemsize: int, dtype: str, block: memoryview
) -> None:
    """A safetensors file: length of the header, header, and the tensors one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    while end:
        length = min(end, len(block))
        stream.write(block[:length])
        end -= length


def main() -> int:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hub_id", help="a published checkpoint, as `sglang models` lists them")
    parser.add_argument("directory", type=Path, help="where it goes; it must not exist yet")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the stored weights")
    parser.add_argument("--layers", type=int, help="at most as many blocks of each kind")
    arguments = parser.parse_args()
    written = write_checkpoint(arguments.hub_id, arguments.directory, dtype=arguments.dtype, layers=arguments.layers)
    sys.stdout.write(f"{sum(written.values()) / 1e9:.2f} GB in all\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
