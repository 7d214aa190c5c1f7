"""MACs of single operators, against hand-derived numbers, fvcore's and torch's own counters."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from clockwork_hooks.errors import ArgumentError, CountError
from clockwork_hooks.graph import operators
from clockwork_hooks.graph.operators import kind, node_macs, operator_name
from clockwork_hooks.graph.tracing import record, recording


class Call(nn.Module):
    """A function of the sample as a module."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, sample):
        return self.fn(sample)


def nodes_of(model, *args, live=False, grad=False, **kwargs):
    """The recorded nodes, in inference mode or of a live call."""
    model = model if isinstance(model, nn.Module) else Call(model)
    if not live:
        return record(model, args, kwargs).nodes
    with torch.set_grad_enabled(grad), recording(model, args, kwargs) as recorder:
        model(*args, **kwargs)
    return tuple(recorder.bindings.nodes)


def total(nodes, **options):
    return sum(node_macs(node, **options) for node in nodes)


def zeros(*shape):
    return torch.zeros(*shape)


CONVOLUTIONS = [
    (lambda x: F.conv1d(x, zeros(6, 4, 5)), (2, 4, 20), 2 * 6 * 4 * 5 * 16),
    (lambda x: F.conv2d(x, zeros(6, 4, 3, 3), zeros(6), stride=2, padding=1), (2, 4, 8, 8), 2 * 6 * 4 * 9 * 16),
    (lambda x: F.conv2d(x, zeros(6, 4, 3, 3), dilation=2), (1, 4, 9, 9), 6 * 4 * 9 * 25),
    (lambda x: F.conv2d(x, zeros(8, 2, 3, 3), groups=2, padding=1), (1, 4, 8, 8), 8 * 2 * 9 * 64),
    (lambda x: F.conv2d(x, zeros(6, 4, 3, 3), padding="same"), (1, 4, 8, 8), 6 * 4 * 9 * 64),
    (lambda x: F.conv2d(x, zeros(6, 4, 3, 3)), (4, 8, 8), 6 * 4 * 9 * 36),
    (lambda x: F.conv3d(x, zeros(6, 4, 3, 1, 1)), (1, 4, 5, 8, 8), 6 * 4 * 3 * 3 * 64),
    (lambda x: F.conv_transpose1d(x, zeros(4, 6, 4), stride=2), (2, 4, 8), 2 * 4 * 6 * 4 * 8),
    (lambda x: F.conv_transpose2d(x, zeros(4, 6, 4, 4), stride=2, padding=1), (1, 4, 8, 8), 4 * 6 * 16 * 64),
    (lambda x: F.conv_transpose2d(x, zeros(4, 3, 2, 2), stride=2, groups=2), (1, 4, 8, 8), 4 * 3 * 4 * 64),
    (lambda x: F.conv_transpose3d(x, zeros(4, 6, 2, 2, 2), stride=2), (1, 4, 2, 3, 4), 4 * 6 * 8 * 24),
]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_convolutions_count_weights_times_positions(case, live):
    fn, shape, expected = CONVOLUTIONS[case]
    nodes = nodes_of(fn, torch.zeros(shape), live=live)
    assert total(nodes) == expected
    assert [kind(node) for node in nodes].count("convolution") == 1


PRODUCTS = [
    (lambda x: F.linear(x, zeros(7, 5)), (2, 3, 5), 6 * 5 * 7),
    (lambda x: F.linear(x[0, 0], zeros(7, 5), zeros(7)), (2, 3, 5), 5 * 7),
    (lambda x: x @ zeros(5, 7), (2, 3, 5), 6 * 5 * 7),
    (lambda x: zeros(3, 2) @ x, (9, 2, 5), 9 * 3 * 2 * 5),
    (lambda x: x @ zeros(4, 1, 5, 7), (6, 3, 5), 4 * 6 * 3 * 5 * 7),
    (lambda x: x @ zeros(5), (2, 3, 5), 2 * 3 * 5),
    (lambda x: zeros(3) @ x, (2, 3, 5), 2 * 3 * 5),
    (lambda x: x[0, 0] @ x[0, 1], (2, 3, 5), 5),
    (lambda x: torch.mm(x[0], zeros(5, 7)), (2, 3, 5), 3 * 5 * 7),
    (lambda x: torch.mv(x[0], zeros(5)), (2, 3, 5), 15),
    (lambda x: torch.addmm(zeros(7), x[0], zeros(5, 7)), (2, 3, 5), 3 * 5 * 7),
    (lambda x: torch.baddbmm(zeros(2, 3, 7), x, zeros(2, 5, 7)), (2, 3, 5), 2 * 3 * 5 * 7),
    (lambda x: torch.addbmm(zeros(3, 7), x, zeros(2, 5, 7)), (2, 3, 5), 2 * 3 * 5 * 7),
    (lambda x: torch.inner(x, zeros(7, 5)), (2, 3, 5), 6 * 5 * 7),
    (lambda x: torch.tensordot(x, zeros(3, 5, 7), dims=2), (2, 3, 5), 2 * 3 * 5 * 7),
]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("case", range(len(PRODUCTS)))
def test_matrix_products_count_rows_times_columns_times_depth(case, live):
    fn, shape, expected = PRODUCTS[case]
    assert total(nodes_of(fn, torch.zeros(shape), live=live)) == expected


