"""The sections of a recipe beside [method]: their keys, their defaults, and what a value may be."""

import math
from typing import Annotated, Any, Literal, TypeAlias

import pydantic

from fedspine.core import parts, strict
from fedspine.core.aggregation import TINY, Aggregation, aggregation_of
from fedspine.core.errors import BadInput
from fedspine.core.privacy import Level
from fedspine.core.server_optimiser import ServerOptimiser, server_optimiser_of
from fedspine.core.strict import Section
from fedspine.core.task import AUTO, NETS, Pooling, TaskKind


def _infinite(value: Any) -> Any:
    return math.inf if value == "inf" else value


# of differential privacy; "inf": everything but the noise
Epsilon: TypeAlias = Annotated[
    float | None,
    pydantic.Field(gt=0, allow_inf_nan=True),
    pydantic.BeforeValidator(_infinite),
    pydantic.PlainSerializer(lambda value: "inf" if value == math.inf else value),
]
LARGEST_SEED = 2**63 - 1  # that all generators take
FLEET = "fleet"  # where devices count their own tokens


class VocabularySection(Section):
    """Which tokens of the model are kept, by how often texts have them."""

    texts: str  # "fleet": those of the devices, as a private histogram; or a public text file
    coverage: float = pydantic.Field(0.999, gt=0, le=1)  # share of the counted tokens to keep
    size: int | None = pydantic.Field(None, ge=1)  # tokens that are kept at most
    epsilon: Epsilon = None  # of each text, where devices count; "inf": nothing is hidden
    # tokens of one text that count, where devices count. The noise grows with it, and what is
    # counted does no more where texts are as short, so it is below the length of most texts
    clip: int = pydantic.Field(4, ge=1, le=10**6)

    @property
    def epsilon_of_texts(self) -> float | None:
        """That of the counts; None where they have no noise."""
        return self.epsilon if self.epsilon is not None and math.isfinite(self.epsilon) else None


def _vocabulary(given: Any) -> Any:
    """A name alone is the texts; a table is checked key by key."""
    match given:
        case None | VocabularySection():
            return given
        case str():
            return strict.section("task.vocabulary", VocabularySection, {"texts": given})
        case dict():
            return strict.section("task.vocabulary", VocabularySection, given)
    raise BadInput(
        f"task.vocabulary is {given!r}, but the path of a text or a table was expected, such as "
        '{texts = "fleet", epsilon = 8}'
    )


class TaskSection(Section):
    """The task: a model, data, and how the data is read."""

    model: str = AUTO  # built-in name, folder, or Hub id; a net makes the kind "array"
    data: str = "pydoc-topics"  # built-in name, file, folder, or Hub id
    kind: TaskKind = "classification"
    text: str = "text"  # column of the text
    pair: str | None = None  # column of the second text; naming one makes the kind "pair"
    label: str = "label"  # column of the label
    encoding: str | None = None  # of text files which are not UTF-8, such as "latin-1"
    max_tokens: int = pydantic.Field(64, ge=4)
    # what is learnt of rows with prompts and answers: the answers alone, or all of each as a text
    loss_on: Literal["answers", "texts"] = "answers"
    pack: bool = False  # several short texts in one row, which do not see each other
    train_rows: int = pydantic.Field(0, ge=0)  # a random sample of so many; 0: all
    layers: int | None = pydantic.Field(None, ge=1)  # keep only the first blocks of the model
    # the readout; auto: that of the model's training
    pooling: Pooling | Literal["auto"] = "auto"
    # the tokens that are kept, with the embeddings and the tokenizer cut to them; none: all
    vocabulary: Annotated[VocabularySection | None, pydantic.BeforeValidator(_vocabulary)] = None


def _for_all_groups(seconds: Any) -> Any:
    """A number, but not true or false, is meant for each of the four Wi-Fi groups."""
    return [seconds] * 4 if type(seconds) in (int, float) else seconds


class FleetSection(Section):
    """The fleet: simulated devices, their kinds, and the partition of the rows."""

    devices: int = pydantic.Field(80, ge=1)
    mix: dict[str, int] | None = None  # devices of each kind; default 30 TX2 : 40 NX : 10 AGX
    # iid, dirichlet, p:LEVEL, dominant:SHARE, natural, column:NAME; docs/recipes.md
    partition: str = "auto"
    alpha: float = pydantic.Field(1.0, gt=0)  # of the Dirichlet partition: small is skewed
    per_round: int = pydantic.Field(10, ge=1)  # devices asked in a round
    # share of a round's replies that it waits for; later ones count in the round in which they come
    quorum: float = pydantic.Field(1.0, ge=0.01, le=1)
    # how a round's replies are merged; none: by the mean, at real sites with norm_clip
    aggregation: Annotated[
        Aggregation | None,
        pydantic.BeforeValidator(aggregation_of),
        pydantic.PlainSerializer(parts.table_of),
    ] = None
    # what becomes of the merged change; none: it is taken as it is
    server_optimiser: Annotated[
        ServerOptimiser | None,
        pydantic.BeforeValidator(server_optimiser_of),
        pydantic.PlainSerializer(parts.table_of),
    ] = None
    # share of each device's rows on which it is scored and not trained; none: of no rows
    held_out: float | None = pydantic.Field(None, gt=0, lt=1)
    # share of noise that devices add to what training changes, in an answer about 32 rows, as real
    # sites do; none: no noise
    noise: float | None = pydantic.Field(None, gt=0)
    drop: float = pydantic.Field(0.0, ge=0, le=1)  # chance that an order or its reply is lost
    delay_seconds: float = pydantic.Field(0.0, ge=0)  # mean extra delay of a reply
    spread: float = pydantic.Field(1.0, ge=0)  # above 1 makes slow devices slower
    # of every exchange, by Wi-Fi group at 2, 8, 14 and 20 m; one number is for all of them, 0 for
    # none. The default is the typical round trip between a wired server and 47,000 user devices of
    # a campus in Sui et al., MobiSys 2016 (10.1145/2906388.2906393), who tell no distances apart
    round_trip_seconds: Annotated[
        list[Annotated[float, pydantic.Field(ge=0)]],
        pydantic.Field(min_length=4, max_length=4),
        pydantic.BeforeValidator(_for_all_groups),
    ] = [0.003] * 4

    @property
    def replies(self) -> int:
        """For how many a round waits."""
        return math.ceil(self.quorum * min(self.per_round, self.devices) - TINY)


