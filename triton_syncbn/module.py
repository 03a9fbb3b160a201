"""SyncBN, the layer."""

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import groups
from .conversion import convert
from .functional import activate, sync_batch_norm

_numbers = itertools.count()  # of the layers that are made, so that each has a name


def _alike(input: Any, residual: Any) -> bool:
    return (
        isinstance(input, Tensor)
        and isinstance(residual, Tensor)
        and (input.shape, input.dtype, input.device)
        == (residual.shape, residual.dtype, residual.device)
    )


class SyncBN(_BatchNorm):
    """Batch normalization with the mean and variance of the samples of all ranks:
    a drop-in for `torch.nn.SyncBatchNorm`.

    Signature and state_dict are those of `torch.nn.SyncBatchNorm`. In training any number of ranks,
    with any split of the samples, gives the result of one big batch; in eval mode the running
    statistics are used and nothing is communicated. See `sync_batch_norm` for the arithmetic.

    A copy of the layer (`copy.deepcopy`) keeps the process group; a pickle does not, and comes back
    with the default group.

    Args:
        num_features: C of the input (N, C, *spatial).
        eps: added to the variance.
        momentum: share of the new batch in the running statistics, or None for the average over
            all batches.
        affine: whether there are weight and bias, (C,) each.
        track_running_stats: whether there are running statistics. Without them eval mode uses this
            rank's batch.
        process_group: the ranks to synchronize: a ProcessGroup, such as `sync_group` returns, a
            DeviceMesh of one dimension, or None for all of them. It may be one without this rank
            as long as this rank does not train.
        device, dtype: of parameters and buffers.
        bias: False for a weight without a bias.
        activation, activation_slope: what follows the normalization and the residual, in the same
            kernels; see `sync_batch_norm`.

    Raises:
        TypeError, ValueError: see `sync_batch_norm`.
    """

    process_group: Any
    layer_name: str
    # Names that attributes of other batch norm layers, which are converted, are unlikely to have.
    fused_activation: str | None = None
    fused_slope: float = 0.01
    fused_add: Any = None  # what a residual replaces, of a layer that conversion has fused
    fused_as: str | None = None  # the name under which conversion has fused a layer
    fusion: str = ""
    frozen_statistics: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        self.__module__ = convert.FX_LEAF
        self.process_group = process_group
        self.fused_activation = activation
        self.fused_slope = activation_slope
        self.layer_name = f"{next(_numbers)} (made as SyncBN({num_features}))"

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0 and the running statistics to those of no batch."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def freeze(self) -> "SyncBN":
        """Normalize with the running statistics in training as well, which stay as they are; weight
        and bias still train. Nothing is communicated. Returns the layer itself.

        Raises ValueError if there are no running statistics.
        """
        if self.running_mean is None:
            raise ValueError(
                "track_running_stats: expected a layer with running statistics to freeze, got none"
            )
        self.frozen_statistics = True
        return self

    def unfreeze(self) -> "SyncBN":
        """Normalize with the batch in training again. Returns the layer itself."""
        self.frozen_statistics = False
        return self

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(batch_norm(input) + residual), both (N, num_features, *spatial); see
        `sync_batch_norm`.
        """
        if isinstance(input, Tensor) and not input.is_nested:
            self._check_input_dim(input)
            if input.dim() > 1 and input.size(1) != self.num_features:
                raise ValueError(
                    f"input: expected {self.num_features} channels (num_features) in dimension 1, "
                    f"got shape {tuple(input.shape)}"
                )
        activation = self.fused_activation
        added_after = None
        if residual is not None and self.fused_add is not None and not _alike(input, residual):
            # This add broadcasts or promotes, and is done as it was before it was fused.
            activation, added_after, residual = None, residual, None
        training = self.training and not self.frozen_statistics
        parameters, buffers = self._parameters, self._buffers
        try:  # from where they are: asking torch takes 0.6 us for each
            weight, bias = parameters["weight"], parameters["bias"]
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            num_batches_tracked = buffers["num_batches_tracked"]
        except KeyError:  # something else has taken the place of one, as parametrize does
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        if training and not self.track_running_stats:
            running_mean = running_var = num_batches_tracked = None
        output = sync_batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            self.momentum,
            self.eps,
            num_batches_tracked=num_batches_tracked,
            process_group=self.process_group,
            residual=residual,
            activation=activation,
            activation_slope=self.fused_slope,
            # a name read in a graph would be compiled into it, and layers could not share the graph
            layer_name="" if torch.compiler.is_compiling() else self.layer_name,
        )
        if added_after is None:
            return output
        return activate(
            self.fused_add(output, added_after), self.fused_activation, self.fused_slope
        )

    def _synchronized_batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        *,
        num_batches_tracked: Tensor | None = None,
    ) -> Tensor:
        """What `F.batch_norm` becomes in the forward of a subclass; see subclass_forward.py."""
        if self.frozen_statistics:
            running_mean, running_var, training = self.running_mean, self.running_var, False
        if not (training and self.training):  # nothing is communicated: a rank may do it alone
            if training or self.fused_activation is None:
                output = F.batch_norm(
                    *(input, running_mean, running_var, weight, bias),
                    *(training, momentum or 0.0, eps),
                )
                return activate(output, self.fused_activation, self.fused_slope)
            training = False
        return sync_batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            num_batches_tracked=None if running_mean is None else num_batches_tracked,
            process_group=self.process_group,
            activation=self.fused_activation,
            activation_slope=self.fused_slope,
            layer_name="" if torch.compiler.is_compiling() else self.layer_name,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """A layer that was made as SyncBN takes any; a converted one has the check of its class."""

    def extra_repr(self) -> str:
        """Settings of the layer; the ranks of its process group, if it has one of its own."""
        settings = super().extra_repr()
        if self.fused_activation is not None:
            settings += f", activation={self.fused_activation}"
        if self.frozen_statistics:
            settings += ", frozen"
        if self.process_group is None:
            return settings
        return f"{settings}, process_group={groups.describe(self.process_group)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBN":
        memo[id(self.process_group)] = self.process_group  # a group cannot be copied, only shared
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__ = copy.deepcopy(self.__dict__, memo)
        return duplicate

    def __copy__(self) -> "SyncBN":
        duplicate = self.__class__.__new__(self.__class__)
        duplicate.__dict__.update(self.__dict__)  # the group, too, which __getstate__ leaves out
        return duplicate

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}  # a group cannot be pickled

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Any = None, fuse: bool = False
    ) -> torch.nn.Module:
        """Synchronize every batch norm layer of a model, in place.

        A layer stays what it was: it keeps its identity and all it holds (parameters, buffers,
        training flag, hooks, attributes, and every name it is registered under), and its new class
        derives from its old one and this one. So it still is an instance of
        `torch.nn.BatchNorm2d`, or of a subclass, with everything else that the forward of the
        subclass does. Only of `torch.nn.SyncBatchNorm` it is none any more:
        DistributedDataParallel refuses these on a CPU.

        A subclass whose forward normalizes in a way that cannot be exchanged is left as it is, with
        a warning that names the layer, its class and what its forward does. A forward can be
        exchanged if it normalizes by `super().forward` or by `F.batch_norm` on its own running
        statistics; `triton_syncbn.conversion.subclass_forward.fault` has the whole rule.

        With `fuse`, a layer takes on the activation that follows it, and the add between them, so
        that they cost no pass over memory; see the activation and residual of `sync_batch_norm`.
        That is done where torch.fx shows that nothing else sees what is between them: not where a
        module in between has hooks, the add is of a view, or a forward decides by its input. What
        has become of each layer, and why, is in its `fusion`, and logged by the logger
        "triton_syncbn" at level INFO. Names, parameters and the state_dict stay as they are. An
        activation that is a module of its own then returns its input; a forward with an add or a
        function is exchanged for one without, in a class that derives from its own. Should one of
        the modules that it passes over get a hook, another child or another setting, then its next
        call gives it back and says so in the log.

        Args:
            module: a model, or a layer.
            process_group: the ranks to synchronize; None for the group that a layer has already,
                else for all ranks.
            fuse: whether to fuse layers with what follows them. All ranks must agree.

        Returns:
            The module itself.

        Raises:
            ValueError: a lazy layer has not seen its first input; or a layer is parametrized, or
                wrapped by `fully_shard` (do these after the conversion). No layer has changed then.
        """
        return convert.convert_layers(module, cls, process_group, fuse)

    @classmethod
    def revert_sync_batchnorm(cls, module: torch.nn.Module) -> torch.nn.Module:
        """Give every layer that was converted to this class its own class back, in place.

        A layer that was made as a SyncBN becomes a `triton_syncbn.conversion.convert.BatchNorm`,
        batch normalization of each process alone. Returns the module itself.

        Raises:
            ValueError: a layer is parametrized, wrapped by `fully_shard`, frozen, or made with an
                activation; or it is fused with a module that this one does not hold. No layer has
                changed then.
        """
        return convert.revert_layers(module, cls)
