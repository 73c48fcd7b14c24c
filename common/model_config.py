"""config.json of a checkpoint: the shape of a model under Hugging Face's names; what cannot be computed is refused.

Every field of transformers' configurations for the four architectures is honoured (the fields of ModelConfig and of
MixtureConfig, RoPE under its names of transformers 4 and 5), refused at any value but one (ONLY, `layer_types`,
`architectures`), or does not touch logits (INERT). Fields that transformers does not know either are ignored by both.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.files import read_json

if TYPE_CHECKING:  # torch takes seconds to import, and here it only names a type
    import torch

# model_type -> (the class that transformers calls it, qk_norm, qkv_bias)
ARCHITECTURES = {
    "qwen3": ("Qwen3ForCausalLM", True, False),
    "qwen2": ("Qwen2ForCausalLM", False, True),
    "llama": ("LlamaForCausalLM", False, False),
    "qwen3_moe": ("Qwen3MoeForCausalLM", True, False),
}
# Other fields of config.json that change the computation. Absent means the value here, transformers' own default for
# all of them; any other value is an architecture this file does not compute.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "auto_map": None,  # names Python files of the checkpoint, which are never run
}
# Fields that leave the logits as they are: how weights are stored and drawn, what generate() and the trainer do, and
# sizes of mechanisms that ONLY switches off.
INERT = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "initializer_range",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "problem_type",
    "id2label",
    "label2id",
    "pad_token_id",
    "bos_token_id",
    "sliding_window",
    "max_window_layers",
    "pretraining_tp",
    "_name_or_path",
    "output_router_logits",
    "router_aux_loss_coef",
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


MOST_EXPERTS = 4096  # of a layer; published models have up to some hundreds


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's "llama3" scaling, under Hugging Face's names; see `frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # positions


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """The experts of a mixture, under Hugging Face's names; see moe.py."""

    num_experts: int  # of each layer that has some
    num_experts_per_tok: int
    moe_intermediate_size: int  # of one expert
    norm_topk_prob: bool  # the weights of a token's experts sum to one
    decoder_sparse_step: int = 1  # layers step - 1, 2 step - 1, ... have experts
    mlp_only_layers: tuple[int, ...] = ()  # except these

    def at(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts; the others have one MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_raw(cls, path: str | Path, raw: dict[str, Any]) -> "MixtureConfig":
        """The fields of a config.json. transformers 5 writes num_experts as num_local_experts."""
        count = raw.get("num_experts", raw.get("num_local_experts"))
        if raw.get("num_local_experts", count) != count:
            both = f"num_experts is {count!r} but num_local_experts is {raw['num_local_experts']!r}"
            raise InputError(f"{path}: {both}; make them equal")
        only = raw.get("mlp_only_layers")
        if only is not None and not isinstance(only, list):
            raise InputError(f"{path}: mlp_only_layers is {only!r}; supported: a list of numbers of layers")
        fields = {**raw, "num_experts": count, "mlp_only_layers": tuple(only or ())}
        fields.setdefault("decoder_sparse_step", 1)
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if fields.get(name) is None]:
            raise InputError(f"{path}: field {', '.join(missing)} is missing; every shape must be written out")
        return cls(**{name: fields[name] for name in names})

    def check(self, where: str | Path, layers: int) -> None:
        """Raise InputError, its message starting with `where`, unless the values make experts of `layers` layers."""
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
            if not _is_size(getattr(self, name)):
                raise InputError(f"{where}: {name} is {getattr(self, name)!r}; supported: a positive integer")
        if self.num_experts > MOST_EXPERTS:  # each is listed with its tensors before the weights are read
            raise InputError(f"{where}: num_experts is {self.num_experts:,}; supported: at most {MOST_EXPERTS:,}")
        if self.num_experts_per_tok > self.num_experts:
            chosen = f"{self.num_experts_per_tok} of {self.num_experts}"
            raise InputError(f"{where}: num_experts_per_tok is {chosen} experts; supported: at most all of them")
        if type(self.norm_topk_prob) is not bool:
            raise InputError(f"{where}: norm_topk_prob is {self.norm_topk_prob!r}; supported: true, false")
        if not all(type(i) is int and 0 <= i < layers for i in self.mlp_only_layers):
            raise InputError(
                f"{where}: mlp_only_layers is {list(self.mlp_only_layers)!r}; supported: numbers of layers"
            )
        if not any(map(self.at, range(layers))):
            raise InputError(f"{where}: decoder_sparse_step and mlp_only_layers leave no layer with experts; use qwen3")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under the field names of Hugging Face's config.json where it has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_id: int | tuple[int, ...]
    model_type: str = "qwen3"
    qk_norm: bool = True  # RMS norm of each query and key head
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None
    moe: MixtureConfig | None = None

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Read a Hugging Face config.json. Raises InputError naming the field, its value and what is supported.

        Shapes must be written out, with one exception: Qwen2 and Llama configs may lack head_dim, which is then
        hidden_size // num_attention_heads, as in transformers.
        """
        raw = read_json(path)
        kind = raw.get("model_type") if isinstance(raw, dict) else raw
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            raise InputError(f"{path}: model_type is {kind!r}; supported: {', '.join(map(repr, ARCHITECTURES))}")
        name, qk_norm, qkv_bias = ARCHITECTURES[kind]
        if raw.get("architectures") not in (None, [name]):
            raise InputError(f"{path}: architectures is {raw['architectures']!r}; supported: {[name]!r}")
        for field, value in ONLY.items():
            if raw.get(field, value) != value:
                raise InputError(f"{path}: {field} is {raw[field]!r}; supported: {value!r}")
        kinds = raw.get("layer_types") or ["full_attention"]
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise InputError(
                f"{path}: layer_types is {raw['layer_types']!r}; supported: 'full_attention' in each layer"
            )
        theta, scaling = _rope(path, raw)
        fields = {**raw, "rope_theta": theta, "rope_scaling": scaling, "qk_norm": qk_norm, "qkv_bias": qkv_bias}
        fields["moe"] = MixtureConfig.from_raw(path, raw) if kind == "qwen3_moe" else None
        if fields.get("head_dim") is None and kind in ("qwen2", "llama"):
            fields["head_dim"] = _head_dim(path, raw)
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in fields]
        if missing:
            raise InputError(f"{path}: field {', '.join(missing)} is missing; every shape must be written out")
        config = cls(**{name: fields[name] for name in names})
        config.check(path)
        return config

    def check(self, where: str | Path) -> None:
        """Raise InputError, its message starting with `where`, unless the values make a computable model."""
        for name in SIZES:
            if not _is_size(getattr(self, name)):
                raise InputError(f"{where}: {name} is {getattr(self, name)!r}; supported: a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            if not _is_positive(getattr(self, name)):
                raise InputError(f"{where}: {name} is {getattr(self, name)!r}; supported: a positive number")
        if type(self.tie_word_embeddings) is not bool:
            raise InputError(f"{where}: tie_word_embeddings is {self.tie_word_embeddings!r}; supported: true, false")
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        if not ends or not all(type(i) is int and 0 <= i < self.vocab_size for i in ends):
            shown = list(ends) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
            raise InputError(f"{where}: eos_token_id is {shown!r}; supported: an id below vocab_size, or several")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} over {self.num_key_value_heads}"
            raise InputError(f"{where}: num_attention_heads over num_key_value_heads is {heads}; supported: a multiple")
        if self.head_dim % 2:
            raise InputError(f"{where}: head_dim is {self.head_dim}; supported: an even number (RoPE turns pairs)")
        if self.moe is not None:
            self.moe.check(where, self.num_hidden_layers)

    def to_json(self, dtype: "torch.dtype") -> dict[str, Any]:
        """The config.json from which transformers builds the same model."""
        name, *implied = ARCHITECTURES[self.model_type]
        assert implied == [self.qk_norm, self.qkv_bias], (self, "model_type says which of the two there are")
        fields = dataclasses.asdict(self)
        del fields["qk_norm"], fields["qkv_bias"]
        if experts := fields.pop("moe"):
            fields |= experts | {"num_local_experts": experts["num_experts"]}  # its name in transformers 5
        theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
        rope = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling}
        return {
            "architectures": [name],
            **fields,
            "rope_theta": theta,  # transformers 4
            "rope_scaling": None if scaling is None else rope,  # transformers 4
            "rope_parameters": {**rope, "rope_theta": theta},  # transformers 5
            "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 4
            "dtype": str(dtype).removeprefix("torch."),  # transformers 5
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "use_sliding_window": False,
        }


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _head_dim(path: str | Path, raw: dict[str, Any]) -> int:
    """hidden_size over num_attention_heads, for a config without head_dim."""
    size: Any = raw.get("hidden_size")
    heads: Any = raw.get("num_attention_heads")
    if not _is_size(size) or not _is_size(heads) or size % heads:
        raise InputError(
            f"{path}: head_dim is missing and hidden_size {size!r} over num_attention_heads {heads!r} is no size; "
            "supported: a multiple, or head_dim written out"
        )
    return size // heads


def _rope(path: str | Path, raw: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """RoPE's base and scaling: transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise InputError(f"{path}: {name} is {rope!r}; supported: an object")
        theta = rope.get("rope_theta", raw.get("rope_theta"))
        if raw.get("rope_theta", theta) != theta:
            raise InputError(f"{path}: rope_theta is {raw['rope_theta']!r} but {name} is {rope!r}; make them equal")
        found.append((theta, _rope_scaling(path, name, rope)))
    if not found:
        found.append((raw.get("rope_theta"), None))
    if found[0] != found[-1]:
        raise InputError(f"{path}: rope_parameters and rope_scaling differ; make them equal or delete one")
    if found[0][0] is None:
        raise InputError(f"{path}: field rope_theta is missing; every shape must be written out")
    return found[0]


def _rope_scaling(path: str | Path, name: str, rope: dict[str, Any]) -> RopeScaling | None:
    """The scaling that one of the two objects asks for; None for the default RoPE."""
    values = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta")}
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if kind == "default" and not values:
        return None
    if kind != "llama3" or set(values) != set(names):
        supported = f"rope_type 'default', or 'llama3' with {', '.join(names)}"
        raise InputError(f"{path}: {name} is {rope!r}; supported: {supported}")
    scaling = RopeScaling(**values)
    good = all(map(_is_positive, values.values())) and scaling.low_freq_factor < scaling.high_freq_factor
    if not good or not _is_size(scaling.original_max_position_embeddings):
        raise InputError(f"{path}: {name} is {rope!r}; supported: positive numbers, the low factor below the high one")
    return scaling
