"""Operators of a recorded graph, as the MAC count sees them: which convolve, which multiply matrices, which do neither.

The tables name operators of both kinds of recording: whole ones (inference mode) and the decomposed or
device-specific ones of a live call. What is in no table, and by torch's tags and schemas neither pointwise nor a
view, is "unknown", until a user says how it is counted (`handle`).

MACs are those of convolutions and matrix products; 1 MAC = 2 FLOPs. They follow from an operator's recorded shapes:
no weights, no arithmetic, any device. fvcore's own op handles do the counting: the nodes are shown to them as the jit
values they expect. Where fvcore has no handle (`convolution`, every attention operator) or another idea (`matmul`
that broadcasts, `einsum` rounded to four digits), the shapes are first brought into a form that a handle counts
exactly, or the products are counted here. An operator that is neither counted nor known to multiply-accumulate
nothing is of kind "unknown", so that a report can name it: never a silent 0.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import fx

from clockwork_hooks._tree import map_leaves
from clockwork_hooks.errors import ArgumentError, CountError, is_whole

OperatorKind = Literal["convolution", "linear", "matmul", "attention", "norm", "none", "unknown"]


def _names(text: str) -> list[str]:
    """Operator names from a block of words; those without a namespace are aten's."""
    return [name if "::" in name else f"aten::{name}" for name in text.split()]


