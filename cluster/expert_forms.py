"""The forms in which a worker keeps experts and its trunk, and which form a configuration asks for."""

from __future__ import annotations

from enum import StrEnum

from elastic_moe.cluster.errors import ConfigError


class ExpertForm(StrEnum):
    """How the matrices of an expert are kept. All forms but PLAIN are computed by the native library on CPUs. On GPUs,
    kernels read them packed, or they are unpacked in each step."""

    PLAIN = "plain"
    """Weights in the served dtype."""
    INT8 = "int8"
    """8 bits, with a float32 scale for every 128 weights."""
    INT4 = "int4"
    """4 bits, with a bfloat16 scale and a zero point for every 32 weights."""
    INT4_HALF = "int4-float16"
    """4 bits as in INT4, with scales in float16."""
    FP8 = "fp8"
    """8 bits in E4M3, with a float32 scale for every 128 weights."""
    MXFP8 = "mxfp8"
    """8 bits in E4M3, with a power of 2 for every 32 weights, kept as its exponent's byte (E8M0)."""
    MXFP4 = "mxfp4"
    """E2M1 codes, with a power of 2 for every 32 weights."""
    NVFP4 = "nvfp4"
    """E2M1 codes, with a scale in E4M3 for every 16 weights. The float32 scales of outputs are not counted."""


_WEIGHT_BYTES = {
    ExpertForm.INT8: 1 + 4 / 128,
    ExpertForm.FP8: 1 + 4 / 128,
    ExpertForm.MXFP8: 1 + 1 / 32,
    ExpertForm.INT4: 0.5 + 2.5 / 32,
    ExpertForm.INT4_HALF: 0.5 + 2.5 / 32,
    ExpertForm.MXFP4: 0.5 + 2 / 32,
    ExpertForm.NVFP4: 0.5 + 1 / 16,
}


def weight_bytes(form: ExpertForm, plain_bytes: float) -> float:
    """Bytes of a weight with its share of scales and zero points. `plain_bytes`: of a weight in the served dtype."""
    return _WEIGHT_BYTES.get(form, plain_bytes)


def expert_form(
    asked: str, *, kept: ExpertForm, packed_as: str | None, dtype: str, device: str, native: bool = True
) -> ExpertForm:
    """The form for a setting `asked` of --expert-dtype.

    `kept` is the form in which the checkpoint's experts come, or PLAIN if they come in no form that is computed;
    `packed_as` names the format of its packed experts, or is None. `native`: whether the native library is there.
    Raises ConfigError where experts would be rounded a second time, and for a form that `dtype` does not allow.
    """
    on_cpu = device == "cpu"
    computed = dtype == "bfloat16" or (dtype == "float16" and not on_cpu)
    if asked == "auto":
        return kept if computed and (native or not on_cpu) else ExpertForm.PLAIN
    if asked == "bfloat16":
        if dtype != "bfloat16":
            raise ConfigError(f"expert_dtype: bfloat16 needs dtype bfloat16, and {dtype} is served")
        return ExpertForm.PLAIN
    if packed_as is not None and not kept.value.startswith(asked):
        raise ConfigError(
            f"expert_dtype: the checkpoint has its experts in {packed_as}, and {asked} would round them a second time; "
            "expected auto or bfloat16"
        )
    if dtype != "bfloat16" and not (computed and packed_as is not None):
        raise ConfigError(f"expert_dtype: {asked} needs dtype bfloat16, and {dtype} is served")
    return ExpertForm(asked) if packed_as is None else kept


def trunk_form(asked: str, *, packed_as: str | None, dtype: str, device: str) -> ExpertForm:
    """The form of the trunk's matrices for a setting `asked` of --trunk-dtype: PLAIN, or INT8.

    `packed_as` names the format of the checkpoint's packed trunk, or is None. Raises ConfigError for a dtype or a
    device that int8 is not computed with, and where matrices would be rounded a second time.
    """
    if asked == "auto":
        return ExpertForm.PLAIN
    if dtype != "bfloat16":
        raise ConfigError(f"trunk_dtype: {asked} needs dtype bfloat16, and {dtype} is served; expected auto")
    if asked == "bfloat16":
        return ExpertForm.PLAIN
    if device != "cpu":
        raise ConfigError(f"trunk_dtype: {asked} is for CPUs, and the device is {device}; expected auto or bfloat16")
    if packed_as is not None:
        raise ConfigError(
            f"trunk_dtype: the checkpoint has linear layers in {packed_as}, and {asked} would round them a second time;"
            " expected auto or bfloat16"
        )
    return ExpertForm(asked)
