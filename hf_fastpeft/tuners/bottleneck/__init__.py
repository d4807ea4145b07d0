"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751), also in parallel (He et al. 2022, arXiv 2110.04366)."""

from hf_fastpeft.tuners.bottleneck.config import BottleneckAdapterConfig
from hf_fastpeft.tuners.bottleneck.layer import BottleneckLayer
from hf_fastpeft.tuners.bottleneck.model import BottleneckModel
from hf_fastpeft.tuners.bottleneck.targets import DEFAULT_TARGETS

__all__ = ["DEFAULT_TARGETS", "BottleneckAdapterConfig", "BottleneckLayer", "BottleneckModel"]