# operator → does it transpose: no, yes, or (None) its argument 6 says so
CONVOLUTIONS: dict[str, bool | None] = {
    **dict.fromkeys(
        _names(
            """
            conv1d conv2d conv3d thnn_conv2d _slow_conv2d_forward slow_conv3d slow_conv3d_forward slow_conv_dilated2d
            slow_conv_dilated3d _conv_depthwise2d conv_depthwise3d cudnn_convolution cudnn_convolution_relu
            cudnn_convolution_add_relu miopen_convolution miopen_convolution_relu _mps_convolution
            miopen_convolution_add_relu miopen_depthwise_convolution mkldnn_convolution mkldnn::_convolution_pointwise
            _nnpack_spatial_convolution
            """
        ),
        False,
    ),
    **dict.fromkeys(
        _names(
            """
            conv_transpose1d conv_transpose2d conv_transpose3d cudnn_convolution_transpose
            miopen_convolution_transpose slow_conv_transpose2d slow_conv_transpose3d _mps_convolution_transpose
            mkldnn::_convolution_transpose_pointwise
            """
        ),
        True,
    ),
    **dict.fromkeys(_names("convolution _convolution convolution_overrideable"), None),
}
LINEARS = frozenset(_names("linear mkldnn_linear mkldnn::_linear_pointwise _weight_int8pack_mm"))
# operator → positions of its two matrices
MATMULS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_names("matmul linalg_matmul mm bmm mv dot vdot _int_mm _scaled_mm _scaled_mm_v2"), (0, 1)),
    **dict.fromkeys(_names("addmm _addmm_activation addmv baddbmm addbmm"), (1, 2)),
}
SUMS = frozenset(_names("einsum inner tensordot"))
# attention over (batch, heads, length, width), over (batch, length, heads, width), with its projections
HEADS_FIRST = frozenset(
    _names(
        """
        scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _cudnn_attention_forward
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable
        """
    )
) | {"flex_attention"}
LENGTH_FIRST = frozenset(_names("_flash_attention_forward _efficient_attention_forward"))
BLOCKS = frozenset(_names("_native_multi_head_attention _transformer_encoder_layer_fwd"))
# operator → position of its weight, position of its flag `training` (batch norms; -1: never)
NORMS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(_names("group_norm layer_norm native_layer_norm rms_norm _fused_rms_norm"), (2, None)),
    **dict.fromkeys(_names("native_group_norm instance_norm"), (1, None)),
    **dict.fromkeys(
        _names(
            """
            batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit
            _batch_norm_impl_index
            """
        ),
        (1, 5),
    ),
    **dict.fromkeys(_names("_native_batch_norm_legit_no_training _batch_norm_no_update"), (1, -1)),
}
# multiply and accumulate nothing, though neither tag nor schema says so
FREE = frozenset(
    _names(
        """
        abs absolute adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool3d
        adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _add_batch_dim _add_relu addr
        all allclose alpha_dropout amax amin _aminmax aminmax _amp_update_scale __and__ any arange arccos arccosh arcsin
        arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere as_strided as_strided_scatter _assert_async
        _assert_scalar _assert_tensor_metadata atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d
        bartlett_window bernoulli binary_cross_entropy binary_cross_entropy_with_logits bincount binomial
        blackman_window block_diag broadcast_tensors bucketize cartesian_prod _cast_Byte _cast_Char _cast_Double
        _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short cat cauchy chalf channel_shuffle
        choose_qparams_optimized _chunk_cat clone _coalesce _coalesced col2im column_stack combinations complex concat
        concatenate constant_pad_nd contiguous copy _copy_from _copy_from_and_resize copysign cosine_similarity
        count_nonzero cross cudnn_grid_sampler cummax cummin cumprod cumsum cumulative_trapezoid data dequantize detach
        diag diag_embed diagflat diagonal_scatter diff _dim_arange _dirichlet_grad dist divide dropout dstack embedding
        _embedding_bag embedding_bag _embedding_bag_forward_only embedding_renorm empty
        _empty_per_channel_affine_quantized empty_quantized empty_strided eq equal exponential eye
        _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine
        fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine
        fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
        feature_alpha_dropout feature_dropout fill fill_diagonal _fill_mem_eff_dropout_mask fix flatten_dense_tensors
        flip fliplr flipud floor_divide fractional_max_pool2d fractional_max_pool3d frobenius_norm full
        _functional_assert_async _functional_assert_scalar _functional_sym_constrain_range
        _functional_sym_constrain_range_for_size _fused_dropout fused_moving_avg_obs_fake_quant
        _fused_moving_avg_obs_fq_helper _fused_moving_avg_obs_fq_helper_functional _fused_sdp_choice gather gcd ge gelu
        geometric ger glu gradient greater greater_equal grid_sampler grid_sampler_2d _grid_sampler_2d_cpu_fallback
        grid_sampler_3d gt hamming_window hann_window hardswish hash_tensor heaviside histc hstack huber_loss __iand__
        __ilshift__ im2col index index_add index_copy index_fill index_put _index_put_impl index_reduce index_select
        _indices_copy int_repr __ior__ __irshift__ _is_all_true _is_any_true is_nonzero isclose isin isreal item
        __ixor__ _jagged_to_padded_dense_forward kaiser_window kl_div kron kthvalue l1_loss _lazy_clone lcm le less
        less_equal lift lift_fresh linalg_cross linalg_matrix_norm linalg_norm linalg_vector_norm linspace
        _local_scalar_dense log_normal log_sigmoid log_sigmoid_forward _log_softmax log_softmax _logcumsumexp
        logcumsumexp logspace logsumexp __lshift__ lt masked_fill _masked_scale masked_scatter masked_select
        _masked_softmax max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
        max_pool3d_with_indices max_unpool2d max_unpool3d mean median meshgrid min mish mode mse_loss msort multinomial
        multiply nan_to_num nanmean nanmedian nanquantile nansum narrow_copy native_channel_shuffle native_dropout
        native_norm ne negative _nested_compute_contiguous_strides_offsets _nested_from_padded
        _nested_from_padded_and_nested_example _nested_from_padded_tensor _nested_get_jagged_dummy _nested_get_lengths
        _nested_get_max_seqlen _nested_get_min_seqlen _nested_get_offsets _nested_tensor_from_mask
        _nested_tensor_from_tensor_list _nested_tensor_size _nested_tensor_softmax_with_shape
        _nested_tensor_storage_offsets _nested_tensor_strides nested_to_padded_tensor new_empty new_empty_strided
        new_full new_ones new_zeros _new_zeros_with_same_feature_meta nonzero nonzero_numpy nonzero_static norm
        norm_except_dim normal normal_functional not_equal one_hot ones __or__ outer _pack_padded_sequence pad
        _pad_circular _pad_enum _pad_packed_sequence pad_sequence _padded_dense_to_jagged_forward pairwise_distance
        _pin_memory pixel_shuffle pixel_unshuffle poisson polar prelu _prelu_kernel _print prod put q_per_channel_scales
        q_per_channel_zero_points quantile quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic rand
        randint randn random randperm range reflection_pad1d reflection_pad2d reflection_pad3d relu6 _remove_batch_dim
        renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d requires_grad
        _reshape_copy _reshape_from_tensor resize resize_as _resize_output roll rot90 row_stack rrelu rrelu_with_noise
        rrelu_with_noise_functional __rshift__ rsub _safe_softmax _sample_dirichlet _saturate_weight_to_fp16
        scalar_tensor scatter scatter_add scatter_reduce searchsorted segment_reduce select_scatter set _shape_as_tensor
        slice_scatter smooth_l1_loss _softmax softmax sort _spdiags special_digamma special_erf special_erfc
        special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln
        special_i0 special_log1p special_log_softmax special_logit special_logsumexp special_multigammaln special_ndtr
        special_polygamma special_psi special_round special_sinc special_softmax special_xlogy split_with_sizes_copy
        squeeze _stack stack _standard_gamma _standard_gamma_grad std std_mean subtract sum sum_to_size swapaxes
        swapdims sym_numel sym_size sym_storage_offset sym_stride t take take_along_dim tensor threshold tile _to_copy
        _to_cpu _to_dense to_dense to_padded_tensor _to_sparse to_sparse topk trace _transform_bias_rescale_qkv
        transpose trapezoid trapz tril tril_indices triu triu_indices true_divide type_as unflatten_dense_tensors
        uniform _unique _unique2 unique_consecutive unique_dim unique_dim_consecutive unsafe_chunk _unsafe_index
        _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate unsafe_split unsafe_split_with_sizes
        _unsafe_view unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa
        _upsample_lanczos2d_aa upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d vander var
        var_mean vstack _weight_norm _weight_norm_interface where xlogy __xor__ zero zeros
        """
    )
)
SOFTMAXES = frozenset(_names("softmax _softmax _safe_softmax _masked_softmax special_softmax"))
# views, copies and casts
VIEWS = frozenset(
    _names(
        """
        t transpose permute numpy_T view reshape _unsafe_view _reshape_alias expand squeeze unsqueeze flatten select
        slice as_strided chunk split unbind to _to_copy contiguous clone detach alias
        """
    )
)
# what may stand between a product and its softmax: scales, masks, views
BETWEEN = VIEWS.union(
    _names(
        """
        mul div add sub neg rsub clamp tanh masked_fill where dropout native_dropout type_as unflatten movedim
        narrow split_with_sizes cat constant_pad_nd pad repeat tril triu nan_to_num view_as expand_as reshape_as
        """
    )
)
# names of what convolves, pools or interpolates: their operands' axes are batch, channels and space
SPATIAL = re.compile(
    r"_?(conv\d?d?|convolution|conv_transpose\dd|\w*_convolution|\w+_conv\w*|\w*pool\dd\w*|upsample_\w+|"
    r"pixel_(un)?shuffle|convolution_overrideable)$"
)


