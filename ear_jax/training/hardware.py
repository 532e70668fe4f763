"""Peak speed of known accelerators, for model FLOPs utilisation."""

# Dense bfloat16 with float32 accumulation, per jax device, from the makers' data sheets (figures "with sparsity"
# halved; TPU v2 and v3 have two jax devices a chip). MIG slices and unknown kinds are absent on purpose.
_PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA A10": 125.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def peak_flops_per_s(device_kind: str) -> float | None:
    """Return the dense bfloat16 peak of one device in FLOP/s, or None for a kind that is not in the table.

    `device_kind` is `jax.Device.device_kind`. A float32 run has another peak: utilisation is only to be shown for
    bfloat16 compute.
    """
    peak = _PEAK_TFLOPS.get(device_kind.strip())
    return None if peak is None else peak * 1e12
