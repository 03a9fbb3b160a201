"""Batch norm layers with a forward of their own, as people write them. SYNCHRONIZED normalize in a
way that can be exchanged; LEFT_ALONE do not, each for the reason beside it.

They have a file of their own because pytest compiles the asserts of a test file in its own way, and
such a forward would not be what its source says.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import batch_norm as normalize_batch

SYNCHRONIZED: list[type[nn.Module]] = []
LEFT_ALONE: dict[type[nn.Module], str] = {}


def synchronized(layer_class):
    """Register a class whose layers can be synchronized."""
    SYNCHRONIZED.append(layer_class)
    return layer_class


def left_alone(reason):
    """Register a class whose layers cannot be synchronized, with what the warning says of it."""

    def register(layer_class):
        LEFT_ALONE[layer_class] = reason
        return layer_class

    return register


@synchronized
class BatchNormAct(nn.BatchNorm2d):
    """F.batch_norm and an activation; batches are not counted."""

    def __init__(self, features):
        super().__init__(features)
        self.act = nn.SiLU()

    def forward(self, x):
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(y)


@synchronized
class BatchNormDropAct(nn.BatchNorm2d):
    """All that torch's own forward does, written out, with a check before and more after it: the
    shape of timm's BatchNormAct2d.
    """

    def __init__(self, features, momentum=0.1, **options):
        super().__init__(features, momentum=momentum, **options)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        assert x.ndim == 4, f"expected a map, got {x.ndim} dimensions"
        average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                average_factor = 1.0 / float(self.num_batches_tracked)
        if self.training:
            use_batch = True
        else:
            use_batch = (self.running_mean is None) and (self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            use_batch,
            average_factor,
            self.eps,
        )
        return self.act(self.drop(x))


@synchronized
class BatchNormAverage(BatchNormDropAct):
    """The same, inherited, with the average over all batches as running statistics."""

    def __init__(self, features):
        super().__init__(features, momentum=None)

    def forward(self, x):
        return super().forward(x) + 1.0


@synchronized
class BatchNormRelu(nn.BatchNorm2d):
    """The forward of the base, and an activation."""

    def forward(self, input):
        return super().forward(input).relu()


@synchronized
class BatchNormOldSuper(nn.BatchNorm2d):
    """The same, as Python 2 wrote it."""

    def forward(self, input):
        return F.leaky_relu(super(BatchNormOldSuper, self).forward(input), 0.2)  # noqa: UP008


@synchronized
class SyncBatchNormAct(nn.SyncBatchNorm):
    """The same on torch's synchronized layer: the shape of timm's SyncBatchNormAct."""

    def forward(self, x):
        x = super().forward(x)
        if hasattr(self, "act"):
            x = self.act(x)
        return x.tanh()


class Doubled:
    """Twice what the next class gives."""

    def forward(self, x):
        return 2.0 * super().forward(x)


@synchronized
class DoubledBatchNorm(Doubled, nn.BatchNorm2d):
    """A forward that is mixed in."""


@synchronized
class BatchNormInMethod(nn.BatchNorm2d):
    """Normalizes in another method, and uses a property."""

    @property
    def __slope(self):
        return 0.1 + self.eps

    def _batch_norm(self, x):
        return x

    def normalize(self, x, *, shift=0.5):
        if self.training:
            self.num_batches_tracked += 1
        arguments = {"negative_slope": self.__slope}
        normalized = torch.nn.functional.batch_norm(
            input=x,
            running_var=self.running_var,
            running_mean=self.running_mean,
            training=self.training,
            weight=self.weight.abs(),
            momentum=self.momentum,
        )
        return F.leaky_relu(normalized + shift, **arguments)

    def forward(self, x, shift=0.25):
        return self.normalize(x, shift=shift)


@synchronized
class BatchNormByVariables(nn.BatchNorm2d):
    """Its buffers pass through variables; the function has another name here."""

    def forward(self, x):
        running_mean = self.running_mean if self.training else None
        running_var = None
        if self.training:
            running_var = self.running_var
        if not self.training:
            running_mean = self.running_mean
            running_var = self.running_var
        use_batch = self.training
        if x.dtype is torch.float16:
            x = x.float()
        with torch.autocast(x.device.type, enabled=False):
            return normalize_batch(x, running_mean, running_var, None, None, use_batch)


@synchronized
class BatchNormOfTokens(nn.BatchNorm1d):
    """Takes (N, L, C), too: what all inputs have in common decides."""

    def forward(self, x):
        if x.ndim == 3:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        return super().forward(x.flatten(2))


def make_sloped(slope):
    """A class whose forward has a variable of a function around it."""

    class Sloped(nn.BatchNorm2d):
        def forward(self, x):
            y = F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
            return F.leaky_relu(y, slope)

    return Sloped


Sloped = synchronized(make_sloped(0.3))
Sloped.__qualname__ = "Sloped"  # so that pickle finds it


@left_alone("computes statistics by x.mean")
class OwnStatistics(nn.BatchNorm2d):
    def forward(self, x):
        mean = x.mean((0, 2, 3), keepdim=True)
        return super().forward(x) if not self.training else x - mean


@left_alone("uses helper, which computes statistics by torch.var_mean")
class OwnStatisticsInMethod(nn.BatchNorm2d):
    def helper(self, x):
        return torch.var_mean(x)

    def forward(self, x):
        return super().forward(x) + self.helper(x)[0]


@left_alone("calls neither super")
class NoBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


@left_alone("calls F.batch_norm with another running_mean than its own")
class OtherBuffers(nn.BatchNorm2d):
    def __init__(self, features):
        super().__init__(features)
        self.register_buffer("other_mean", torch.zeros(features))

    def forward(self, x):
        return F.batch_norm(x, self.other_mean, self.running_var, training=self.training)


@left_alone("uses self.running_mean outside of F.batch_norm")
class SmallBatches(nn.BatchNorm2d):
    """What is known as ghost batch norm."""

    def forward(self, x):
        parts = x.reshape(x.shape[0] // 2, -1, *x.shape[2:])
        mean, var = self.running_mean.repeat(2), self.running_var.repeat(2)
        return F.batch_norm(parts, mean, var, training=self.training).view_as(x)


@left_alone("calls F.batch_norm with another running_mean than its own")
class NoBuffers(nn.BatchNorm2d):
    """Normalizes each sample."""

    def forward(self, x):
        return F.batch_norm(x.view(1, -1, *x.shape[2:]), None, None, training=True).view_as(x)


@left_alone("calls F.batch_norm with another running_var than its own")
class OneBuffer(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_mean, training=self.training)


@left_alone(r"uses self.running_var outside of F.batch_norm")
class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        scale = (self.running_var + self.eps).rsqrt().view(1, -1, 1, 1)
        return x * scale if not self.training else super().forward(x)


@left_alone(r"uses self.running_mean outside of F.batch_norm")
class UsesVariable(nn.BatchNorm2d):
    def forward(self, x):
        center = self.running_mean
        y = F.batch_norm(x, center, self.running_var, training=self.training)
        return y + center.view(1, -1, 1, 1)


@left_alone("uses self._buffers outside of F.batch_norm")
class UsesBuffers(nn.BatchNorm2d):
    def forward(self, x):
        self._buffers["running_mean"].mul_(0.5)
        return super().forward(x)


@left_alone("calls super.*forward in a loop")
class Loop(nn.BatchNorm2d):
    def forward(self, x):
        parts = []
        for part in x.chunk(2):
            parts.append(super().forward(part))
        return torch.cat(parts)


@left_alone("calls F.batch_norm in a loop")
class Comprehension(nn.BatchNorm2d):
    def forward(self, x):
        return torch.cat(
            [F.batch_norm(part, self.running_mean, self.running_var) for part in x.chunk(2)]
        )


@left_alone("calls F.batch_norm in a nested function")
class Nested(nn.BatchNorm2d):
    def forward(self, x):
        def normalize(part):
            return F.batch_norm(part, self.running_mean, self.running_var, training=self.training)

        return normalize(x)


@left_alone("uses normalize, which normalizes in a loop")
class MethodInLoop(nn.BatchNorm2d):
    def normalize(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)

    def forward(self, x):
        return torch.cat([self.normalize(part) for part in x.chunk(2)])


@left_alone("calls super.*forward where a condition on which ranks may disagree decides")
class SkipsEmpty(nn.BatchNorm2d):
    """An empty rank would not come to the all_reduce."""

    def forward(self, x):
        if x.numel() > 0:
            return super().forward(x)
        return x


@left_alone("calls F.batch_norm where a condition on which ranks may disagree decides")
class ReturnsEarly(nn.BatchNorm2d):
    def forward(self, x):
        empty = x.shape[0] == 0
        if empty:
            return x
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


@left_alone("calls F.batch_norm where a condition on which ranks may disagree decides")
class TrainsIfNotEmpty(nn.BatchNorm2d):
    def forward(self, x):
        use_batch = self.training and len(x) > 0
        return F.batch_norm(x, self.running_mean, self.running_var, training=use_batch)


@left_alone("calls super.*forward where a condition on which ranks may disagree decides")
class SkipsByVariable(nn.BatchNorm2d):
    def forward(self, x):
        skip = False
        if x.shape[0] == 0:
            skip = True
        return x if skip else super().forward(x)


@left_alone("calls super.*forward where a condition on which ranks may disagree decides")
class Random(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) if torch.rand(()) < 2.0 else x


@left_alone("calls super.*forward where an error decides")
class OnError(nn.BatchNorm2d):
    def forward(self, x):
        try:
            return x.view(3, -1, 4, 4)
        except RuntimeError:
            return super().forward(x)


@left_alone("passes its layer to another function")
class PassesItself(nn.BatchNorm2d):
    def forward(self, x):
        return nn.BatchNorm2d.forward(self, x).relu()


@left_alone("uses an attribute whose name is computed")
class ComputedName(nn.BatchNorm2d):
    def forward(self, x):
        name = "running_" + "var"
        return super().forward(x) + getattr(self, name).view(1, -1, 1, 1)


@left_alone("unpacks arguments into F.batch_norm")
class Unpacks(nn.BatchNorm2d):
    def forward(self, x):
        settings = {"training": self.training}
        return F.batch_norm(x, self.running_mean, self.running_var, **settings)


@left_alone("takes super.*forward without calling it")
class TakesForward(nn.BatchNorm2d):
    def forward(self, x):
        normalize = super().forward
        return normalize(x)


@left_alone("uses normalized, which normalizes in a property")
class InProperty(nn.BatchNorm2d):
    @property
    def normalized(self):
        return F.batch_norm(self.x, self.running_mean, self.running_var, training=self.training)

    def forward(self, x):
        self.x = x
        return self.normalized


class NormalizesElsewhere:
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


@left_alone("calls F.batch_norm in NormalizesElsewhere, which is no batch norm layer")
class MixedIn(NormalizesElsewhere, nn.BatchNorm2d):
    pass


@left_alone(r"names its class in super\(\)")
class OldSyncBatchNorm(nn.SyncBatchNorm):
    def forward(self, x):
        return super(OldSyncBatchNorm, self).forward(x)  # noqa: UP008


def doubled(function):
    @functools.wraps(function)
    def double(*arguments):
        return 2.0 * function(*arguments)

    return double


@left_alone("is wrapped by a decorator")
class Decorated(nn.BatchNorm2d):
    @doubled
    def forward(self, x):
        return super().forward(x)


@left_alone("is no Python function but of partialmethod")
class NoFunction(nn.BatchNorm2d):
    forward = functools.partialmethod(nn.BatchNorm2d.forward)


@left_alone("has no parameter for its layer")
class NoParameters(nn.BatchNorm2d):
    def forward(*arguments):
        return nn.BatchNorm2d.forward(*arguments)


sourceless = {"torch": torch, "F": F}
exec(
    """
class Sourceless(torch.nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
""",
    sourceless,
)
Sourceless = left_alone("has no source at hand")(sourceless["Sourceless"])