EINSUMS = [
    ("bct,bcs->bts", (2, 3, 4), (2, 3, 5), 2 * 4 * 5 * 3),
    ("bts,bcs->bct", (2, 4, 5), (2, 3, 5), 2 * 3 * 4 * 5),
    ("b h i d, b h j d -> b h i j", (2, 3, 4, 5), (2, 3, 6, 5), 2 * 3 * 4 * 6 * 5),
    ("...id,...jd->...ij", (2, 3, 4, 5), (2, 3, 6, 5), 2 * 3 * 4 * 6 * 5),
    ("...ij,jk->...ik", (2, 7, 4, 5), (5, 6), 2 * 7 * 4 * 5 * 6),
    ("bij,jk", (2, 4, 5), (5, 6), 2 * 4 * 5 * 6),
    ("nchw,dc->ndhw", (2, 3, 4, 5), (6, 3), 2 * 6 * 3 * 20),
    ("bij,bkj->bk", (2, 4, 5), (2, 6, 5), 2 * 6 * 5),
    ("bcl,bcl->bcl", (2, 3, 4), (2, 3, 4), 0),
    ("bi,bj->bij", (2, 3), (2, 4), 0),
]


@pytest.mark.parametrize(("equation", "left", "right", "expected"), EINSUMS)
def test_einsum_is_exact_and_the_same_as_the_products_it_runs(equation, left, right, expected):
    def fn(x):
        return torch.einsum(equation, x, zeros(*right))

    x = torch.zeros(left).reshape(*left, *[1] * (3 - len(left))) if len(left) < 3 else torch.zeros(left)
    wrapped = (lambda sample: fn(sample.reshape(left))) if len(left) < 3 else fn
    assert total(nodes_of(wrapped, x)) == expected
    with FlopCounterMode(display=False) as counter:
        wrapped(x)
    assert counter.get_total_flops() == 2 * expected


def test_einsum_of_three_operands_follows_torchs_order():
    def fn(x):
        return torch.einsum("bij,jk,kl->bil", x, zeros(5, 6), zeros(6, 7))

    with FlopCounterMode(display=False) as counter:
        fn(zeros(2, 4, 5))
    assert 2 * total(nodes_of(fn, zeros(2, 4, 5))) == counter.get_total_flops() > 0


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("q", "k", "v", "options"),
    [
        ((2, 3, 8, 16), (2, 3, 6, 16), (2, 3, 6, 16), {}),
        ((2, 3, 8, 16), (2, 3, 6, 16), (2, 3, 6, 24), {}),
        ((2, 3, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16), {"is_causal": True}),
        ((2, 6, 8, 16), (2, 3, 5, 16), (2, 3, 5, 16), {"enable_gqa": True}),
        ((4, 8, 16), (4, 6, 16), (4, 6, 16), {}),
    ],
)
def test_attention_counts_both_products(q, k, v, options, live):
    def fn(x):
        return F.scaled_dot_product_attention(x, zeros(*k), zeros(*v), **options)

    nodes = nodes_of(fn, zeros(*q), live=live)
    expected = math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    assert total(nodes) == expected
    assert total(nodes, attention=False) == 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn(zeros(*q))
    assert counter.get_total_flops() == 2 * expected


ATEN = torch.ops.aten
DEVICE_ATTENTION = {  # what scaled_dot_product_attention becomes on CUDA; their meta kernels run anywhere
    "flash": lambda q, k, v: ATEN._scaled_dot_product_flash_attention(q, k, v)[0],
    "efficient": lambda q, k, v: ATEN._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
    "cudnn": lambda q, k, v: ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0],
    "length first": lambda q, k, v: ATEN._efficient_attention_forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, None, None, None, 0.0, 0
    )[0],
}


