"""The head while it learns.

B rows, D hidden size, K outputs, F features it reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tagllm.head import Head, measured, states_read
from tagllm.kernel import Kernel

SMALLEST_SCALE = 1e-4
"""Of a feature that hardly differs from row to row."""


class HeadModule(nn.Module):
    """The trained form of a `Head`: learns standardised targets, answers in units of the data.

    It learns on standardised means over the fields too, once it was told their centre and scale: hidden states have an
    offset that all rows share and is far larger than what tells them apart, so that a step on them as they are hardly
    does more than move the mean. `folded` gives the map on hidden states as they are, which is what a `Head` holds.
    The kernel of a loaded head stays as it is, and so does the noise of one that was fitted to censored targets.
    """

    mean_K: Tensor
    std_K: Tensor
    center_F: Tensor
    scale_F: Tensor
    noise_K: Tensor | None

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.spec, self.pools = head.spec, head.pools
        self.weight_KF = nn.Parameter(head.weight_KF.clone())
        self.bias_K = nn.Parameter(head.bias_K.clone())
        self.register_buffer("mean_K", head.mean_K.clone())
        self.register_buffer("std_K", head.std_K.clone())
        self.register_buffer("center_F", torch.zeros_like(head.weight_KF[0]))
        self.register_buffer("scale_F", torch.ones_like(head.weight_KF[0]))
        self.register_buffer("noise_K", None if head.noise_K is None else head.noise_K.clone())
        self.has_kernel = head.kernel is not None
        for name, part in head.kernel._asdict().items() if head.kernel else ():
            self.register_buffer(name, part.clone())

    def forward(self, last_BD: Tensor, mean_BD: Tensor) -> Tensor:
        features_BF = torch.cat(states_read(self.spec.reads, last_BD, mean_BD), dim=1)
        values_BK = ((features_BF - self.center_F) / self.scale_F) @ self.weight_KF.T + self.bias_K
        if (kernel := self.kernel()) is not None:
            values_BK = values_BK + kernel(features_BF)
        if self.noise_K is not None:
            values_BK = measured(values_BK, self.noise_K, self.spec, self.mean_K, self.std_K)
        return values_BK

    def kernel(self) -> Kernel | None:
        return Kernel(*(getattr(self, name) for name in Kernel._fields)) if self.has_kernel else None

    def as_head(self) -> Head:
        """What it has learned, on the CPU."""
        weight_KF, bias_K = (part.cpu() for part in self.folded(self.weight_KF.detach(), self.bias_K.detach()))
        kernel = Kernel(*(part.cpu() for part in kernel)) if (kernel := self.kernel()) else None
        noise_K = None if self.noise_K is None else self.noise_K.cpu()
        return Head(self.spec, weight_KF, bias_K, self.mean_K.cpu(), self.std_K.cpu(), kernel, self.pools, noise_K)

    def folded(self, weight_KF: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of this module -> weight and bias on features as they are."""
        center_F, scale_F = self.center_F.to(weight_KF.device), self.scale_F.to(weight_KF.device)
        raw_KF = weight_KF / scale_F
        return raw_KF, bias_K - raw_KF @ center_F

    def unfolded(self, weight_KF: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `folded`."""
        center_F, scale_F = self.center_F.to(weight_KF.device), self.scale_F.to(weight_KF.device)
        return weight_KF * scale_F, bias_K + weight_KF @ center_F

    def set_scale_of(self, mean_nD: Tensor) -> None:
        """Takes centre and scale of the means over the fields; the parameters must follow (`folded` before, `unfolded`
        after). The state of the tag's last row stays as it is: training moves it by more than rows differ in it. So
        does what is alike in all rows, which a step would blow up in others."""
        if self.spec.reads != "last":
            center_D, scale_D = mean_nD.double().mean(dim=0), mean_nD.double().std(dim=0, correction=0)
            self.center_F[-mean_nD.shape[1] :] = center_D
            self.scale_F[-mean_nD.shape[1] :] = torch.where(scale_D > 0, scale_D.clamp(min=SMALLEST_SCALE), 1)

    def standardise(self, target_BK: Tensor) -> Tensor:
        return target_BK if self.spec.classes else (target_BK - self.mean_K) / self.std_K

    def unstandardise(self, values_BK: Tensor) -> Tensor:
        return values_BK if self.spec.classes else values_BK * self.std_K + self.mean_K
