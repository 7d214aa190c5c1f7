"""Operators of a recorded graph, as the MAC count sees them: which convolve, which multiply matrices, which do neither.

The tables name operators of both kinds of recording: whole ones (inference mode) and the decomposed or device-specific
ones of a live call. What is in no table, and by torch's tags and schemas neither pointwise nor a view, is "unknown".
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal

import torch
from torch import fx

__all__ = ["PRODUCTS", "Kind", "is_attention", "kind", "operator_name"]

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
    **dict.fromkeys(
        _names("convolution _convolution convolution_overrideable"),
        None,
    ),
}
LINEARS = frozenset(_names("linear mkldnn_linear mkldnn::_linear_pointwise _weight_int8pack_mm"))
# operator → positions of its two matrices
MATMULS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        _names("matmul linalg_matmul mm bmm mv dot vdot _int_mm _scaled_mm _scaled_mm_v2"),
        (0, 1),
    ),
    **dict.fromkeys(
        _names("addmm _addmm_activation addmv baddbmm addbmm"),
        (1, 2),
    ),
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
)
LENGTH_FIRST = frozenset(_names("_flash_attention_forward _efficient_attention_forward"))
BLOCKS = frozenset(_names("_native_multi_head_attention _transformer_encoder_layer_fwd"))
# operator → position of its weight, position of its flag `training` (batch norms; -1: never)
NORMS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(
        _names("group_norm layer_norm native_layer_norm rms_norm _fused_rms_norm"),
        (2, None),
    ),
    **dict.fromkeys(
        _names("native_group_norm instance_norm"),
        (1, None),
    ),
    **dict.fromkeys(
        _names(
            """
            batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit
            _batch_norm_impl_index
            """
        ),
        (1, 5),
    ),
    **dict.fromkeys(
        _names("_native_batch_norm_legit_no_training _batch_norm_no_update"),
        (1, -1),
    ),
}
# multiply and accumulate nothing, though neither tag nor schema says so
FREE = frozenset(
    _names(
        """
        absolute adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _add_relu all allclose alpha_dropout amax amin
        _aminmax aminmax any arange argmax argmin argsort argwhere _assert_async _assert_scalar
        _assert_tensor_metadata avg_pool1d avg_pool2d avg_pool3d bartlett_window bernoulli bincount blackman_window
        block_diag broadcast_tensors bucketize cartesian_prod cat channel_shuffle _chunk_cat clone col2im column_stack
        complex concat concatenate constant_pad_nd contiguous copy _copy_from count_nonzero cross cummax cummin
        cumprod cumsum detach diag_embed diff _dim_arange dist dropout embedding embedding_bag empty empty_strided
        equal eye feature_alpha_dropout feature_dropout fill flip fliplr flipud frobenius_norm full
        _functional_assert_async _fused_dropout _fused_sdp_choice gather ger glu grid_sampler grid_sampler_2d
        grid_sampler_3d hamming_window hann_window histc hstack im2col index index_add index_copy index_fill index_put
        _index_put_impl index_reduce index_select _indices_copy is_nonzero isclose isin item kaiser_window kthvalue
        _lazy_clone lift_fresh linalg_cross linalg_matrix_norm linalg_norm linalg_vector_norm linspace
        _local_scalar_dense log_softmax _log_softmax _logcumsumexp logcumsumexp logspace logsumexp masked_fill
        _masked_scale masked_scatter masked_select _masked_softmax max max_pool1d max_pool1d_with_indices max_pool2d
        max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d mean median meshgrid min
        mode msort multinomial nan_to_num nanmean nanmedian nansum narrow_copy native_channel_shuffle native_dropout
        new_empty new_empty_strided new_full new_ones new_zeros nonzero norm norm_except_dim normal normal_functional
        one_hot ones outer _pack_padded_sequence pad _pad_circular _pad_enum _pad_packed_sequence pad_sequence
        _pin_memory pixel_shuffle pixel_unshuffle polar prelu _prelu_kernel _print prod quantile rand randint randn
        random randperm range reflection_pad1d reflection_pad2d reflection_pad3d renorm repeat repeat_interleave
        replication_pad1d replication_pad2d replication_pad3d _reshape_copy resize resize_as _resize_output roll rot90
        _safe_softmax scalar_tensor scatter scatter_add scatter_reduce searchsorted select_scatter set
        _shape_as_tensor slice_scatter _softmax softmax sort special_softmax split_with_sizes_copy stack _stack std
        std_mean sum sum_to_size sym_numel sym_size sym_storage_offset sym_stride take take_along_dim tensor tile
        _to_copy _to_cpu _to_dense topk trace trapezoid tril tril_indices triu triu_indices uniform _unique _unique2
        unique_consecutive unique_dim unsafe_chunk _unsafe_index _unsafe_index_put _unsafe_masked_index
        _unsafe_masked_index_put_accumulate unsafe_split unsafe_split_with_sizes _unsafe_view upsample_bicubic2d
        _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d
        upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d upsample_trilinear3d var var_mean vstack _weight_norm _weight_norm_interface zero
        zeros
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


def kind(node: fx.Node) -> Kind:
    """What the operator is to the count.

    Args:
        node: an operator of a recorded graph.

    Returns:
        "convolution", "linear" (a matrix product with a weight), "matmul" (any other), "attention" (an operator that
        holds attention products), "norm", "none" (known to multiply-accumulate nothing), or "unknown": it may,
        and nothing here can count it (RNNs, FFTs, grouped products, anything outside aten).

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> traced = ch.trace(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
        >>> kind(traced.outputs[0])
        'convolution'
    """
    if node.op != "call_function":
        return "none"
    found = _kind(node.target)
    return "linear" if found == "matmul" and _has_weight(node) else found


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
    returned = [value.alias_info for value in schema.returns]
    if any(alias is not None and not alias.is_write for alias in returned):
        return True  # a view
    return not any("Tensor" in str(value.type) for value in schema.returns)


def is_attention(node: fx.Node) -> bool:
    """Does this operator make attention products: an attention operator, or a product next to a softmax?"""
    found = kind(node)
    if found != "matmul":
        return found == "attention"
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
