"""Where the prunable units of a transformer sit: attention heads and feed-forward channels with all they depend on.

A unit is an attention head (with grouped queries: one key/value head and all its query heads) or one feed-forward
channel. Removing it removes rows of the projections that write it and columns of the one that reads it.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedspine.errors import BadInput, nearest
from fedspine.planning.sparsity import LayerShape

UnitKind: TypeAlias = Literal["heads", "channels"]


@dataclass(frozen=True)
class UnitMap:
    """How one architecture names the linear layers of its blocks, below the block list `layers` of its backbone."""

    layers: str
    query: str
    key: str
    value: str
    output: str
    up: tuple[str, ...]
    down: str
    decoder: bool = False


_BERT = UnitMap(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
)
_DISTILBERT = UnitMap(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    up=("ffn.lin1",),
    down="ffn.lin2",
)
_LLAMA = UnitMap(
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    decoder=True,
)
UNIT_MAPS: dict[str, UnitMap] = {  # by the `model_type` of a transformers configuration
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def unit_map(model_type: str) -> UnitMap:
    """The unit map of an architecture; BadInput says which have one."""
    if model_type not in UNIT_MAPS:
        near = nearest(model_type, UNIT_MAPS)
        hint = f" (nearest: {near})" if near else ""
        raise BadInput(
            f"architecture {model_type!r} has no unit map, so nothing is known of its heads and channels{hint}; "
            f"take a model of one of: {', '.join(UNIT_MAPS)}"
        )
    return UNIT_MAPS[model_type]


@dataclass(frozen=True)
class Site:
    """One prunable linear layer: which units its rows (outputs) and columns (inputs) belong to."""

    path: str  # of the module inside the model
    layer: int
    rows: int  # of the unpruned weight
    columns: int
    row_units: UnitKind | None
    column_units: UnitKind | None
    per_unit: int  # consecutive rows or columns of one unit


@dataclass(frozen=True)
class Anatomy:
    """The prunable part of one model: `layers` equal blocks of `heads` head units and `channels` channels."""

    layers: int
    heads: int
    channels: int
    width: int  # of the residual stream, never pruned
    query_heads: int
    head_dim: int
    decoder: bool
    sites: tuple[Site, ...]

    @property
    def shape(self) -> LayerShape:
        """Units of one block and the parameters that go with each."""
        block = [site for site in self.sites if site.layer == 0]
        return LayerShape(
            heads=self.heads,
            channels=self.channels,
            head_parameters=sum(s.per_unit * self.width for s in block if "heads" in (s.row_units, s.column_units)),
            channel_parameters=sum(self.width for s in block if "channels" in (s.row_units, s.column_units)),
        )

    @property
    def parameters(self) -> int:
        """Weights of all prunable linear layers: what sparsity is counted on."""
        return self.layers * self.shape.parameters


def anatomy_of(config: object, prefix: str) -> Anatomy:
    """Read the anatomy from a transformers configuration; `prefix` is the path of the backbone inside the model."""
    names = unit_map(config.model_type)  # type: ignore[attr-defined]
    width = config.hidden_size  # type: ignore[attr-defined]
    query_heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    heads: int = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim: int = getattr(config, "head_dim", None) or width // query_heads
    channels: int = getattr(config, "intermediate_size", None) or config.hidden_dim  # type: ignore[attr-defined]
    layers: int = config.num_hidden_layers  # type: ignore[attr-defined]
    query_rows = query_heads // heads * head_dim
    sites = []
    for layer in range(layers):
        path = f"{prefix}.{names.layers}.{layer}."
        for name, per_unit in ((names.query, query_rows), (names.key, head_dim), (names.value, head_dim)):
            sites.append(Site(path + name, layer, heads * per_unit, width, "heads", None, per_unit))
        sites.append(Site(path + names.output, layer, width, heads * query_rows, None, "heads", query_rows))
        sites += [Site(path + name, layer, channels, width, "channels", None, 1) for name in names.up]
        sites.append(Site(path + names.down, layer, width, channels, None, "channels", 1))
    return Anatomy(layers, heads, channels, width, query_heads, head_dim, names.decoder, tuple(sites))
