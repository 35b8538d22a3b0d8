"""Products by cuBLASLt with an algorithm of our choice: y = x · wᵀ + b, and the tanh-GELU of that.

torch takes the algorithm that cuBLAS thinks is the fastest, which it reckons without the limit of power that long runs
meet. The algorithms are those that need no memory besides, so that two streams can run them at once.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

_MOST_CANDIDATES = 16
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class GemmShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an algorithm is chosen for: x [tokens, in_features], w [out_features, in_features], neighbouring features
    side by side; a row of w begins `weight_stride` behind the one before, one of x `input_stride`."""

    precision: str
    tokens: int
    in_features: int
    out_features: int
    input_stride: int
    weight_stride: int
    bias: bool
    gelu: bool

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.tokens * self.in_features * self.out_features

    def __str__(self) -> str:
        more = (", bias" if self.bias else "") + (", GELU" if self.gelu else "")
        return f"{self.tokens} tokens, {self.in_features} to {self.out_features} features{more}"


class GemmNotAvailable(Exception):
    """An algorithm that cannot compute a product after all."""


class GemmLibrary(Protocol):
    """Algorithms for products."""

    @property
    def version(self) -> str:
        """What its algorithms are valid for."""
        ...

    def candidates(self, shape: GemmShape) -> list[str]:
        """Names of those that are worth measuring."""
        ...

    def gemm(self, shape: GemmShape, algorithm: str) -> Gemm:
        """The product by one of them, for any number of tokens."""
        ...


class Gemm(Protocol):
    """A product by one algorithm."""

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """[N, I], [O, I] and [O] -> [N, O], in `out` where given, whose rows lie one behind the other.

        Raises: GemmNotAvailable.
        """
        ...


class CublasLt:
    """The library of a GPU. Raises at its making ImportError, or what its bindings raise, where it cannot be had."""

    def __init__(self) -> None:
        from nvmath.bindings import cublasLt

        self._lt: Any = cublasLt
        self._handle: int = cublasLt.create()
        self.version = str(cublasLt.get_version())

    def candidates(self, shape: GemmShape) -> list[str]:
        """See GemmLibrary: what the library itself would try, as the bytes that it knows them by."""
        lt, call = self._lt, _Call(self._lt, self._handle, shape)
        preference = lt.matmul_preference_create()
        none = np.zeros(1, dtype=np.uint64)
        limit = lt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES
        lt.matmul_preference_set_attribute(preference, limit, none.ctypes.data, none.nbytes)
        found, count = lt.MatmulHeuristicResult(_MOST_CANDIDATES), np.zeros(1, dtype=np.int32)
        layouts = call.layouts(shape.tokens)
        try:
            lt.matmul_algo_get_heuristic(
                *(self._handle, call.description, *layouts, layouts[-1], preference),
                *(_MOST_CANDIDATES, found.ptr, count.ctypes.data),
            )
        finally:
            lt.matmul_preference_destroy(preference)
        algorithms = np.frombuffer(found, dtype=lt.matmul_heuristic_result_dtype)["algo"]
        return [algorithm.tobytes().hex() for algorithm in algorithms[: count[0]]]

    def gemm(self, shape: GemmShape, algorithm: str) -> Gemm:
        """See GemmLibrary."""
        return _Call(self._lt, self._handle, shape, bytes.fromhex(algorithm))


class _Call:
    """A product as cuBLASLt sees it, whose matrices have neighbouring rows side by side: yᵀ = w · xᵀ."""

    def __init__(self, lt: Any, handle: int, shape: GemmShape, algorithm: bytes = b"") -> None:
        self._lt, self._handle, self._shape = lt, handle, shape
        self._type = {torch.bfloat16: 14, torch.float16: 2}[_PRECISIONS[shape.precision]]  # of CUDA's data types
        self._layouts: dict[int, tuple[int, int, int]] = {}
        single_precision, sums_in_single_precision = 0, 68
        self.description: int = lt.matmul_desc_create(sums_in_single_precision, single_precision)
        epilogue = lt.Epilogue
        kinds = {
            (False, False): epilogue.DEFAULT,
            (True, False): epilogue.BIAS,
            (False, True): epilogue.GELU,
            (True, True): epilogue.GELU_BIAS,
        }
        self._set("TRANSA", np.int32(1))
        self._set("TRANSB", np.int32(0))
        self._set("EPILOGUE", np.int32(kinds[shape.bias, shape.gelu]))
        # Read at each call, so they stay where they are.
        self._factors = np.array([1.0, 0.0], dtype=np.float32)
        self._bias_place = np.zeros(1, dtype=np.uint64)
        self._algorithm = np.frombuffer(algorithm, dtype=np.uint8).copy()
        self._algorithm_held_at = self._algorithm.ctypes.data
        self._one = self._factors.ctypes.data
        self._zero = self._one + self._factors.itemsize
        self._bias_held_at = self._bias_place.ctypes.data
        self._bias_attribute = int(lt.MatmulDescAttribute.BIAS_POINTER)

    def layouts(self, tokens: int) -> tuple[int, int, int]:
        """Of w, x and y."""
        if tokens not in self._layouts:
            shape, create = self._shape, self._lt.matrix_layout_create
            self._layouts[tokens] = (
                create(self._type, shape.in_features, shape.out_features, shape.weight_stride),
                create(self._type, shape.in_features, tokens, shape.input_stride),
                create(self._type, shape.out_features, tokens, shape.out_features),
            )
        return self._layouts[tokens]

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """See Gemm."""
        output = inputs.new_empty(inputs.shape[0], weight.shape[0]) if out is None else out
        if bias is not None:
            self._bias_place[0] = bias.data_ptr()
            self._lt.matmul_desc_set_attribute(self.description, self._bias_attribute, self._bias_held_at, 8)
        of_weight, of_inputs, of_output = self.layouts(inputs.shape[0])
        place, stream = output.data_ptr(), torch.cuda.current_stream(inputs.device).cuda_stream
        try:
            self._lt.matmul(
                *(self._handle, self.description, self._one, weight.data_ptr(), of_weight),
                *(inputs.data_ptr(), of_inputs, self._zero, place, of_output, place, of_output),
                *(self._algorithm_held_at, 0, 0, stream),
            )
        except self._lt.cuBLASLtError as error:
            raise GemmNotAvailable(str(error)) from error
        return output

    def _set(self, name: str, value: np.generic) -> None:
        held = np.array([value])
        attribute = self._lt.MatmulDescAttribute[name]
        self._lt.matmul_desc_set_attribute(self.description, attribute, held.ctypes.data, held.nbytes)
