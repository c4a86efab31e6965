"""What each ATen op does to labels: all rules, and those of reductions here.

Data movement runs the same op on the label tensor. Pointwise ops pass labels on and unite their
inputs. Convolutions and linear layers unite the input's channels with the weight's input axis and
start fresh labels for the output's. Everything else has its own rule or freezes what it touches.
"""

from collections.abc import Sequence

from torch import Tensor

from prunegraph.graph.rules.attention import attention, sparse_mm, where_rows_are
from prunegraph.graph.rules.layers import (
    addmm,
    batch_norm,
    bmm,
    group_norm,
    grouped_mm,
    layer_norm,
    mm,
    mv,
    trilinear,
)
from prunegraph.graph.rules.movement import (
    as_strided,
    cat,
    channel_shuffle,
    copy,
    embedding,
    fold,
    glu,
    movement,
    movement_inplace,
    pad,
    pick,
    split,
    unfold,
    view,
    view_as_complex,
    view_as_real,
)
from prunegraph.graph.rules.pointwise import divided, pointwise, pointwise_inplace, scale, zeros
from prunegraph.graph.rules.recurrent import fused_recurrent, pack
from prunegraph.graph.rules.scatter import masked_scatter, put, scatter
from prunegraph.graph.rules.shared.combine import combine
from prunegraph.graph.rules.shared.constants import constant
from prunegraph.graph.rules.shared.copied_heads import note_copies
from prunegraph.graph.rules.spatial import (
    convolution,
    deformable_convolution,
    grid_sample,
    regions,
    spatial,
    transform,
    unpool,
)
from prunegraph.graph.trace.labels import narrow_constant, varying_axes
from prunegraph.graph.trace.recorder import PRODUCTS, LabelRecorder, OpCall, Rule


def reduced_axes(call: OpCall, ndim: int) -> list[int]:
    """Return the axes that a reduction of a tensor with ``ndim`` axes takes away."""
    place = 2 if call.name in NORMS else 1
    dims = call.argument(place, "dim", None)
    if dims is None or dims == []:
        return list(range(ndim))
    return [axis % ndim for axis in ([dims] if isinstance(dims, int) else dims)]


def _drop(labels: Tensor, axes: Sequence[int], out: Tensor | None) -> Tensor:
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels if out is None or labels.shape == out.shape else labels.reshape(out.shape)


def reduction(recorder: LabelRecorder, call: OpCall) -> None:
    """Pass labels on along axes that are not reduced.

    If another axis is labelled too, positions along the reduced one become one unit: the width of
    a head, paths that were stacked. If it is the only one, sums and norms pass, because a removed
    channel adds nothing; a mean, a maximum and the like are over the channels that are kept; all
    else freezes.
    """
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):  # torch.max(a, b)
        pointwise(recorder, call)
        return
    labels = recorder.labels_of(call.args[0])
    axes = reduced_axes(call, labels.ndim)
    varying = varying_axes(labels)
    reduced = [axis for axis in varying if axis in axes]
    if not reduced or recorder.is_constant(labels):
        for tensor in call.outputs():
            recorder.set_labels(tensor, _drop(labels, axes, tensor))
    elif len(reduced) < len(varying):
        for axis in reduced:
            recorder.store.unite(labels, labels.narrow(axis, 0, 1))
        if recorder.is_head(labels):
            recorder.recording.heads.append(_drop(narrow_constant(labels), axes, None))
        for tensor in call.outputs():
            recorder.set_labels(tensor, _drop(labels, axes, tensor))
    else:
        if call.name in OVER_KEPT:
            channels = recorder.channel_labels(labels, reduced[0])
            recorder.note_mean(channels, reduced[0] - labels.ndim)
            recorder.recording.hold_positions(call.outputs()[1:], channels)
        elif not is_sum(call):
            recorder.freeze_inputs(call, "reduces over channels")
        recorder.set_unlabelled(call, "reduced over channels")


def is_sum(call: OpCall) -> bool:
    """Return whether zeros change nothing of what a reduction gives."""
    if call.name in NORMS:
        order = call.argument(1, "ord", None)
        return bool(order is None or order >= 0)
    return call.name in {"sum", "any"}