Handle = Callable[[tuple[Any, ...], Any], int]  # (arguments with shapes for tensors, shape of the output) → MACs

_registered: dict[str, Handle] = {}
_scoped: ContextVar[Mapping[str, Handle]] = ContextVar("handles", default=_registered)


def handle(operator: str, count: Handle | None) -> None:
    """Say how many MACs an operator has, for all counts from now on; it goes before what the library knows of it.

    For operators that a report lists as not counted: custom and quantised ones, and those that run code of yours
    (`torch.while_loop`). `flops_report(..., handles={...})` does it for one report.

    Args:
        operator: its name as the report lists it, "quantized::linear_dynamic"; "aten::" may be left out.
        count: called with the operator's arguments in the order of its schema, each tensor replaced by its shape, and
            with the output's shape (a tuple of shapes where there are several); returns MACs. None takes it back.

    Raises:
        ArgumentError: `operator` is no name, or `count` cannot be called.

    Example:
        >>> import math, torch
        >>> import clockwork_hooks as ch
        >>> @torch.library.custom_op("doc::gram", mutates_args=())
        ... def gram(x: torch.Tensor) -> torch.Tensor:
        ...     return x @ x.mT
        >>> class Gram(torch.nn.Module):
        ...     def forward(self, x):
        ...         return gram(x)
        >>> ch.flops_report(Gram(), torch.zeros(1, 4, 6)).uncounted[0].operator
        'doc::gram'
        >>> ch.graph.handle("doc::gram", lambda args, output: math.prod(output) * args[0][-1])
        >>> ch.flops_report(Gram(), torch.zeros(1, 4, 6)).full_macs  # 4·4 products of 6
        96
        >>> ch.graph.handle("doc::gram", None)
    """
    (name, counted), *_ = _checked({operator: count}).items()
    if counted is None:
        _registered.pop(name, None)
    else:
        _registered[name] = counted


