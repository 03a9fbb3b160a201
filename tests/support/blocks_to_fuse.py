"""Modules as people write them around batch norm layers. FUSED says for each class how many layers
can take on what follows them, LEFT_ALONE why none can.

They have a file of their own because pytest compiles the asserts of a test file in its own way, and
such a forward would not be what its source says.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHANNELS = 4
FUSED: dict[type[nn.Module], int] = {}
LEFT_ALONE: dict[type[nn.Module], str] = {}


def fused(layers):
    """Register a block that takes (N, CHANNELS, H, W), and how many of its layers are fused."""

    def register(block):
        FUSED[block] = layers
        return block

    return register


def left_alone(reason):
    """Register a block in which no layer is fused, with what the layers say of it."""

    def register(block):
        LEFT_ALONE[block] = reason
        return block

    return register


def convolution(inputs, outputs, size=1, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """As in torchvision: one activation for two layers and the sum."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = convolution(inputs, outputs, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class Bottleneck(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        width = outputs // 4
        self.conv1 = convolution(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = convolution(inputs, outputs, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """The layers of torchvision's, with fewer channels."""

    def __init__(self, block, depths, width=8):
        super().__init__()
        self.conv1 = convolution(CHANNELS, width, 7, 2)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        inputs = width
        for stage, depth in enumerate(depths):
            outputs = width * 2**stage * (4 if block is Bottleneck else 1)
            strides = [1 if stage == 0 else 2, *[1] * (depth - 1)]
            blocks = [
                block(inputs if index == 0 else outputs, outputs, stride)
                for index, stride in enumerate(strides)
            ]
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.stages(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


@fused(11)  # of 14: three are residuals of those in a shortcut
class ResNet18Shaped(ResNet):
    def __init__(self):
        super().__init__(BasicBlock, (1, 1, 1, 2))

    def forward(self, x):
        return super().forward(x)


@fused(49)  # of 53
class ResNet50Shaped(ResNet):
    def __init__(self):
        super().__init__(Bottleneck, (3, 4, 6, 3))

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.stages(x)), 1))


class ConvLayer(nn.Module):
    """As in transformers: without an activation there is an nn.Identity."""

    def __init__(self, inputs, outputs, size=3, activation=True):
        super().__init__()
        self.convolution = convolution(inputs, outputs, size)
        self.normalization = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, input):
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        hidden_state = self.activation(hidden_state)
        return hidden_state