def scan(recorder: LabelRecorder, call: OpCall) -> None:
    """What sorts, sums up or picks along an axis: passes where no channels lie along it."""
    labels = recorder.labels_of(call.args[0])
    if call.outputs()[0].ndim == 0:
        reduction(recorder, call)  # the median of all
        return
    place = 2 if call.name in {"topk", "kthvalue"} else 1
    axis = call.argument(place, "dim", -1) % labels.ndim
    if axis in varying_axes(labels):
        recorder.freeze_all(call, "orders channels")
        return
    for tensor in call.outputs():
        first = labels.narrow(axis, 0, 1)
        kept = first if tensor.ndim == labels.ndim else first.squeeze(axis)
        recorder.set_labels(tensor, kept.expand(tensor.shape))


def softmax(recorder: LabelRecorder, call: OpCall) -> None:
    """Pass labels on; a softmax over the only labelled axis freezes it.

    If another axis is labelled too (paths that were stacked), the positions become one unit.
    """
    labels = recorder.labels_of(call.args[0])
    axis, varying = call.args[1] % labels.ndim, varying_axes(labels)
    if axis in varying and len(varying) > 1:
        recorder.store.unite(labels, labels.narrow(axis, 0, 1))
    elif axis in varying:
        recorder.freeze_inputs(call, "normalises over channels")
    recorder.set_labels(call.out, labels)


def distance(recorder: LabelRecorder, call: OpCall) -> None:
    """Distances between rows: channels are summed over, and removed ones are equal."""
    left, right = (recorder.channel_labels(recorder.labels_of(t), -1) for t in call.args[:2])
    recorder.store.unite(left, right)
    recorder.set_unlabelled(call, "reduced over channels")


def solve(recorder: LabelRecorder, call: OpCall) -> None:
    """A triangular system, perhaps one for each head (Gated DeltaNet): no channels are unknowns."""
    matrix, values = (recorder.labels_of(tensor) for tensor in call.args[:2])
    unknowns = -2 if call.kwargs.get("left", True) else -1
    across = {axis - values.ndim for axis in varying_axes(values)}
    if unknowns in across or {axis - matrix.ndim for axis in varying_axes(matrix)} & {-1, -2}:
        recorder.freeze_all(call, "unknowns of equations")
        return
    labels = combine(recorder, call, values, matrix[..., :1, :1])
    recorder.set_labels(call.out, labels.expand(call.out.shape))


def loss(recorder: LabelRecorder, call: OpCall) -> None:
    """A loss between two tensors, position by position or in all."""
    if call.out.ndim:
        pointwise(recorder, call)
    else:
        recorder.freeze_all(call, "a mean or a sum of a loss over channels")


def restride(recorder: LabelRecorder, call: OpCall) -> None:
    """A new stride for axes of size 1 (pooling in channels-last ends with it) moves nothing."""
    target: Tensor = call.args[0]
    labels = recorder.labels_of(target)
    strides, expected = target.stride(), 1
    moved = tuple(labels.shape) != tuple(target.shape) or target.storage_offset() != 0
    for axis in reversed(range(target.ndim)):
        moved |= target.shape[axis] > 1 and strides[axis] != expected
        expected *= target.shape[axis]
    if moved:
        recorder.freeze_inputs(call, "its memory is read in another order")
    else:
        recorder.set_labels(target, labels)


def nothing(_recorder: LabelRecorder, _call: OpCall) -> None:
    """The op returns no tensor that matters."""


OVER_KEPT = frozenset({"mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean"})
"""Reductions of which the kept channels alone give what they should."""

NORMS = {"linalg_vector_norm", "norm"}