@contextlib.contextmanager
def handles(counts: Mapping[str, Handle] | None) -> Iterator[None]:
    """`handle` for several operators, within the block and for this thread and task only.

    Args:
        counts: operator → what counts it, as in `handle`; None for no change.

    Raises:
        ArgumentError: as in `handle`.

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> with handles({"aten::fft_fft": lambda args, output: 5}):
        ...     traced = ch.trace(torch.nn.Identity(), torch.zeros(1, 3, 8))
    """
    own = {name: count for name, count in _checked(counts or {}).items() if count is not None}
    token = _scoped.set({**_scoped.get(), **own} if own else _scoped.get())
    try:
        yield
    finally:
        _scoped.reset(token)


def _checked(counts: Mapping[str, Handle | None]) -> dict[str, Handle | None]:
    """The same by names as `operator_name` gives them."""
    for name, count in counts.items() if isinstance(counts, Mapping) else [(None, counts)]:
        if not isinstance(name, str) or not name or not (count is None or callable(count)):
            raise ArgumentError(
                "an operator's handle is a function (arguments, output shape) → MACs under the operator's name",
                seen={"operator": repr(name), "handle": repr(count)},
                do='e.g. {"quantized::linear_dynamic": lambda args, output: math.prod(output) * args[0][-1]}',
            )
    return {name.removeprefix("aten::"): count for name, count in counts.items()}


def handle_of(node: fx.Node) -> Handle | None:
    """How the user counts this operator; None where nobody said so."""
    own = _scoped.get()
    return own.get(operator_name(node)) if own and node.op == "call_function" else None


def operator_name(node: fx.Node) -> str:
    """The operator's name as a reader knows it: "conv2d", "linear", "add"; with its namespace where that is not aten.

    Args:
        node: of a trace's graph, which stands for an operator.

    Returns:
        The name that reports print, and that `handle` takes.

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> traced = ch.trace(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
        >>> operator_name(traced.outputs[0])
        'conv2d'
    """
    return qualified_name(node.target).removeprefix("aten::")


@functools.cache
def qualified_name(target: Any) -> str:
    """The operator's schema name, "aten::conv2d", in-place variants under the name of the others."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target))
    name: str = schema.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_spatial(node: fx.Node) -> bool:
    """Is this a convolution, pooling or interpolation? Then its operands' axes are batch, channels and space."""
    return node.op == "call_function" and _is_spatial(node.target)


@functools.cache
def _is_spatial(target: Any) -> bool:
    return SPATIAL.match(qualified_name(target).removeprefix("aten::")) is not None


def kind(node: fx.Node) -> OperatorKind:
    """What the operator is to the count.

    Args:
        node: an operator of a recorded graph.

    Returns:
        "convolution", "linear" (a matrix product with a weight), "matmul" (any other), "attention" (an operator that
        holds attention products), "norm", "none" (known to multiply-accumulate nothing), or "unknown": it may,
        and nothing here can count it (RNNs, FFTs, grouped products, anything outside aten, nested tensors). What the
        user counts (`handle`) is a "matmul".

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> traced = ch.trace(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
        >>> kind(traced.outputs[0])
        'convolution'
    """
    if node.op != "call_function":
        return "none"
    if handle_of(node) is not None:
        return "matmul"
    operator_kind = _kind(node.target)
    if operator_kind not in ("none", "unknown") and any(source.meta.get("nested") for source in node.all_input_nodes):
        return "unknown"  # rows of different lengths: their number is nowhere in the shapes
    weighted = operator_kind == "matmul" and any(map(weight_of, node.all_input_nodes))
    return "linear" if weighted else operator_kind