@pytest.mark.parametrize("name", DEVICE_ATTENTION)
def test_attention_operators_of_devices_count_alike(name):
    q, k, v = (torch.zeros(2, 4, length, 32, dtype=torch.float16, device="meta") for length in (16, 24, 24))
    nodes = nodes_of(lambda x: DEVICE_ATTENTION[name](x, k, v), q)
    assert total(nodes) == 2 * 4 * 16 * 24 * (32 + 32)
    assert total(nodes, attention=False) == 0


class HandWritten(nn.Module):
    """Attention of two heads written with products, in a given style, between two convolutions."""

    def __init__(self, style):
        super().__init__()
        self.style = style
        self.qkv = nn.Linear(8, 24, bias=False)
        self.out, self.conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        h = self.conv(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(h).chunk(3, -1)
        if self.style == "bmm":
            mask = torch.zeros(16, 16)
            weights = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1, alpha=0.3).float().softmax(-1).to(v.dtype)
            h = torch.bmm(F.dropout(weights, 0.1, self.training), v)
        elif self.style == "einsum":
            weights = torch.einsum("bid,bjd->bij", q * 0.5, k * 0.5)
            weights = weights.masked_fill(torch.zeros(16, 16, dtype=torch.bool), -1e4)
            h = torch.einsum("bij,bjd->bid", torch.softmax(weights - weights.amax(-1, keepdim=True), -1), v)
        else:  # linear attention: the softmaxes come first
            context = torch.einsum("bnd,bne->bde", k.softmax(1), v)
            h = torch.einsum("bde,bnd->bne", context, q.softmax(-1) * 0.3)
        return self.out(h) + h


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("style", "products"), [("bmm", 2 * 256 * 8), ("einsum", 2 * 256 * 8), ("linear", 2 * 64 * 16)]
)
def test_attention_by_hand_is_left_out_with_attention_false(style, products, live):
    nodes = nodes_of(HandWritten(style).eval(), zeros(1, 8, 4, 4), live=live)
    rest = 16 * (8 * 24 + 8 * 8 + 8 * 8 * 9)
    assert total(nodes) == rest + products
    assert total(nodes, attention=False) == rest


def test_a_router_before_a_softmax_is_no_attention():
    router = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Softmax(-1))
    for live in (False, True):
        assert total(nodes_of(router, zeros(2, 3, 8), live=live), attention=False) == 2 * 3 * 8 * 4


def test_torchs_own_transformer_layers_count_the_same_as_their_parts():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    attention = 2 * 2 * 10 * 10 * 16
    rest = 2 * 10 * (4 * 16 * 16 + 2 * 16 * 32)
    fused = nodes_of(layer, zeros(2, 10, 16), live=True)
    assert "_transformer_encoder_layer_fwd" in map(operator_name, fused)
    whole = nodes_of(layer.to("meta"), torch.zeros(2, 10, 16, device="meta"))
    for nodes in (fused, whole):
        assert total(nodes) == rest + attention
        assert total(nodes, attention=False) == rest
    own = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    nodes = nodes_of(lambda x: own(x, x, x)[0], zeros(2, 10, 16), live=True)
    assert total(nodes) == 2 * 10 * 4 * 16 * 16 + attention


NORMS = [
    (nn.GroupNorm(2, 4), 5),
    (nn.GroupNorm(2, 4, affine=False), 4),
    (nn.LayerNorm(6), 5),
    (nn.LayerNorm(6, elementwise_affine=False), 4),
    (nn.BatchNorm2d(4).eval(), 2),
    (nn.BatchNorm2d(4, affine=False).eval(), 1),
    (nn.BatchNorm2d(4).train(), 5),
]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("case", range(len(NORMS)))
def test_norms_count_fvcores_estimate_only_when_asked(case, live):
    norm, each = NORMS[case]
    nodes = nodes_of(norm, zeros(2, 4, 5, 6), live=live)
    assert total(nodes) == 0
    assert total(nodes, norms="fvcore") == each * 240


def test_norms_takes_two_values():
    with pytest.raises(ArgumentError, match="norms"):
        node_macs(nodes_of(nn.Conv2d(3, 3, 1), zeros(1, 3, 4, 4))[-1], norms="all")


@torch.library.custom_op("clockwork_test::matmul_by_hand", mutates_args=())
def matmul_by_hand(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@torch.library.custom_op("clockwork_test::product_into", mutates_args=("out",))
def product_into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x @ x)


def written(x):
    out = torch.empty_like(x)
    product_into(x, out)
    return out


