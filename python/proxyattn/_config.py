"""What this build of proxyattn can run."""

import torch

from proxyattn import _C


def supported_configs() -> list[dict]:
    """The attention kernels of this build: dicts of ``device, family, head_dim, dtype``.

    CPU rows are those that the running processor supports, fastest family first; CUDA rows are
    those compiled in, newest family first. The first family that fits a call runs it. On CPUs the
    same kernels run any head_dim that is a multiple of 8 up to 256.
    """
    return _C.supported_configs()


# A constant, which torch.compile can look into.
_KERNELS = frozenset(
    (config["device"], config["head_dim"], getattr(torch, config["dtype"]))
    for config in supported_configs()
)
_CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)


def can_run(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether there is an attention kernel for such tensors on this device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    if device.type == "cpu":  # whose kernels are for any size
        return head_dim % 8 == 0 and head_dim <= 256 and dtype in _CPU_DTYPES
    return (device.type, head_dim, dtype) in _KERNELS


def show_config() -> None:
    """Prints versions, CUDA architectures and the table of kernels of this build."""
    cuda = _C.cuda_version
    print(f"proxyattn {_C.version}")
    print(f"torch     {torch.__version__} (built against {_C.torch_version})")
    if cuda is None:
        print("CUDA      not in this build")
    else:
        print(f"CUDA      {cuda // 1000}.{cuda % 1000 // 10}, for {_C.cuda_architectures}")
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            name = torch.cuda.get_device_name()
            print(f"GPU       {name}, compute capability {major}.{minor}")
        else:
            print("GPU       none found")
    rows: dict[tuple[str, str], dict[int, list[str]]] = {}
    for config in supported_configs():
        dims = rows.setdefault((config["device"], config["family"]), {})
        dims.setdefault(config["head_dim"], []).append(config["dtype"])
    print(f"{'device':<8}{'family':<10}{'head_dim':<10}dtypes")
    for (device, family), dims in rows.items():
        for head_dim, dtypes in dims.items():
            print(f"{device:<8}{family:<10}{head_dim:<10}{', '.join(dtypes)}")