@functools.cache
def _kind(target: Any) -> OperatorKind:
    name = qualified_name(target)
    if name in CONVOLUTIONS:
        return "convolution"
    if name in LINEARS:
        return "linear"
    if name in MATMULS or name in SUMS:
        return "matmul"
    if name in HEADS_FIRST or name in LENGTH_FIRST or name in BLOCKS:
        return "attention"
    if name in NORMS:
        return "norm"
    return "none" if _is_free(target, name) else "unknown"


def _is_free(target: Any, name: str) -> bool:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__module__", "") == "_operator"  # getitem
    space, _, base = name.partition("::")
    if space not in {"aten", "prims", "profiler"}:
        return False
    if name in FREE or base.endswith("_like") or (base.startswith("_foreach_") and base != "_foreach_mm"):
        return True
    if torch.Tag.pointwise in target.tags or not schema.returns:
        return True
    if base.endswith("_copy") or not any("Tensor" in str(value.type) for value in schema.arguments):
        return True  # a copied view, a tensor out of nothing
    returned = [value.alias_info for value in schema.returns]
    if any(alias is not None and not alias.is_write for alias in returned):
        return True  # a view
    return not any("Tensor" in str(value.type) for value in schema.returns)


def is_attention(node: fx.Node) -> bool:
    """Does this operator make attention products: an attention operator, or a product next to a softmax?"""
    operator_kind = kind(node)
    if operator_kind != "matmul":
        return operator_kind == "attention"
    if any(_leads(source, upward=True) for source in node.all_input_nodes):
        return True
    return any(_leads(user, upward=False) for user in node.users)


def _leads(node: fx.Node, *, upward: bool) -> bool:
    """Is there a softmax at the end of a chain of scales, masks and views?"""
    waiting, seen = [node], {node}
    while waiting:
        here = waiting.pop()
        name = qualified_name(here.target)
        if name in SOFTMAXES:
            return True
        if name in BETWEEN or here.target is operator.getitem:
            more = [other for other in (here.all_input_nodes if upward else here.users) if other not in seen]
            seen.update(more)
            waiting += more
    return False


def weight_of(node: fx.Node) -> fx.Node | None:
    """The parameter or buffer that this operand is, perhaps transposed, cast or expanded; None where it is none."""
    while node.op == "call_function" and qualified_name(node.target) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else None


Shape = tuple[int, ...]


class _Value:
    """What fvcore's handles ask of a `torch._C.Value`: a tensor's sizes, or a constant."""

    __slots__ = ("shape", "value")

    def __init__(self, shape: Sequence[int] | None, value: object = None) -> None:
        self.shape = shape
        self.value = value

    def isCompleteTensor(self) -> bool:
        return self.shape is not None

    def type(self) -> _Value:
        return self

    def sizes(self) -> list[int]:
        return list(self.shape or ())

    def toIValue(self) -> object:
        return self.value