UNKNOWN = [
    (lambda x: written(x[:, :, :3].contiguous()), "clockwork_test::product_into"),
    (lambda x: nn.LSTM(5, 5)(x)[0], "lstm"),
    (lambda x: torch.fft.fft(x).real, "fft_fft"),
    (lambda x: torch.cdist(x, x), "cdist"),
    (lambda x: matmul_by_hand(x[:, :, :3]), "clockwork_test::matmul_by_hand"),
    (lambda x: torch.linalg.matrix_exp(x[:, :, :3]), "linalg_matrix_exp"),
    (lambda x: F.bilinear(x, x, zeros(4, 5, 5)), "bilinear"),
]


@pytest.mark.parametrize("case", range(len(UNKNOWN)))
def test_what_may_multiply_and_has_no_handle_is_unknown_never_free(case):
    fn, name = UNKNOWN[case]
    nodes = nodes_of(fn, zeros(2, 3, 5))
    assert name in [operator_name(node) for node in nodes if kind(node) == "unknown"]


def test_usual_operators_of_unets_are_known_to_be_free():
    def fn(x):
        h = F.interpolate(F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2), scale_factor=2.0, mode="bilinear")
        h = torch.cat([h, torch.randn_like(h), h.clone()], 1).permute(0, 2, 3, 1).contiguous().view(1, -1, 12)
        h = F.softmax(F.gelu(h).masked_fill(h > 0, 0.0), -1).repeat(1, 2, 1).flip(1).cumsum(1).roll(1, 1).sort(-1)[0]
        h = F.pixel_unshuffle(h.transpose(1, 2).reshape(1, 12, 10, 20), 2).clamp_(0, 1).add_(1)
        return F.grid_sample(h, torch.zeros(1, 4, 4, 2), align_corners=False).var(1).std() + torch.linspace(0, 1, 3)

    for live in (False, True):
        nodes = nodes_of(fn, zeros(1, 4, 8, 8), live=live)
        assert [operator_name(node) for node in nodes if kind(node) == "unknown"] == []


def test_every_operator_that_torchs_counter_knows_is_counted_or_named():
    for packet in flop_registry:
        overloads = [getattr(packet, name) for name in packet.overloads()] if hasattr(packet, "overloads") else [packet]
        assert {operators._kind(overload) for overload in overloads}.isdisjoint({"none", "norm"}), packet


def test_tables_of_operators_overlap_nowhere():
    groups = [operators.CONVOLUTIONS, operators.LINEARS, operators.MATMULS, operators.SUMS, operators.HEADS_FIRST]
    groups += [operators.LENGTH_FIRST, operators.BLOCKS, operators.NORMS, operators.FREE]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas()}
    assert len(set(names) & schemas) > 0.97 * len(names)


def test_an_operand_without_a_shape_is_an_error():
    node = next(n for n in nodes_of(nn.Conv2d(3, 3, 1), zeros(1, 3, 4, 4)) if kind(n) == "convolution")
    del node.all_input_nodes[0].meta["shape"]
    with pytest.raises(CountError, match="recorded shapes"):
        node_macs(node)


def small_unet():
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    return model.eval(), (torch.randn(2, 4, 16, 16), torch.tensor(3), torch.randn(2, 7, 24))


def small_plain():
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model.eval(), (torch.randn(2, 3, 16, 16), torch.tensor(3))


@pytest.mark.parametrize("build", [small_unet, small_plain])
def test_a_small_unet_counts_as_fvcore_and_torch_count_it(build):
    model, args = build()
    nodes = nodes_of(model, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, args).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_operator = analysis.by_operator()
    norms = sum(by_operator[name] for name in ("group_norm", "layer_norm", "batch_norm"))
    products = sum(by_operator[name] for name in ("conv", "linear", "matmul", "addmm", "bmm", "mm", "einsum"))
    assert total(nodes, attention=False) == products > 0
    assert total(nodes, attention=False, norms="fvcore") == products + norms
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args)
    assert 2 * total(nodes) == counter.get_total_flops()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("build", [small_unet, small_plain])
def test_live_calls_count_as_the_whole_operators_do(build, backend, grad):
    model, args = build()
    whole = nodes_of(model, *args)
    with sdpa_kernel(backend):
        live = nodes_of(model, *args, live=True, grad=grad)
    assert "convolution" in map(operator_name, live)
    for options in ({}, {"attention": False}, {"norms": "fvcore"}):
        assert total(live, **options) == total(whole, **options) > 0
