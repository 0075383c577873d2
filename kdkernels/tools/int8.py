"""A PyTorch model in 8-bit integers: calibrated, or trained on with the rounding in its graph.

torchao does the work (``prepare_pt2e``, ``convert_pt2e``); what is ours is where the integers are.
torchao's own ``X86InductorQuantizer`` quantises for torch.compile's fusions and leaves what lies
between a convolution and a residual sum in fp32, so that another runtime finds only part of the
graph in integers. Here whatever enters a convolution, a linear layer, a sum, a product, a
concatenation or a pool is quantised, and the output: then every layer stands between integers and
onnxruntime runs it by its integer kernel.

Activations are uint8, affine, one scale a tensor; weights int8, symmetric in -127..127, one scale
an output channel; biases stay fp32 in the file (the runtime rounds them to int32 at scale
activation * weight). BatchNorm is folded into the convolution before it (Jacob et al., arXiv
1712.05877), so what is trained is what is deployed.
"""

import copy

import torch
import torchao.quantization.pt2e as pt2e
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from kdkernels.train import TrainError

_aten = torch.ops.aten
# Operations with weights, and those whose every tensor is an activation.
_WEIGHTED = {_aten.conv2d.default, _aten.linear.default}
_PLAIN = {
    _aten.add.Tensor,
    _aten.add_.Tensor,
    _aten.mul.Tensor,
    _aten.mul_.Tensor,
    _aten.cat.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.mean.dim,
}

# Least scale. A channel of zeros must not get one so small that a bias in units of
# activation scale * weight scale leaves int32.
_EPS = 2.0**-16

_ALIKE = 1e-4
"""Largest difference of the graph's logits from the model's before rounding, of the largest one."""


def _spec(maker, weight: bool) -> QuantizationSpec:
    if weight:
        return QuantizationSpec(
            torch.int8, maker, -127, 127, qscheme=torch.per_channel_symmetric, ch_axis=0
        )
    return QuantizationSpec(torch.uint8, maker, 0, 255, qscheme=torch.per_tensor_affine)


class _Everywhere(Quantizer):
    """Quantises the tensors that the module's docstring names.

    Args:
        activation, weight: observers of values, or fake quantisers of them.
    """

    def __init__(self, activation, weight):
        super().__init__()
        self.activation, self.weight = _spec(activation, False), _spec(weight, True)

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in model.graph.nodes:
            wanted = QuantizationAnnotation(_annotated=True)
            if node.target in _WEIGHTED:
                wanted.input_qspec_map = {node.args[0]: self.activation, node.args[1]: self.weight}
            elif node.target in _PLAIN:
                tensors = [n for n in node.all_input_nodes if n.meta["val"].dtype == torch.float32]
                wanted.input_qspec_map = dict.fromkeys(tensors, self.activation)
            node.meta["quantization_annotation"] = wanted
        for node in model.graph.output_node().all_input_nodes:
            node.meta["quantization_annotation"].output_qspec = self.activation
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


_NORMS = {_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default}


def _unshared(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Give each BatchNorm after a convolution one that serves it alone.

    BatchNorm is folded into the convolution's weights, which a convolution that is used twice, or
    whose output goes elsewhere too, needs as they are.
    """
    for norm in list(graph.graph.nodes):
        conv = norm.args[0] if norm.target in _NORMS else None
        if conv is None or not str(conv.target).startswith("aten.conv"):
            continue
        tensors = [node for node in conv.args[1:3] if isinstance(node, torch.fx.Node)]
        if all(len(node.users) == 1 for node in (conv, *tensors)):
            continue
        copies = {}
        with graph.graph.inserting_before(norm):
            for number, node in enumerate(tensors):
                name = f"_{norm.name}_convolution_{number}"
                value = graph.get_parameter(str(node.target)).detach().clone()
                graph.register_parameter(name, nn.Parameter(value))
                copies[node] = graph.graph.get_attr(name)
                copies[node].meta = dict(node.meta)
            own = graph.graph.node_copy(conv, lambda node, copies=copies: copies.get(node, node))
        norm.replace_input_with(conv, own)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _prepared(model: nn.Module, example: torch.Tensor, activation, weight) -> torch.fx.GraphModule:
    """The model's graph in eval mode, batch size free, with observers or fake quantisers."""
    shapes = ({0: torch.export.Dim("batch")},)
    # A copy: the program shares its tensors, and training must not reach the caller's.
    model = copy.deepcopy(model).eval()
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    return prepare_pt2e(_unshared(program.module()), _Everywhere(activation, weight))


def converted(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Integers for the observers: int8 weights between quantise and dequantise operations."""
    return convert_pt2e(graph)


def calibrate(model: nn.Module, batches: list[torch.Tensor]) -> torch.fx.GraphModule:
    """Post-training quantisation of an fp32 model on the CPU, to be finished by :func:`converted`.

    Ranges of activations are those of least squared error over the histogram of what ``batches``,
    each ``[b, channels, height, width]`` with b >= 2, cause (torchao's HistogramObserver); those of
    weights are their largest value.

    Raises:
        TrainError: the graph is not the model even before it is rounded.
    """
    activation = pt2e.HistogramObserver.with_args(eps=_EPS)
    weight = pt2e.PerChannelMinMaxObserver.with_args(eps=_EPS)
    graph = _prepared(model, batches[0], activation, weight)
    with torch.no_grad():
        found = [graph(batch) for batch in batches][0]
        expected = copy.deepcopy(model).eval()(batches[0])
    apart = ((found - expected).abs().max() / expected.abs().max()).item()
    if not apart <= _ALIKE:
        raise TrainError(
            f"the graph that becomes integers differs from the student by {apart:.1e} of the "
            "largest logit before anything is rounded: leave int8 and int8-qat out of formats"
        )
    return graph


class FakeQuantised(nn.Module):
    """The model with all its tensors rounded as int8 will round them, to be trained so.

    Gradients pass the rounding unchanged inside of the range and are zero outside of it. The range
    of an activation is a moving average over the steps, a weight's its largest value now. Dropout
    is off and BatchNorm folded, in train mode too; ranges move in train mode only.

    ``model`` is fp32, on the CPU, and not changed; the first ranges fit the inputs ``batch``
    ``[b, channels, height, width]`` fp32, b >= 2. ``graph`` is for :func:`converted`.
    """

    def __init__(self, model: nn.Module, batch: torch.Tensor):
        super().__init__()
        # Not the fused module: its kernel chooses scales in another way than convert_pt2e does.
        activation = pt2e.FakeQuantize.with_args(
            observer=pt2e.MovingAverageMinMaxObserver, eps=_EPS
        )
        # Constant 1: no average, the range is that of the weight as it is now.
        weight = pt2e.FakeQuantize.with_args(
            observer=pt2e.MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, eps=_EPS
        )
        self.graph = _prepared(model, batch, activation, weight)
        with torch.no_grad():
            self.graph(batch)
        self.requires_grad_(True)  # folding leaves the new biases without

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of ``[b, channels, height, width]`` fp32 images."""
        return self.graph(images)

    def train(self, mode: bool = True) -> "FakeQuantised":
        """Let the ranges of activations follow the data, or hold them."""
        self.training = mode
        for part in self.graph.modules():
            # A weight's range is that of the weight in use, also after the last step.
            if isinstance(part, pt2e.FakeQuantizeBase) and not part.is_per_channel:
                part.enable_observer(mode)
        return self