class ShortCut(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.convolution = convolution(inputs, outputs)
        self.normalization = nn.BatchNorm2d(outputs)

    def forward(self, input):
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        return hidden_state


class ResNetBasicLayer(nn.Module):
    """As in transformers: the add is outside of the module that the layer is in."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.shortcut = ShortCut(inputs, outputs) if inputs != outputs else nn.Identity()
        self.layer = nn.Sequential(
            ConvLayer(inputs, outputs), ConvLayer(outputs, outputs, activation=False)
        )
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


@fused(5)  # of 6
class TransformersResNet(nn.Sequential):
    def __init__(self):
        super().__init__(ConvLayer(CHANNELS, 8), ResNetBasicLayer(8, 16), ResNetBasicLayer(16, 16))


class BatchNormSiLU(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels, activate=True):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.SiLU(inplace=True) if activate else nn.Identity()

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        x = self.drop(x)
        x = self.act(x)
        return x


class MBConv(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        width = inputs * 4
        self.has_skip = inputs == outputs and stride == 1
        self.conv_pw = convolution(inputs, width)
        self.bn1 = BatchNormSiLU(width)
        self.conv_dw = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn2 = BatchNormSiLU(width)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, inputs, 1),
            nn.SiLU(),
            nn.Conv2d(inputs, width, 1),
        )
        self.conv_pwl = convolution(width, outputs)
        self.bn3 = BatchNormSiLU(outputs, activate=False)

    def forward(self, x):
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x))
        x = x * self.gate(x).sigmoid()
        x = self.bn3(self.conv_pwl(x))
        return x + shortcut if self.has_skip else x


@fused(8)  # of 11
class EfficientNetShaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_stem = convolution(CHANNELS, 8, 3, 2)
        self.bn1 = BatchNormSiLU(8)
        self.blocks = nn.Sequential(MBConv(8, 8), MBConv(8, 12, 2), MBConv(12, 12))
        self.conv_head = convolution(12, 16)
        self.bn2 = BatchNormSiLU(16)

    def forward(self, x):
        x = self.blocks(self.bn1(self.conv_stem(x)))
        return self.bn2(self.conv_head(x))


@fused(2)
class DoubleConvolution(nn.Sequential):
    """As in a U-Net."""

    def __init__(self):
        super().__init__(
            *(convolution(CHANNELS, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(convolution(6, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2)),
        )


@fused(7)
class AllModules(nn.Sequential):
    def __init__(self):
        activations = (
            *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(), nn.SiLU(), nn.GELU()),
            nn.Hardswish(),
        )
        super().__init__(
            *(nn.Sequential(nn.BatchNorm2d(CHANNELS), activation) for activation in activations)
        )


@fused(8)
class AllFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        for number in range(8):
            self.add_module(f"bn{number}", nn.BatchNorm2d(CHANNELS))

    def forward(self, x):
        x = F.relu(self.bn0(x), inplace=True)
        x = F.relu6(self.bn1(x))
        x = F.leaky_relu(self.bn2(x), 0.3)
        x = F.elu(self.bn3(x))
        x = F.silu(self.bn4(x), inplace=True)
        x = F.gelu(self.bn5(x))
        x = F.hardswish(self.bn6(x))
        return self.bn7(x).relu_()


@fused(4)
class AllAdds(nn.Module):
    """Also of what has another shape or dtype."""

    def __init__(self):
        super().__init__()
        for number in range(4):
            self.add_module(f"bn{number}", nn.BatchNorm2d(CHANNELS))
        self.bias = nn.Parameter(torch.ones(CHANNELS, 1, 1))

        self.conv = convolution(CHANNELS, CHANNELS)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        y = F.silu(torch.add(self.bn0(x), self.bias))
        y = F.relu(y + self.bn1(self.conv(self.pool(y))))
        y = F.relu(self.bn2(y).add_(x))
        return F.relu(self.bn3(self.conv(y)) + x.double())


class Residual(nn.Module):
    """What the blocks below are made of."""

    def __init__(self):
        super().__init__()
        self.conv = convolution(CHANNELS, CHANNELS)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.0)


@left_alone("is used several times")
class UsedTwice(Residual):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.act(y) + y


@left_alone("is called several times")
class CalledTwice(Residual):
    def forward(self, x):
        return self.act(self.bn(self.conv(self.act(self.bn(self.conv(x))))))


@left_alone("Dropout follows it")
class DropoutBetween(Residual):
    def forward(self, x):
        return self.act(self.drop(self.bn(self.conv(x))))


@left_alone("has a With")
class UnderAContext(Residual):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.bn(self.conv(x)))


@left_alone("does more with conv than to call it")
class TakesAModule(Residual):
    def forward(self, x):
        conv = self.conv
        y = conv.forward(x)
        return F.relu(self.bn(y))


@left_alone("calls self.half_of")
class CallsAMethod(Residual):
    def half_of(self, x):
        return 0.5 * x

    def forward(self, x):
        return F.relu(self.bn(self.half_of(x)))


@left_alone("has optional arguments")
class OptionalArgumentUsed(Residual):
    def forward(self, x, skip=None):
        return F.relu(self.bn(self.conv(x)))


@left_alone("has a Subscript")
class OddAttribute(Residual):
    weights = (2.0, 3.0)

    def forward(self, x):
        return F.relu(self.bn(torch.mul(x, self.weights[0])))


@left_alone("changes attributes of its module")
class NewTensor(Residual):
    def forward(self, x):
        return F.relu(self.bn(x * torch.ones(1)))


@left_alone("calls checkpoint")
class Checkpointed(Residual):
    def forward(self, x):
        y = checkpoint(self.conv, x, use_reentrant=False)
        return F.relu(self.bn(y))


@left_alone("depends on the mode, or on an optional argument")
class OtherInTraining(Residual):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.act(y) if self.training else y


@left_alone("depends on the mode, or on an optional argument")
class OtherDropoutInTraining(Residual):
    def forward(self, x):
        return F.relu(self.bn(F.dropout(x, 0.0, self.training)))


@left_alone(
    "cannot be traced: symbolically traced variables cannot be used as inputs to control flow"
)
class DecidesByValues(Residual):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.act(y) if x.sum() > 0 else y


@left_alone("decides by more than the settings of its module")
class DecidesByType(Residual):
    def forward(self, x):
        y = self.conv(x) if isinstance(x, torch.Tensor) else x
        return F.relu(self.bn(y))


@left_alone("depends on the mode, or on an optional argument")
class OptionalArgument(Residual):
    def forward(self, x, skip=None):
        y = self.bn(self.conv(x))
        return y if skip is None else self.act(y)


@left_alone("changes attributes of its module")
class Counts(Residual):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.act(self.bn(self.conv(x)))


@left_alone("its input might change before the add")
class InputUsedAgain(Residual):
    def forward(self, x):
        y = self.bn(x)
        z = self.conv(x)
        return F.relu(y + z)


@left_alone("another layer runs before the add")
class LayerBetween(Residual):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(convolution(CHANNELS, CHANNELS), nn.BatchNorm2d(CHANNELS))
        self.shortcut.append(nn.Softplus())

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + self.shortcut(x))


@left_alone("an add in place of another tensor follows it")
class AddedInPlace(Residual):
    def forward(self, x):
        x = x * 1.0
        y = self.bn(self.conv(x * 1.0))
        z = x
        z += y
        return F.relu(z) + x


@left_alone("Softplus follows it")
class UnknownActivation(Residual):
    def __init__(self):
        super().__init__()
        self.act = nn.Softplus()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@left_alone("GELU follows it")
class OtherGELU(UnknownActivation):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@left_alone("nothing follows it in the model")
class Last(Residual):
    def forward(self, x):
        return self.bn(self.act(self.conv(x)))
