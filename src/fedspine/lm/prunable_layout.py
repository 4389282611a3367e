"""Where the prunable units of a transformer sit: attention heads and feed-forward channels with all
they depend on.

A unit is an attention head (with grouped queries: one key/value head and all its query heads) or
one feed-forward channel. Removing it removes rows of the projections that write it and columns of
the one that reads it.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from fedspine.control.sparsity import LayerShape
from fedspine.core.errors import BadInput, listed, nearest
from fedspine.core.message import message

UnitKind: TypeAlias = Literal["heads", "channels"]
# which fewer heads, the same in every layer, a stock configuration of `transformers` can say:
# "none", where the size of a head is the width over the number of heads; "divisors" of the width
FewerHeads: TypeAlias = Literal["none", "divisors", "any"]

MOST_GROUP = 64  # quantised weights that share a scale and a zero point
RANGE_BITS = 16 + 8  # of both


@dataclass(frozen=True)
class UnitMap:
    """The module names of one architecture: the embeddings, the block list, a block's linear
    layers.
    """

    embeddings: str
    layers: str
    query: str
    key: str
    value: str
    output: str
    up: tuple[str, ...]
    down: str
    decoder: bool = False
    fewer_heads: FewerHeads = "none"


_BERT = UnitMap(
    embeddings="embeddings",
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
)
_DISTILBERT = UnitMap(
    embeddings="embeddings",
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    up=("ffn.lin1",),
    down="ffn.lin2",
)
_LLAMA = UnitMap(
    embeddings="embed_tokens",
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    decoder=True,
    fewer_heads="divisors",
)
_QWEN = replace(_LLAMA, fewer_heads="any")
UNIT_MAPS: dict[str, UnitMap] = {  # by the `model_type` of a transformers configuration
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
}


def unit_map(model_type: str) -> UnitMap:
    """The unit map of an architecture; raises BadInput with those that have one."""
    if model_type not in UNIT_MAPS:
        near = nearest(model_type, UNIT_MAPS)
        hint = f" (nearest: {near})" if near else ""
        raise BadInput(
            f"architecture {model_type!r} has no unit map, so nothing is known of its heads and "
            f"channels{hint}; take a model of one of: {listed(UNIT_MAPS)}"
        )
    return UNIT_MAPS[model_type]


@dataclass(frozen=True)
class PrunableSite:
    """One prunable linear layer: which units its rows (outputs) and columns (inputs) belong to."""

    path: str  # of the module inside the model
    layer: int
    rows: int  # of the unpruned weight
    columns: int
    row_units: UnitKind | None
    column_units: UnitKind | None
    per_unit: int  # consecutive rows or columns of one unit


@message
class PrunableLayout:
    """The prunable part of one model: `layers` equal blocks of `heads` head units and `channels`
    channels.
    """

    architecture: str  # transformers' model_type
    prefix: str  # path of the backbone inside the model
    layers: int
    heads: int
    channels: int
    width: int  # of the residual stream, never pruned
    query_heads: int
    head_dim: int

    @property
    def held_bits(self) -> int | None:
        """Bits in which a device holds a frozen weight of the blocks; None: as the base has it."""
        return None

    @property
    def decoder(self) -> bool:
        return unit_map(self.architecture).decoder

    @cached_property
    def sites(self) -> tuple[PrunableSite, ...]:
        """Every prunable linear layer, block by block."""
        return tuple(site for layer in range(self.layers) for site in self._block(layer))

    @property
    def shape(self) -> LayerShape:
        """Units of one block and the parameters that go with each."""
        block = self._block(0)
        return LayerShape(
            heads=self.heads,
            channels=self.channels,
            head_parameters=sum(
                s.per_unit * self.width for s in block if "heads" in (s.row_units, s.column_units)
            ),
            channel_parameters=sum(
                self.width for s in block if "channels" in (s.row_units, s.column_units)
            ),
        )

    @property
    def heads_dropped(self) -> tuple[int, ...]:
        """How many heads may be gone from every layer so that a stock configuration can say it."""
        choices = range(self.heads)
        match unit_map(self.architecture).fewer_heads:
            case "none":
                return (0,)
            case "divisors":
                group = self.query_heads // self.heads
                return tuple(n for n in choices if self.width % ((self.heads - n) * group) == 0)
        return tuple(choices)

    @property
    def parameters(self) -> int:
        """The number of weights of all prunable linear layers, of which sparsity is a share."""
        return self.layers * self.shape.parameters

    def _block(self, layer: int) -> list[PrunableSite]:
        names, width = unit_map(self.architecture), self.width
        path = f"{self.prefix}.{names.layers}.{layer}."
        queries = self.query_heads // self.heads * self.head_dim  # rows of one unit's query heads
        rows = ((names.query, queries), (names.key, self.head_dim), (names.value, self.head_dim))
        return [
            *(
                PrunableSite(path + name, layer, self.heads * n, width, "heads", None, n)
                for name, n in rows
            ),
            PrunableSite(
                path + names.output, layer, width, self.heads * queries, None, "heads", queries
            ),
            *(
                PrunableSite(path + name, layer, self.channels, width, "channels", None, 1)
                for name in names.up
            ),
            PrunableSite(path + names.down, layer, width, self.channels, None, "channels", 1),
        ]


@message
class QuantisedLayout(PrunableLayout):
    """The same of a model whose blocks' frozen weights are quantised (`lm.frozen`)."""

    bits: int  # of a weight, 8 or 4

    @property
    def held_bits(self) -> int:
        return self.bits

    @property
    def group(self) -> int:
        """How many weights share a scale and a zero point: the largest divisor of the width up to
        64.
        """
        return max(size for size in range(1, MOST_GROUP + 1) if self.width % size == 0)

    @property
    def bits_each(self) -> float:
        """What a weight takes with its part of its group's scale and zero point.

        >>> shape = {"layers": 1, "heads": 4, "channels": 256, "width": 64, "head_dim": 16}
        >>> names = {"architecture": "bert", "prefix": "bert"}
        >>> QuantisedLayout(**shape, **names, query_heads=4, bits=4).bits_each
        4.375
        """
        return self.bits + RANGE_BITS / self.group


def held_in(layout: PrunableLayout, bits: int | None) -> PrunableLayout:
    """The layout of the same model with frozen weights of so many bits; None: as it is. Raises
    BadInput for an odd width.
    """
    if bits is None:
        return layout
    if layout.width % 2:  # two codes of 4 bits share a byte
        raise BadInput(
            f"the model's width is {layout.width}, and quantised weights need an even one; leave "
            "run.frozen_bits out"
        )
    return QuantisedLayout(**{f.name: getattr(layout, f.name) for f in fields(layout)}, bits=bits)


def layout_of(config: Any, prefix: str) -> PrunableLayout:
    """Read the prunable layout from a transformers configuration; `prefix` is the path of the
    backbone inside the model.
    """
    unit_map(config.model_type)
    return PrunableLayout(
        architecture=config.model_type,
        prefix=prefix,
        layers=config.num_hidden_layers,
        heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        channels=getattr(config, "intermediate_size", None) or config.hidden_dim,
        width=config.hidden_size,
        query_heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
    )