_OPS: dict[Rule, str] = {
    pointwise: """
        relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid elu leaky_relu softplus mish exp
        log1p sqrt abs neg sign square pow clamp clamp_min clamp_max erf sin cos tan asin acos sinh
        cosh add sub rsub maximum minimum where lerp addcmul addcdiv threshold logical_not eq ne lt
        gt le ge masked_fill bitwise_not native_dropout _prelu_kernel prelu log_sigmoid_forward
        relu6 floor round isnan isfinite nan_to_num celu selu atan expm1 exp2 log2 log10 trunc frac
        ceil fmod remainder atan2 sinc erfc erfinv hypot logaddexp fmax fmin heaviside isinf
        hardshrink softshrink bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor
        polar complex _conj conj_physical
    """,
    scale: "mul",
    divided: "div reciprocal rsqrt log",
    pointwise_inplace: """
        copy_ fill_ zero_ masked_fill_ bernoulli_ uniform_ normal_ random_ exponential_
    """,
    constant: """
        empty zeros ones full arange new_zeros new_ones new_empty new_full ones_like full_like rand
        randn scalar_tensor linspace eye empty_strided new_empty_strided
        _sparse_coo_tensor_with_dims_and_tensors _coalesce coalesce is_coalesced _to_sparse
        _sparse_compressed_tensor_unsafe _validate_sparse_coo_tensor_args rand_like randn_like tril
        triu tril_indices triu_indices
    """,
    zeros: "zeros_like empty_like",
    movement: """
        permute transpose t numpy_T squeeze unsqueeze slice select unbind stack flip roll alias
        detach lift_fresh narrow movedim pixel_shuffle pixel_unshuffle unfold diagonal
    """,
    note_copies(movement): "expand repeat",
    movement_inplace: "transpose_ t_ squeeze_ unsqueeze_",
    pick: "gather index index_select",
    view: "view _unsafe_view reshape _reshape_alias",
    copy: "clone contiguous _to_copy",
    cat: "cat",
    split: "split split_with_sizes unsafe_split",
    pad: "constant_pad_nd",
    as_strided: "as_strided",
    restride: "as_strided_",
    channel_shuffle: "channel_shuffle native_channel_shuffle",
    glu: "glu",
    unfold: "im2col",
    fold: "col2im",
    view_as_complex: "view_as_complex",
    view_as_real: "view_as_real",
    embedding: "embedding _embedding_bag _embedding_bag_forward_only",
    spatial: """
        max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_avg_pool1d
        max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
        upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa
        upsample_linear1d mkldnn_max_pool2d reflection_pad2d replication_pad2d reflection_pad1d
        replication_pad1d reflection_pad3d replication_pad3d adaptive_max_pool3d
        _upsample_nearest_exact1d _upsample_nearest_exact3d _upsample_bicubic2d_aa
    """,
    unpool: "max_unpool2d max_unpool3d",
    grid_sample: "grid_sampler grid_sampler_2d grid_sampler_3d",
    regions: "torchvision::roi_align torchvision::roi_pool",
    transform: "_fft_r2c _fft_c2r _fft_c2c",
    reduction: "sum argmax argmin linalg_vector_norm norm logsumexp prod any all",
    scan: "cumsum cumprod cummax cummin logcumsumexp sort topk kthvalue median mode",
    softmax: "_softmax _log_softmax _safe_softmax",
    distance: "_cdist_forward _euclidean_dist",
    solve: "linalg_solve_triangular",
    loss: """
        mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy
        binary_cross_entropy_with_logits
    """,
    scatter: "scatter scatter_add scatter_reduce index_add index_copy index_reduce",
    masked_scatter: "masked_scatter masked_scatter_",
    put: "index_put index_put_ _index_put_impl_",
    batch_norm: """
        native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
    """,
    layer_norm: "native_layer_norm",
    group_norm: "native_group_norm",
    convolution: "convolution",
    deformable_convolution: "torchvision::deform_conv2d",
    trilinear: "_trilinear",
    addmm: "addmm",
    mm: "mm",
    mv: "mv dot vdot",
    bmm: "bmm baddbmm",
    grouped_mm: "_grouped_mm",
    sparse_mm: "_sparse_mm _sparse_addmm",
    attention: """
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    """,
    fused_recurrent: "mkldnn_rnn_layer _cudnn_rnn miopen_rnn",
    pack: "_pack_padded_sequence",
    nothing: "_is_all_true _is_any_true _local_scalar_dense sym_size is_same_size equal set_",
}
"""Names of ops, by rule. Those that pass labels on, or scatter, have twins that work in place."""


def _table() -> dict[str, Rule]:
    table = {name: rule for rule, names in _OPS.items() for name in names.split()}
    table |= dict.fromkeys(OVER_KEPT, reduction)
    in_place = dict.fromkeys((pointwise, scale, divided), pointwise_inplace) | {scatter: scatter}
    for rule, own in in_place.items():
        table |= {f"{name}_": own for name in _OPS[rule].split()}
    return table | {name: where_rows_are(table[name]) for name in PRODUCTS}


RULES: dict[str, Rule] = _table()
