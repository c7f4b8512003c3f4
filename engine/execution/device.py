"""What differs between devices beside the kernels: the precision of products, and faults."""

import torch

from cottention.engine.errors import DeviceFaultError


def use_exact_products(device: str) -> None:
    """Have torch compute products on `device` as their types say.

    On CUDA: no TF32 in place of float32, and sums of 16-bit products in float32 throughout. These
    are settings of the process; a CPU has none.
    """
    if not device.startswith("cuda"):
        return
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False


def reserved_memory(device: str) -> int | None:
    """Bytes that torch has taken of a GPU, in use or not; None for a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize(device)
    reserved: int = torch.cuda.memory_reserved(device)
    return reserved


def check_device(device: str, error: Exception) -> None:
    """Raise DeviceFaultError from `error` if it is a fault of the device and not of a request.

    After such a fault, an illegal address or a lost device, every later call fails as well. Some
    come as an error of another kind, from a library, so the device is asked. Memory that has run
    out is no such fault: other requests may need less.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return
    fault = error if isinstance(error, torch.AcceleratorError) else _fault_of(device)
    if fault is not None:
        reason = str(fault).partition("\n")[0]
        raise DeviceFaultError(
            f"the device {device} failed and computes nothing until the server is started again:"
            f" {reason}"
        ) from error


def _fault_of(device: str) -> Exception | None:
    """What the device answers when it is waited for; None where all is well."""
    if device.startswith("cuda"):
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as fault:
            return fault
    return None
