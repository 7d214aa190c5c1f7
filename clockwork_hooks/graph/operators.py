"""Operators of a recorded graph, as the MAC count sees them: which convolve, which multiply matrices, which do neither.

The tables name operators of both kinds of recording: whole ones (inference mode) and the decomposed or device-specific
ones of a live call. What is in no table, and by torch's tags and schemas neither pointwise nor a view, is "unknown",
until a user says how it is counted (`handle`).
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import fx

from clockwork_hooks.errors import ArgumentError

__all__ = ["PRODUCTS", "Handle", "Kind", "handle", "handles", "is_attention", "is_spatial", "kind", "operator_name"]

Kind = Literal["convolution", "linear", "matmul", "attention", "norm", "none", "unknown"]
PRODUCTS = ("attention", "matmul")  # of two activations, in heads and tokens: their shapes name no level


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
    for name, count in counts.items():
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


def kind(node: fx.Node) -> Kind:
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
    return "linear" if operator_kind == "matmul" and _has_weight(node) else operator_kind


@functools.cache
def _kind(target: Any) -> Kind:
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


def _has_weight(node: fx.Node) -> bool:
    """Is an operand of this product a parameter or buffer, perhaps transposed, cast or expanded?"""
    for source in node.all_input_nodes:
        while source.op == "call_function" and qualified_name(source.target) in VIEWS:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            return True
    return False
