"""Names every use of undocumented parts of torch and transformers, with the signature that it must have.

An upgrade that changes one of these fails here, by name, instead of losing a path in silence.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

from elastic_moe.model import torch_private, transformers_private

MODEL = Path(torch_private.__file__).parent
SEAMS = ("torch_private.py", "transformers_private.py")

SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (
        torch_private.varlen.varlen_attn,
        "query key value cu_seq_q cu_seq_k max_q max_k return_aux scale window_size",
    ),
    (torch_private.varlen.AuxRequest, "lse"),
    (torch_private.TorchDispatchMode.__torch_dispatch__, "self func types args kwargs"),
    (transformers_private.get_model_conversion_mapping, "model"),
    (
        transformers_private.rename_source_key,
        "source_key weight_renamings weight_converters base_model_prefix meta_state_dict",
    ),
    (transformers_private.dot_natural_key, "s"),
    (transformers_private.WeightConverter, "source_patterns target_patterns operations"),
    (transformers_private.WeightConverter.add_tensor, "self target_key source_key source_pattern future"),
    (transformers_private.WeightConverter.convert, "self layer_name model config"),
    (transformers_private.WeightRenaming, "source_patterns target_patterns"),
    (transformers_private.ALL_EXPERTS_FUNCTIONS.register, "key value"),
    (transformers_private.ExpertsInterface.register, "key value"),
    (modeling_mixtral.apply_rotary_pos_emb, "q k cos sin"),
]
"""Each with the parameters that we pass, in this order; others that it has must have defaults."""


@pytest.mark.parametrize(("function", "names"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures(function: Callable[..., Any], names: str) -> None:
    # what a fitted model has left in place of a modelling file's function stands for the original
    parameters = list(inspect.signature(getattr(function, "emoe_original", function)).parameters.values())
    wanted = names.split()
    assert [parameter.name for parameter in parameters[: len(wanted)]] == wanted
    varied = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(p.default is not p.empty or p.kind in varied for p in parameters[len(wanted) :])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_operators_of_onednn() -> None:
    schemas = {
        "_reorder_linear_weight": "(Tensor self, int? batch_size=None) -> Tensor Y",
        "_linear_pointwise": (
            "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
        ),
    }
    for name, schema in schemas.items():
        assert str(getattr(torch.ops.mkldnn, name).default._schema) == f"mkldnn::{name}{schema}"


def test_the_operator_that_reads_a_value() -> None:
    assert str(torch_private.READS_A_VALUE._schema) == "aten::_local_scalar_dense(Tensor self) -> Scalar"


def test_plain_tensors_hides_a_subclass() -> None:
    class Marked(torch.Tensor):
        pass

    with torch_private.plain_tensors():
        assert type(torch.zeros(2).as_subclass(Marked) + 1) is torch.Tensor


def test_process_groups() -> None:
    """pybind11 writes signatures into docstrings only."""
    alltoall = "output: torch.Tensor, input: torch.Tensor, output_split_sizes: .*, input_split_sizes: .*, opts: "
    for function, pattern in (
        (dist.ProcessGroup.alltoall_base, alltoall),
        (torch_private.PrefixStore.__init__, "prefix: str, store: "),
        (torch_private.TCPStore.__init__, "host_name: str, port: .*is_master: bool.*timeout: datetime.timedelta"),
    ):
        assert function.__doc__ is not None
        assert re.search(pattern, function.__doc__), (function, pattern)
    if dist.is_nccl_available():
        assert hasattr(dist.ProcessGroupNCCL.Options, "_timeout")


def test_attributes_of_models_and_configurations() -> None:
    config = AutoConfig.for_model("mixtral", num_hidden_layers=1, hidden_size=64, intermediate_size=16, vocab_size=32)
    assert transformers_private.has_causal_model(config)
    assert not transformers_private.has_causal_model(AutoConfig.for_model("clip"))
    assert "mixtral" in transformers_private.CONFIG_MAPPING
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    transformers_private.set_implementations(model.config, "eager", "eager")
    assert transformers_private.implementations(model.config) == ("eager", "eager")
    assert transformers_private.tied_weights(model) == {}
    assert list(transformers_private.may_be_missing(model)) == []
    [experts] = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    assert all(hasattr(experts, flag) for flag in transformers_private.EXPERT_FLAGS)
    assert transformers_private.apply_gate(experts, torch.ones(3, 8)).shape == (3, 4)
    assert transformers_private.rotary_function(modeling_mixtral) is modeling_mixtral.apply_rotary_pos_emb


# --- Nowhere else ---------------------------------------------------------------------------------------------------

PUBLIC = ("transformers.utils",)
PRIVATE_ATTRIBUTES = {
    "_C",
    "_apply_gate",
    "_attn_implementation",
    "_experts_implementation",
    "_keys_to_ignore_on_load_missing",
    "_model_mapping",
    "_schema",
    "all_tied_weights_keys",
    "alltoall_base",
    "ops",
}


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Submodules of transformers, torch's underscored modules, and attributes that are listed above."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, *inner = node.module.split(".")
            if top == "transformers" and inner and not node.module.startswith(PUBLIC):
                yield node.module
            if top == "torch" and any(part.startswith("_") for part in inner):
                yield node.module
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES:
            yield node.attr


def test_no_other_file_uses_what_is_private() -> None:
    found = {
        str(path.relative_to(MODEL)): uses
        for path in MODEL.rglob("*.py")
        if path.name not in SEAMS and (uses := list(private_uses(ast.parse(path.read_text()))))
    }
    assert found == {}


def test_private_uses_are_seen() -> None:
    source = "from torch._C import a\nfrom transformers.cache_utils import b\ntorch.ops.x\nmodule._apply_gate(1)\n"
    assert sorted(private_uses(ast.parse(source))) == ["_apply_gate", "ops", "torch._C", "transformers.cache_utils"]
