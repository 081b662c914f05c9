"""Complex tensors as pairs of real ones, and Fourier transforms as products with matrices of cosines and sines.

Every rule works on pairs and calls operators on real tensors only. The matrices are computed in float64 and stored with
the model as float32 constants, one pair per length, so a transform of n points costs n^2 multiply-accumulates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from edgec.importing.operators import by_overload

aten = torch.ops.aten

FLOATS = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}


@dataclass(frozen=True)
class Pair:
    """A complex tensor: real and imaginary part, of one shape."""

    re: Any
    im: Any

    @property
    def shape(self) -> Any:
        return self.re.shape

    def dim(self) -> int:
        return self.re.dim()

    def map(self, function: Callable[[Any], Any]) -> Pair:
        return Pair(function(self.re), function(self.im))


COMPLEX = (torch.complex32, torch.complex64, torch.complex128)


def has_pairs(value: Any) -> bool:
    return any(isinstance(leaf, Pair) for leaf in tree_leaves(value, is_leaf=lambda v: isinstance(v, Pair)))


def makes_pairs(target: Any, node: fx.Node) -> bool:
    """Whether a call gives complex tensors, or is a transform that works on them inside."""
    values = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return any(v.is_complex() for v in values) or target in TRANSFORMS


def call_pairs(run: Any, target: Any, args: Any, kwargs: Any) -> Any:
    """What a call gives on pairs; raises EdgecError where there is no rule for the operator."""
    if target is operator.getitem:
        return args[0][args[1]]
    rule = TRANSFORMS.get(target) or ARITHMETIC.get(target)
    if rule is not None:
        return rule(run, *args, **kwargs)
    if target in PARTWISE:
        return _partwise(target, args, kwargs)
    if _writes_first(target) and isinstance(args[0], Pair):
        return _in_place(run, target, args, kwargs)
    raise run.error(
        f"{target} of complex tensors has no rule", "write this operation with real and imaginary parts in two tensors"
    )


def _writes_first(target: Any) -> bool:
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
    return name.endswith("_") and target._schema.is_mutable


def _in_place(run: Any, target: Any, args: Any, kwargs: Any) -> Pair:
    """`copy_` and what has a functional form: both parts are overwritten, which views of them see."""
    x = args[0]
    if target is aten.copy_.default:
        new = args[1]
    else:
        packet = getattr(aten, target._schema.name.split("::")[1][:-1], None)
        functional = getattr(packet, target._overloadname, None)
        if functional not in ARITHMETIC and functional not in PARTWISE:
            raise run.error(
                f"{target} of complex tensors has no rule", "write real and imaginary parts into two tensors"
            )
        new = call_pairs(run, functional, args, kwargs)
    new = _pair(new)
    return Pair(x.re.copy_(new.re), x.im.copy_(new.im))


def _partwise(target: Any, args: Any, kwargs: Any) -> Any:
    """An operator that treats both parts alike, as moving elements and sums do."""

    def part(name: str) -> Any:
        def pick(value: Any) -> Any:
            return getattr(value, name) if isinstance(value, Pair) else value

        def zeros(value: Any) -> Any:
            # A real tensor beside complex ones, in a concatenation.
            return value if name == "re" or not isinstance(value, torch.Tensor) else torch.zeros_like(value)

        first = args[0]
        if isinstance(first, (list, tuple)):
            first = [pick(v) if isinstance(v, Pair) else zeros(v) for v in first]
        else:
            first = pick(first)
        rest = tree_map(pick, args[1:], is_leaf=lambda v: isinstance(v, Pair))
        options = tree_map(pick, kwargs, is_leaf=lambda v: isinstance(v, Pair))
        return target(first, *rest, **_real_types(options))

    re, im = part("re"), part("im")
    return tuple(Pair(a, b) for a, b in zip(re, im, strict=True)) if isinstance(re, (tuple, list)) else Pair(re, im)


def _real_types(options: dict[str, Any]) -> dict[str, Any]:
    return {k: FLOATS.get(v, v) if k == "dtype" else v for k, v in options.items()}


def _pair(x: Any) -> Pair:
    if isinstance(x, Pair):
        return x
    if isinstance(x, complex):
        return Pair(x.real, x.imag)
    if isinstance(x, torch.Tensor):
        x = x if x.dtype.is_floating_point else x.to(torch.float32)
        return Pair(x, torch.zeros_like(x))
    return Pair(x, 0.0)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _is_real(x: Any) -> bool:
    return not isinstance(x, (Pair, complex))


def _sum(sign: int) -> Callable[..., Pair]:
    def rule(run: Any, a: Any, b: Any, alpha: Any = 1) -> Pair:
        factor = sign * alpha
        if _is_real(a) and isinstance(b, Pair):
            return Pair(a + factor * b.re, factor * b.im)
        a = _pair(a)
        if _is_real(b):
            re = a.re + factor * b
            shape = re.shape if isinstance(b, torch.Tensor) else a.shape
            return Pair(re, a.im.expand(shape))
        b = _pair(b)
        return Pair(a.re + factor * b.re, a.im + factor * b.im)

    return rule


def _times(a: Any, b: Any, product: Callable[[Any, Any], Any] = lambda x, y: x * y) -> Pair:
    """A product, by any function that is linear in both operands."""
    if _is_real(b):
        return Pair(product(a.re, b), product(a.im, b))
    if _is_real(a):
        return Pair(product(a, b.re), product(a, b.im))
    a, b = _pair(a), _pair(b)
    return Pair(product(a.re, b.re) - product(a.im, b.im), product(a.re, b.im) + product(a.im, b.re))


def _divide(a: Any, b: Any) -> Pair:
    if _is_real(b):
        return _pair(a).map(lambda part: part / b)
    b = _pair(b)
    square = b.re * b.re + b.im * b.im
    return _times(a, Pair(b.re / square, -b.im / square))


def _absolute(x: Pair) -> Any:
    return torch.sqrt(x.re * x.re + x.im * x.im)


def _power(run: Any, x: Pair, exponent: Any) -> Pair:
    if isinstance(exponent, (int, float)) and exponent == int(exponent) and 0 < exponent <= 8:
        result = x
        for _ in range(int(exponent) - 1):
            result = _times(result, x)
        return result
    raise run.error(
        f"a complex tensor to the power of {exponent}", "use a small whole number, or write it in polar form"
    )


def _exponential(run: Any, x: Pair) -> Pair:
    size = torch.exp(x.re)
    return Pair(size * torch.cos(x.im), size * torch.sin(x.im))


def _bilinear(product: Callable[..., Any]) -> Callable[..., Pair]:
    return lambda run, a, b: _times(a, b, product)


def _linear(run: Any, x: Any, weight: Any, bias: Any = None) -> Pair:
    y = _times(x, weight, lambda a, b: F.linear(a, b))
    return y if bias is None else _sum(1)(run, y, bias)


def _addmm(run: Any, c: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Pair:
    return _sum(1)(run, _times(_times(a, b, torch.matmul), alpha), c if beta == 1 else _times(c, beta))


def _einsum(run: Any, equation: str, operands: Sequence[Any], path: Any = None) -> Any:
    if len(operands) == 1:
        return operands[0].map(lambda part: torch.einsum(equation, part))
    if len(operands) != 2:
        raise run.error("einsum of more than two complex tensors has no rule", "multiply two at a time")
    return _times(operands[0], operands[1], lambda a, b: torch.einsum(equation, a, b))


def _where(run: Any, condition: Any, a: Any, b: Any) -> Pair:
    a, b = _pair(a), _pair(b)
    return Pair(torch.where(condition, a.re, b.re), torch.where(condition, a.im, b.im))


def _convert(run: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    kinds = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype)]
    if isinstance(x, Pair):
        # To a real type: the imaginary part is dropped, as PyTorch does.
        return x if not kinds or kinds[0].is_complex else x.re.to(kinds[0])
    return _pair(x.to(FLOATS[kinds[0]]))


def _filled(make: Callable[..., Any]) -> Callable[..., Pair]:
    def rule(run: Any, *args: Any, **kwargs: Any) -> Pair:
        args = tuple(a.re if isinstance(a, Pair) else a for a in args)
        re = make(*args, **_real_types({"dtype": torch.complex64, **kwargs}))
        return Pair(re, torch.zeros_like(re))

    return rule


def _complex_scalar(run: Any, value: Any, **options: Any) -> Pair:
    return Pair(torch.tensor(float(value.real)), torch.tensor(float(value.imag)))


def _sign(run: Any, x: Pair) -> Pair:
    size = _absolute(x)
    safe = torch.where(size > 0, size, torch.ones_like(size))
    return Pair(x.re / safe, x.im / safe)


def _norm(run: Any, x: Pair, order: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return torch.linalg.vector_norm(_absolute(x), order, dim, keepdim)


def _stack_parts(run: Any, x: Pair) -> Any:
    return torch.stack([x.re, x.im], -1)


def _flip_fft(forward: bool) -> Callable[..., Any]:
    def rule(run: Any, x: Any, dim: Any = None) -> Any:
        axes = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        steps = [x.shape[a] // 2 if forward else (x.shape[a] + 1) // 2 for a in axes]

        def move(part: Any) -> Any:
            for axis, step in zip(axes, steps, strict=True):
                size = part.shape[axis]
                part = torch.cat([part.narrow(axis, size - step, step), part.narrow(axis, 0, size - step)], axis)
            return part

        return x.map(move) if isinstance(x, Pair) else move(x)

    return rule


# -- Fourier transforms ------------------------------------------------------------------------------------------------


def _matrices(run: Any, rows: int, columns: int, n: int) -> tuple[Any, Any]:
    """float32 cos and -sin of 2 pi j k / n for j < rows, k < columns; exact zeros and ones where they belong.

    The sine is negative so that imaginary parts that vanish are +0, as PyTorch's are: they decide angles of -pi or pi.
    """

    def make(cosine: bool) -> Callable[[], torch.Tensor]:
        def compute() -> torch.Tensor:
            turns = (torch.arange(rows).unsqueeze(1) * torch.arange(columns)) % n
            angles = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
            table = torch.cos(angles) if cosine else -torch.sin(angles)
            quarter = torch.arange(n) * 4
            for k, value in enumerate((1, 0, -1, 0) if cosine else (0, -1, 0, 1)):
                table[quarter == k * n] = value
            return table[turns].to(torch.float32)

        return compute

    names = [f"dft_{part}_{rows}x{columns}_of_{n}" for part in ("cos", "sin")]
    return tuple(run.constant(*entry) for entry in zip(names, (make(True), make(False)), strict=True))  # type: ignore[return-value]


def _last(x: Any, dim: int) -> Any:
    return x.map(lambda part: part.movedim(dim, -1)) if isinstance(x, Pair) else x.movedim(dim, -1)


def _back(x: Any, dim: int) -> Any:
    return x.map(lambda part: part.movedim(-1, dim)) if isinstance(x, Pair) else x.movedim(-1, dim)


def _resized(x: Any, size: int) -> Any:
    """The last axis cut or filled with zeros."""

    def one(part: Any) -> Any:
        have = part.shape[-1]
        return part if have == size else part[..., :size] if have > size else F.pad(part, (0, size - have))

    return x.map(one) if isinstance(x, Pair) else one(x)


def _size(run: Any, x: Any, dim: int) -> int:
    size = x.shape[dim]
    if not isinstance(size, int):
        raise run.error("a Fourier transform over a dynamic axis", "export with a static size of this axis")
    return size


def _complex_axis(run: Any, x: Any, dim: int, inverse: bool, n: int | None = None, half: bool = False) -> Pair:
    """The transform of one axis, not normalised; `half`: only the first n // 2 + 1 values."""
    n = _size(run, x, dim) if n is None else n
    x = _resized(_last(x, dim), n)
    cos, sin = _matrices(run, n, n // 2 + 1 if half else n, n)
    if isinstance(x, Pair) and inverse:
        re, im = x.re @ cos + x.im @ sin, x.im @ cos - x.re @ sin
    elif isinstance(x, Pair):
        re, im = x.re @ cos - x.im @ sin, x.im @ cos + x.re @ sin
    else:
        re, im = x @ cos, -(x @ sin) if inverse else x @ sin
    return _back(Pair(re, im), dim)


def _real_axis(run: Any, x: Any, dim: int, n: int) -> Any:
    """The real values of length n whose half spectrum is x, not normalised; imaginary parts of real bins are unread."""
    x = _resized(_last(_pair(x), dim), n // 2 + 1)
    cos, sin = _matrices(run, n // 2 + 1, n, n)
    weight = run.constant(f"dft_half_of_{n}", lambda: _half_weights(n))
    return _back((x.re * weight) @ cos + (x.im * weight) @ sin, dim)


def _half_weights(n: int) -> torch.Tensor:
    weight = torch.full((n // 2 + 1,), 2.0)
    weight[0] = 1.0
    if n % 2 == 0:
        weight[-1] = 1.0
    return weight


def _scaled(x: Any, sizes: Sequence[int], norm: Any, inverse: bool) -> Any:
    """Normalised; norm is PyTorch's name, or the number of its inner operators: 0 none, 1 by the root, 2 by n."""
    count = math.prod(sizes)
    name = {None: "backward", 0: "none", 1: "ortho", 2: "full"}.get(norm, norm)
    divide = name == "full" or (name == "backward" and inverse) or (name == "forward" and not inverse)
    factor = 1 / math.sqrt(count) if name == "ortho" else 1 / count if divide else 1.0
    if factor == 1.0:
        return x
    return x.map(lambda part: part * factor) if isinstance(x, Pair) else x * factor


def _axes(run: Any, x: Any, sizes: Any, dims: Any) -> tuple[list[int], list[int | None]]:
    rank = x.dim()
    if dims is None:
        axes = list(range(rank)) if sizes is None else list(range(rank - len(sizes), rank))
    else:
        axes = [int(d) % rank for d in dims]
    return axes, [None] * len(axes) if sizes is None else [None if s == -1 else int(s) for s in sizes]


def _forward(run: Any, x: Any, sizes: Any, dims: Any, norm: Any, inverse: bool = False, real: bool = False) -> Pair:
    axes, wanted = _axes(run, x, sizes, dims)
    lengths = [_size(run, x, a) if s is None else s for a, s in zip(axes, wanted, strict=True)]
    for number, (axis, n) in enumerate(reversed(list(zip(axes, lengths, strict=True)))):
        x = _complex_axis(run, x, axis, inverse, n, half=real and number == 0)
    return _scaled(x, lengths, norm, inverse)


def _to_real(run: Any, x: Any, sizes: Any, dims: Any, norm: Any, inverse: bool = True) -> Any:
    axes, wanted = _axes(run, x, sizes, dims)
    lengths = [_size(run, x, a) if s is None else s for a, s in zip(axes, wanted, strict=True)]
    if wanted[-1] is None:
        lengths[-1] = 2 * (_size(run, x, axes[-1]) - 1)
    if not inverse:
        x = _pair(x)
        x = Pair(x.re, -x.im)
    for axis, n in zip(axes[:-1], lengths[:-1], strict=True):
        x = _complex_axis(run, x, axis, True, n)
    return _scaled(_real_axis(run, x, axes[-1], lengths[-1]), lengths, norm, inverse)


def _one(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """fft.*(x, n, dim, norm)."""
    return lambda run, x, n=None, dim=-1, norm=None: function(run, x, None if n is None else [n], [dim], norm, **fixed)


def _two(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """fft.*2(x, s, dim, norm)."""
    return lambda run, x, s=None, dim=(-2, -1), norm=None: function(run, x, s, dim, norm, **fixed)


def _many(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """fft.*n(x, s, dim, norm)."""
    return lambda run, x, s=None, dim=None, norm=None: function(run, x, s, dim, norm, **fixed)


def _r2c(run: Any, x: Any, dims: Any, normalization: int, onesided: bool) -> Pair:
    return _forward(run, x, None, dims, normalization, real=onesided)


def _c2r(run: Any, x: Any, dims: Any, normalization: int, last: int) -> Any:
    sizes = [*[-1] * (len(dims) - 1), last]
    return _to_real(run, x, sizes, dims, normalization)


def _c2c(run: Any, x: Any, dims: Any, normalization: int, forward: bool) -> Pair:
    return _forward(run, x, None, dims, normalization, inverse=not forward)


def _centred(window: Any, width: int, n_fft: int) -> torch.Tensor:
    """A window of `width` elements, ones where none is given, in the middle of n_fft."""
    before = (n_fft - width) // 2
    return F.pad(torch.ones(width) if window is None else window, (before, n_fft - width - before))


def _stft(
    run: Any,
    x: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    center: bool = False,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Any:
    """Frames times window, then one transform of all frames: [..., frequencies, frames]."""
    if isinstance(x, Pair) or isinstance(window, Pair):
        raise run.error("stft of a complex signal has no rule", "transform real and imaginary part on their own")
    hop, width = hop_length or n_fft // 4, win_length or n_fft
    if center:
        batch = x.reshape(1, *([1] * (x.dim() == 1)), *x.shape)
        x = F.pad(batch, (n_fft // 2, n_fft // 2), pad_mode).reshape(*x.shape[:-1], -1)
    frames = x.unfold(-1, n_fft, hop)
    if window is not None or width < n_fft:
        frames = frames * _centred(window, width, n_fft)
    half = True if onesided is None else onesided
    y = _complex_axis(run, frames, frames.dim() - 1, False, n_fft, half=half)
    y = _scaled(y, [n_fft], "ortho" if normalized else "none", False)
    y = y.map(lambda part: part.transpose(-1, -2))
    return y if return_complex is not False else _stack_parts(run, y)


def _stft_plain(
    run: Any,
    x: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Any:
    return _stft(
        run, x, n_fft, hop_length, win_length, window, False, "", normalized, onesided, return_complex, align_to_window
    )


def _istft(
    run: Any,
    x: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Any:
    """One transposed convolution: its kernel holds the inverse transform times the window, its stride is the hop."""
    if return_complex or isinstance(window, Pair):
        raise run.error("istft of a complex signal has no rule", "transform real and imaginary part on their own")
    bins, frames = x.shape[-2:]
    half = bins != n_fft or onesided is True or (onesided is None and n_fft == 1)
    hop, width = hop_length or n_fft // 4, win_length or n_fft
    window = _centred(window, width, n_fft)
    cos, sin = _matrices(run, bins, n_fft, n_fft)
    scale = 1 / math.sqrt(n_fft) if normalized else 1 / n_fft
    if half:
        share = run.constant(f"dft_half_of_{n_fft}", lambda: _half_weights(n_fft)).unsqueeze(1) * scale
        cos, sin = cos * share, sin * share
    else:
        cos, sin = cos * scale, sin * scale
    kernel = (torch.cat([cos, sin]) * window).unsqueeze(1)
    maps = torch.cat([x.re, x.im], -2).reshape(-1, 2 * bins, frames)
    signal = F.conv_transpose1d(maps, kernel, stride=hop).squeeze(1)
    cover = F.conv_transpose1d(torch.ones(1, 1, frames), (window * window).reshape(1, 1, -1), stride=hop).reshape(-1)
    first = n_fft // 2 if center else 0
    have = n_fft + hop * (frames - 1)
    last = first + length if length is not None else have - first
    inside = slice(first, min(last, have))
    signal = signal[:, inside] / cover[inside]
    if last > have:
        signal = F.pad(signal, (0, last - have))
    return signal.reshape(*x.shape[:-2], last - first)


# -- tables ------------------------------------------------------------------------------------------------------------


TRANSFORMS: dict[Any, Callable[..., Any]] = by_overload(
    {
        "view_as_complex": lambda run, x: Pair(*(p.squeeze(-1) for p in x.split(1, -1))),
        "view_as_complex_copy": lambda run, x: Pair(*(p.squeeze(-1) for p in x.split(1, -1))),
        "view_as_real": _stack_parts,
        "view_as_real_copy": _stack_parts,
        "complex": lambda run, re, im: Pair(*torch.broadcast_tensors(re, im)),
        "polar": lambda run, size, angle: Pair(size * torch.cos(angle), size * torch.sin(angle)),
        "fft_fft": _one(_forward),
        "fft_ifft": _one(_forward, inverse=True),
        "fft_rfft": _one(_forward, real=True),
        "fft_irfft": _one(_to_real),
        "fft_hfft": _one(_to_real, inverse=False),
        "fft_ihfft": lambda run, x, n=None, dim=-1, norm=None: _forward(
            run, x, None if n is None else [n], [dim], norm, inverse=True, real=True
        ),
        "fft_fft2": _two(_forward),
        "fft_ifft2": _two(_forward, inverse=True),
        "fft_rfft2": _two(_forward, real=True),
        "fft_irfft2": _two(_to_real),
        "fft_fftn": _many(_forward),
        "fft_ifftn": _many(_forward, inverse=True),
        "fft_rfftn": _many(_forward, real=True),
        "fft_irfftn": _many(_to_real),
        "_fft_r2c": _r2c,
        "_fft_c2r": _c2r,
        "_fft_c2c": _c2c,
        "istft": _istft,
        "stft.center": _stft,
        "stft": _stft_plain,
    }
)

# Operators that also work on real tensors: they are asked only where a pair comes in or goes out.
ARITHMETIC: dict[Any, Callable[..., Any]] = by_overload(
    {
        "real": lambda run, x: x.re,
        "imag": lambda run, x: x.im,
        "abs": lambda run, x: _absolute(x),
        "angle": lambda run, x: torch.atan2(x.im, x.re),
        "conj": lambda run, x: Pair(x.re, -x.im),
        "_conj": lambda run, x: Pair(x.re, -x.im),
        "conj_physical": lambda run, x: Pair(x.re, -x.im),
        "_conj_physical": lambda run, x: Pair(x.re, -x.im),
        "resolve_conj": lambda run, x: x,
        "resolve_neg": lambda run, x: x,
        "add.Tensor": _sum(1),
        "add.Scalar": _sum(1),
        "sub.Tensor": _sum(-1),
        "sub.Scalar": _sum(-1),
        "rsub.Scalar": lambda run, a, b, alpha=1: _sum(-1)(run, b, a, alpha),
        "mul.Tensor": lambda run, a, b: _times(a, b),
        "mul.Scalar": lambda run, a, b: _times(a, b),
        "div.Tensor": lambda run, a, b: _divide(a, b),
        "div.Scalar": lambda run, a, b: _divide(a, b),
        "reciprocal": lambda run, x: _divide(Pair(torch.ones_like(x.re), torch.zeros_like(x.re)), x),
        "square": lambda run, x: _times(x, x),
        "pow.Tensor_Scalar": _power,
        "exp": _exponential,
        "sgn": _sign,
        "matmul": _bilinear(torch.matmul),
        "mm": _bilinear(torch.matmul),
        "bmm": _bilinear(torch.matmul),
        "linear": _linear,
        "addmm": _addmm,
        "einsum": _einsum,
        "where.self": _where,
        "where.ScalarOther": _where,
        "to.dtype": _convert,
        "to.dtype_layout": _convert,
        "to.device": _convert,
        "_to_copy": _convert,
        "zeros": _filled(torch.zeros),
        "zeros_like": _filled(torch.zeros_like),
        "new_zeros": _filled(lambda x, size, **o: torch.zeros(size, dtype=o["dtype"])),
        "ones": _filled(torch.ones),
        "ones_like": _filled(torch.ones_like),
        "linalg_vector_norm": _norm,
        "scalar_tensor": _complex_scalar,
        "fft_fftshift": _flip_fft(True),
        "fft_ifftshift": _flip_fft(False),
    }
)

# Operators that treat both parts alike.
PARTWISE = frozenset(
    by_overload(
        dict.fromkeys(
            (
                *("neg", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "positive"),
                *("reshape", "view", "_unsafe_view", "flatten.using_ints", "unflatten.int", "expand", "expand_as"),
                *("permute", "transpose.int", "t", "numpy_T", "mT", "movedim.int", "movedim.intlist", "swapaxes"),
                *("unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "select.int", "slice.Tensor", "narrow"),
                *(
                    "index.Tensor",
                    "index_select",
                    "gather",
                    "roll",
                    "flip",
                    "repeat",
                    "tile",
                    "repeat_interleave.self_int",
                ),
                *(
                    "cat",
                    "stack",
                    "concat",
                    "hstack",
                    "vstack",
                    "split.Tensor",
                    "split_with_sizes",
                    "chunk",
                    "unbind.int",
                ),
                *("split.sizes", "sum", "sum.dim_IntList", "mean", "mean.dim", "cumsum", "constant_pad_nd", "pad"),
                *("tril", "triu", "diagonal", "view_copy", "permute_copy", "slice_copy.Tensor", "unsqueeze_copy"),
                *("dropout", "feature_dropout", "atleast_1d", "atleast_2d", "rot90", "broadcast_to"),
            )
        )
    )
)