class RunSection(Section):
    """The length of a run, its precision, and its checks."""

    rounds: int = pydantic.Field(24, ge=1)
    # of the fleet's clock after which no round begins; 0: no limit
    seconds: float = pydantic.Field(0.0, ge=0)
    seed: int = pydantic.Field(0, ge=0, le=LARGEST_SEED)
    # of the frozen base; auto: the faster one here
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # of a frozen weight of a transformer's blocks on devices; none: as `precision` says
    frozen_bits: Literal[8, 4] | None = None
    evaluate_every: int = pydantic.Field(4, ge=0)  # rounds; 0: only at the end
    evaluate_rows: int = pydantic.Field(512, ge=1)  # test rows of a check on the way
    evaluate_devices: int = pydantic.Field(4, ge=1)  # device models of a check on the way
    final_devices: int = pydantic.Field(8, ge=1)  # device models scored at the end
    final_rows: int = pydantic.Field(0, ge=0)  # test rows of the end; 0: all
    # test rows of dialogues that models answer at the end, each in so many tokens at most
    answers: int = pydantic.Field(0, ge=0)
    answer_tokens: int = pydantic.Field(64, ge=1)
    temperature: float = pydantic.Field(0.0, ge=0)  # of their answers; 0: the likeliest token
    workers: int = pydantic.Field(0, ge=0)  # processes; 0: one per core. Never changes a result
    device: Literal["auto", "cpu", "cuda"] = "auto"  # what computes; auto: a GPU where there is one
    # devices trained in one batched pass; 0: 1 on a CPU, 32 on a GPU
    together: int = pydantic.Field(0, ge=0)
    references: bool = True  # whether simple yardsticks stand beside the results

    @property
    def tokens_answered(self) -> int:
        """Tokens of an answer at the end at most; 0 without answers."""
        return self.answer_tokens if self.answers else 0

    def final_rows_of(self, rows: int) -> int:
        """Of a test set of so many rows, those that are scored at the end."""
        return min(self.final_rows or rows, rows)

    def over(self, round: int, now: float) -> bool:
        """Whether no round is left after `round` rounds, or no time for one."""
        return round >= self.rounds or 0 < self.seconds <= now

    def expected_rounds(self, round: int, now: float) -> int:
        """How many rounds there will be: all, or as many as fit the time if they take what `round`
        of them took.
        """
        if self.over(round, now):
            return round
        if not self.seconds or not now:
            return self.rounds
        return min(self.rounds, max(round + 1, math.ceil(round * self.seconds / now)))


class PrivacySection(Section):
    """Differential privacy of what leaves a device; no promise unless `epsilon` is given."""

    level: Level = "rows"  # of a device's rows, or of a whole device
    # of each device in the whole run; "inf": clipped and sampled, without noise
    epsilon: Epsilon = None
    delta: float | None = pydantic.Field(None, gt=0, lt=1)
    clip: float = pydantic.Field(1.0, gt=0)  # norm of a row's gradient, or of a device's update

    @property
    def promised(self) -> bool:
        """Whether the section is in force."""
        return self.epsilon is not None


SECTIONS: dict[str, type[Section]] = {
    "task": TaskSection,
    "fleet": FleetSection,
    "run": RunSection,
    "privacy": PrivacySection,
}


def of_one_kind(task: TaskSection) -> TaskSection:
    """The section with the kind that follows from its other keys."""
    if task.model in NETS or task.kind == "array":
        return of_arrays(task, task.model)
    if task.pair is not None and task.kind == "classification":
        return task.model_copy(update={"kind": "pair"})
    return task


def of_arrays(task: TaskSection, net: str) -> TaskSection:
    """The section with kind "array"; raises BadInput where something in it is for texts."""
    if net not in (AUTO, *NETS):
        raise BadInput(
            f'task.kind is "array", which {net!r} cannot read; set task.model to one of '
            f'{", ".join(NETS)}, or to "auto"'
        )
    reads = "arrays are read by a net" if net == AUTO else f"{net!r} is a net for arrays"
    # of what "auto" finds, the default says nothing: a recipe that was written out has every key
    fitting = ("array", "classification") if task.model == AUTO else ("array",)
    if "kind" in task.model_fields_set and task.kind not in fitting:
        raise BadInput(
            f'{reads}, but task.kind is {task.kind!r}; leave task.kind out, or say "array"'
        )
    for key in ("text", "pair", "label", "encoding", "layers", "vocabulary"):
        if getattr(task, key) != TaskSection.model_fields[key].default:
            raise BadInput(f"task.{key} is for texts, but {reads}; leave it out")
    return task.model_copy(update={"kind": "array"})
