"""A model as FSDP1 leaves it, in a group of one process."""

import warnings

import pytest
import torch


@pytest.fixture
def flattened():
    """``(model, strategy, use_orig_params) -> model`` inside ``FullyShardedDataParallel``."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def wrap(model, strategy, use_orig_params):
        if not use_orig_params:
            model.requires_grad_(True)  # which all of a flat parameter must share
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no use for FSDP1 on a CPU, with one process, or at all
            return FullyShardedDataParallel(
                model,
                sharding_strategy=ShardingStrategy[strategy],
                use_orig_params=use_orig_params,
                device_id=torch.device("cpu"),
            )

    yield wrap
    torch.distributed.destroy_process_group()
