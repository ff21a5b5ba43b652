"""Which devices each of several engines gets."""

import os
from collections.abc import Mapping
from typing import Any


def devices_of_engines(size: int, options: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the environment of each engine says of devices: tensor_parallel_size of them each.

    One engine takes those that are visible, and a CPU has none. Raises ValueError if there are too few.
    """
    if size == 1 or options.get("device") == "cpu":
        return [{}] * size
    import torch  # takes a second, and without it a missing device would mean a CPU

    num_devices, each = torch.cuda.device_count(), options.get("tensor_parallel_size", 1)
    if num_devices == 0:
        return [{}] * size  # the engine itself refuses device="cuda"
    if size * each > num_devices:
        raise ValueError(
            f"data_parallel_size={size} with tensor_parallel_size={each} needs {size * each} devices; "
            f"{num_devices} are visible"
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(num_devices)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i * each : (i + 1) * each])} for i in range(size)]
