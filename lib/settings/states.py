"""The states of training that ZeRO divides: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models", section 5. lib/compare/theory.py adds how DeepSpeed departs from it.
"""


def bytes_each(stage: int, ranks: int, element_bytes: int) -> dict[str, float]:
    """{"parameters", "gradients", "optimizer"}: bytes on a rank for each parameter, or each that is trained, with
    AdamW.

    element_bytes: 2 or 4, of a parameter. The optimizer has momentum and variance in fp32, and a copy in fp32 of
    parameters that are not.
    """
    return {
        "parameters": element_bytes / (ranks if stage == 3 else 1),
        "gradients": element_bytes / (ranks if stage >= 2 else 1),
        "optimizer": (8 if element_bytes == 4 else 12) / (ranks if stage >= 1 else 1),
    }