@functools.cache
def _handles() -> ModuleType:
    """The handles of fvcore, from their file: the package around it loads checkpoints, losses and tables (0.2 s)."""
    name = "fvcore.nn.jit_handles"
    package = importlib.util.find_spec("fvcore") if name not in sys.modules else None
    folders = (package.submodule_search_locations or []) if package is not None else []
    file = next((path for folder in folders if (path := Path(folder, "nn", "jit_handles.py")).is_file()), None)
    spec = None if file is None else importlib.util.spec_from_file_location("fvcore_jit_handles", file)
    if spec is None or spec.loader is None:
        return importlib.import_module(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def node_macs(node: fx.Node, *, attention: bool = True, norms: str | None = None) -> int:
    """MACs of one recorded operator, from its recorded shapes.

    Args:
        node: an operator of a graph that `trace` or `record` made, in inference mode (whole `conv2d`, `linear`,
            attention) or of a live call (`convolution`, `addmm`, `bmm`, device-specific variants).
        attention: count attention products too: B·H·Lq·Lk·(d_qk + d_v), masked or not. False leaves out attention
            operators and the products of attention written by hand: matrix products without a weight whose result
            feeds a softmax, or with an operand that comes from one, through scales, masks, casts and views.
            Attention without a softmax cannot be told from another product, and stays counted.
        norms: "fvcore" adds its estimate for normalisations, 5 per element (4 without a weight; batch norm in
            evaluation 2 or 1); None counts none.

    Returns:
        MACs, as the user's `handle` counts them where there is one; 0 for operators of kind "none" and "unknown".

    Raises:
        ArgumentError: `norms` is neither None nor "fvcore".
        CountError: an operator that multiplies has no recorded shapes.

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> traced = ch.trace(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
        >>> node_macs(traced.outputs[0])  # 6·6 pixels, 8·3·3·3 weights
        7776

    Source: arXiv 2312.08128, Appendix A counts with `attention=False`.
    """
    if norms not in (None, "fvcore"):
        raise ArgumentError(
            'norms is None or "fvcore"', seen={"norms": norms}, do='pass norms="fvcore" or leave it out'
        )
    own = handle_of(node)
    if own is not None:
        return _counted(node, own)
    operator_kind = kind(node)
    if operator_kind == "none" or operator_kind == "unknown" or (operator_kind == "norm" and norms is None):
        return 0
    if operator_kind == "convolution":
        return _convolution(node)
    if operator_kind == "linear" and qualified_name(node.target) in LINEARS:
        return _linear(node)
    if operator_kind == "attention":
        return _attention(node, attention)
    if operator_kind == "norm":
        return _norm(node)
    if not attention and is_attention(node):
        return 0
    return _matmul(node)


def _counted(node: fx.Node, count: Handle) -> int:
    """What the user's handle says."""

    def shapes(value: Any) -> Any:
        return map_leaves(lambda leaf: leaf.meta.get("shape", ()) if isinstance(leaf, fx.Node) else leaf, value)

    parts = [user for user in node.users if user.target is operator.getitem]
    several = tuple(shapes(part) for part in sorted(parts, key=lambda part: int(str(part.args[1]))))
    macs = count(tuple(map(shapes, _arguments(node))), node.meta.get("shape", several))
    if not is_whole(macs, 0):
        raise CountError(
            "an operator's handle must return its MACs, a whole number of at least 0",
            seen={"operator": operator_name(node), "returned": repr(macs)},
            do="return an int",
        )
    return macs


# -- counting -------------------------------------------------------------------------------------------------------


def _convolution(node: fx.Node) -> int:
    arguments = _arguments(node)
    x, weight, out = _shape(node, arguments[0]), _shape(node, arguments[1]), _out(node)
    if len(x) < len(weight):  # unbatched
        x, out = (1, *x), (1, *out)
    transposed = CONVOLUTIONS[qualified_name(node.target)]
    if transposed is None:
        transposed = bool(arguments[6])
    return int(_handles().conv_flop_count(x, weight, out, transposed=transposed))


def _linear(node: fx.Node) -> int:
    arguments = _arguments(node)
    x, weight = _shape(node, arguments[0]), _shape(node, arguments[1])
    return int(_handles().linear_flop_jit([_Value(x), _Value((1, *weight)[-2:])], []))


def _matmul(node: fx.Node) -> int:
    name, arguments = qualified_name(node.target), _arguments(node)
    if name == "aten::einsum":
        return _einsum(arguments[0], [_shape(node, operand) for operand in arguments[1]], arguments[2])
    if name == "aten::inner":
        a = _shape(node, arguments[0])
        return math.prod((*_out(node), *a[-1:]))
    if name == "aten::tensordot":
        a = _shape(node, arguments[0])
        return math.prod((*_out(node), *(a[axis] for axis in arguments[2])))
    left, right = MATMULS[name]
    a, b = _shape(node, arguments[left]), _shape(node, arguments[right])
    a, b = (a if len(a) > 1 else (1, *a)), (b if len(b) > 1 else (*b, 1))  # a vector is a row or a column
    pairs = itertools.zip_longest(reversed(a[:-2]), reversed(b[:-2]), fillvalue=1)
    batch = math.prod(max(pair) for pair in pairs)  # batch axes broadcast
    return int(_handles().matmul_flop_jit([_Value((batch, *a[-2:])), _Value((batch, *b[-2:]))], []))


def _einsum(equation: str, shapes: Sequence[Shape], path: Sequence[int] | None) -> int:
    """Exact, pair by pair as torch contracts; a pair that shares no summed index is an elementwise product, no MAC.

    fvcore's handle knows two equations; for any other it reads the count that numpy prints, of four digits.
    """
    terms, _, out = equation.replace(" ", "").partition("->")
    operands, axes = [], 0  # label → size of each operand; broadcast axes are numbered from the last
    for term, shape in zip(terms.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        free = len(shape) - len(before) - len(after)
        axes = max(axes, free if dots else 0)
        operands.append(dict(zip([*before, *map(str, range(free, 0, -1)), *after], shape, strict=True)))
    letters = out.replace(".", "") if "->" in equation else [x for x in terms if x.isalpha() and terms.count(x) == 1]
    labels = {*letters, *map(str, range(1, axes + 1))}
    macs = 0
    while len(operands) > 1:
        pair = (0, len(operands) - 1 if len(operands) < len(shapes) else 1)
        if path is not None:
            pair, path = (path[0], path[1]), path[2:]
        b, a = (operands.pop(k) for k in sorted(pair, reverse=True))
        later = labels.union(*operands)
        sizes = {label: max(a.get(label, 1), b.get(label, 1)) for label in {*a, *b}}
        summed = {label for label in a if a[label] != 1 and b.get(label, 1) != 1} - later
        if summed:
            macs += math.prod(size for label, size in sizes.items() if label in later or label in summed)
        operands.append({label: size for label, size in sizes.items() if label in later})
    return macs


def _attention(node: fx.Node, products: bool) -> int:
    name, arguments = qualified_name(node.target), _arguments(node)
    if name in BLOCKS:
        return _block(node, arguments, products, encoder=name.endswith("fwd"))
    if not products:
        return 0
    q, k, v = (_shape(node, value) for value in arguments[:3])
    if name not in LENGTH_FIRST:
        return math.prod(_out(node)[:-1]) * k[-2] * (q[-1] + v[-1])
    if len(q) != 4 or arguments[3 if "flash" in name else 4] is not None:
        raise CountError(
            "attention over packed sequences of different lengths cannot be counted from shapes",
            seen={"operator": operator_name(node), "query": q},
            do="trace the model with padded, batched sequences",
        )
    return math.prod(q[:-1]) * k[1] * (q[-1] + v[-1])


def _block(node: fx.Node, arguments: Sequence[Any], products: bool, *, encoder: bool) -> int:
    """`nn.MultiheadAttention` or `nn.TransformerEncoderLayer` as one operator, as torch runs them in evaluation."""
    q, k, v = [_shape(node, arguments[0])] * 3 if encoder else [_shape(node, value) for value in arguments[:3]]
    rows, width = math.prod(q[:-1]), q[-1]
    macs = (2 * rows + math.prod(k[:-1]) + math.prod(v[:-1])) * width**2  # projections of query, output, key, value
    if encoder:
        macs += rows * sum(math.prod(_shape(node, arguments[weight])) for weight in (14, 16))
    return macs + 2 * rows * k[-2] * width if products else macs


def _norm(node: fx.Node) -> int:
    weight, training = NORMS[qualified_name(node.target)]
    arguments = _arguments(node)
    values = [_Value(None) for _ in range(6)]
    values[0] = _Value((1, math.prod(_shape(node, arguments[0]))))  # the handle refuses more than five axes
    values[1] = _Value(None if arguments[weight] is None else (1,))
    if training is None:
        return int(_handles().norm_flop_counter(1)(values, []))
    values[5] = _Value(None, bool(training >= 0 and arguments[training]))
    return int(_handles().batchnorm_flop_jit(values, []))


def _arguments(node: fx.Node) -> list[Any]:
    """The operator's arguments in its schema's order, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    arguments = schema.arguments[len(node.args) :] if schema is not None else ()
    return [*node.args, *(node.kwargs.get(value.name, value.default_value) for value in arguments)]


def _shape(node: fx.Node, value: Any) -> Shape:
    shape = value.meta.get("shape") if isinstance(value, fx.Node) else None
    if shape is None:
        raise CountError(
            "an operator's MACs follow from the recorded shapes of its tensors",
            seen={"operator": operator_name(node), "in": node.meta.get("module", "") or "the root", "operand": value},
            do="trace a call with plain, dense tensors",
        )
    return tuple(shape)


def _out(node: fx.Node) -> Shape:
    """Shape of the first output; operators with several are followed by `getitem` nodes that hold them."""
    if "shape" in node.meta:
        return tuple(node.meta["shape"])
    first = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    return _shape(node, first)
