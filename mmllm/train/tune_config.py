"""The config of ``mmllm pretrain`` and ``mmllm tune``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mmllm.config import StrictModel
from mmllm.errors import UserError
from mmllm.train.chat_data import ChatSources
from mmllm.train.section import TrainSection


class LoraSection(StrictModel):
    """Low-rank adapters on the LLM (arXiv 2106.09685), by peft.

    Attributes:
        targets: names of its linear layers, or ``all-linear``: all of them but the head.
        dora: also learn the length of each row of the weights (arXiv 2402.09353).
        loraplus_lr_ratio: learning rate of the matrices B, which start at zero, over that of A (LoRA+, arXiv
            2402.12354); 1 is plain LoRA, the starter takes 4.
    """

    r: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    dora: bool = False
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)


class LlmChoice(StrictModel):
    """The dict form of ``train.llm``; exactly one of its keys.

    Attributes:
        last_n: the last n layers, the norm after them, and the head where it is not the word embeddings.
        lora: adapters alone, as in the section ``lora``.
    """

    last_n: int | None = Field(default=None, ge=1)
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _one(self) -> LlmChoice:
        if (self.last_n is None) == (self.lora is None):
            raise ValueError("needs exactly one of last_n and lora")
        return self


def _form(value: Any) -> str:
    return "name" if isinstance(value, str) else "choice"


# One form is looked at, by what is given, so that a mistake inside it is told and not that the other form differs.
LlmTrain = Annotated[
    Annotated[Literal["none", "lora", "full"], Tag("name")] | Annotated[LlmChoice, Tag("choice")], Discriminator(_form)
]


class ModalitySection(StrictModel):
    """A tower and its connector.

    Attributes:
        tower: folder, hub id, ``starter:NAME``, ``tiny:...`` or a dict (see ``load_tower``); None: from ``init``.
        connector: its config; with ``init``, only the keys to change (``{positions: true}``).
    """

    tower: str | dict[str, Any] | None = None
    connector: dict[str, Any] = Field(default_factory=dict)


class TilingSection(StrictModel):
    """Large pictures as a thumbnail and tiles of the tower's picture size, with a separator after each row of tiles.

    Attributes:
        max_tiles, min_tiles: of one picture; its shape and size choose among all grids with so many.
    """

    max_tiles: int = Field(ge=2)
    min_tiles: int = Field(default=1, ge=1)


class TuneTrain(TrainSection):
    """Which parts train, beside the usual names; ``learning_rates`` per part, under the parts' names here.

    Attributes:
        llm: ``lora`` takes the settings of the section ``lora``; or ``{last_n: k}``, or ``{lora: {...}}``.
        vision, audio: the towers; also ``{last_n: k}`` or ``{lora: {...}}``, see ``apply_train`` of the towers.
    """

    connector: Literal["full", "none"] = "full"
    injector: Literal["full", "none"] = "full"
    llm: LlmTrain = "none"
    vision: Literal["none", "full"] | dict[str, Any] = "none"
    audio: Literal["none", "full"] | dict[str, Any] = "none"
    learning_rates: dict[Literal["connector", "injector", "llm", "vision", "audio"], float] = Field(
        default_factory=dict
    )


class ReplaySection(StrictModel):
    """Conversations without media beside the run's own.

    Attributes:
        data: records files in the dataset.
        weight: their share of all conversations of an epoch.
    """

    data: str | list[str]
    weight: float = Field(default=0.1, gt=0, lt=1)


class HeldOutSection(StrictModel):
    """Conversations that are not trained on; their loss is measured at each checkpoint, and the best one is kept.

    Attributes:
        data: records files in the dataset.
        limit: the first so many of them.
        take: the checkpoint whose weights become the result.
    """

    data: str | list[str]
    limit: int = Field(default=64, ge=1)
    take: Literal["last", "best"] = "last"


class TuneConfig(StrictModel):
    """Config of ``mmllm pretrain`` and ``mmllm tune``.

    Attributes:
        init: run that this one starts from: of align (gives towers and connectors), pretrain or tune (the model); or a
            model folder, ours or a LLaVA of transformers. None: from ``llm``, ``vision.tower`` and ``audio.tower``.
        llm: folder, hub id or ``starter:NAME``; None takes the one that the align run aimed at.
        chat_template: of an LLM that has none, or in place of its own: ``plain`` (User: and Assistant: lines),
            ``short`` (no marks but the ends of question and answer) or a Jinja file.
        dataset: ``starter:full``, ``starter:fast`` or a folder; ``data`` are records files in it, each a path or a
            mapping (see ``ChatSource``) that may give its ``weight``, the source's share of each epoch.
        max_rejected: the largest share of a source's records that may be left out as bad.
        branches_per_row: most questions of one picture that share a row; each epoch draws others.
        max_length: longest row in tokens; what is longer is cut after a turn, or left out where no turn fits.
        pack: tokens of a packed row: several conversations share one, each computed as if alone, without padding;
            ``per_device_train_batch_size`` counts these rows. auto: 2,048 on a GPU, 1,024 on a CPU. None: no packing.
        length_normalization: a token of an answer of n tokens weighs n^-this in the loss; 0: tokens alike, 1: answers.
        box_tokens: bins of a coordinate: boxes in text become two tokens each, one for each corner, instead of some
            twenty; after align's objective ``region_box`` the LLM can copy a box that it sees.
        llm_quantization: ``4bit`` holds the LLM's frozen weights in NF4 (QLoRA, arXiv 2305.14314), on a GPU by
            bitsandbytes; then ``train.llm`` is ``lora`` or ``none``. ``final/`` has the merged weights in ``dtype``.
        dtype: of the LLM; auto takes bfloat16 where this machine is faster with it (measured), else float32.
        injector: layers inside the LLM through which media reach it, neutral at the start: ``{type:
            gated_cross_attention, every: 4}`` (Flamingo); see ``GatedInjector``.
        tiling: large pictures are cut; see ``TilingSection``.
        replay: text-only conversations mixed in, so that the LLM keeps what it knows.
        held_out: measures the loss on other conversations at each checkpoint, and keeps the best beside the last ones.
        kl_to_base: weight of the divergence from the LLM without adapters at the supervised tokens of conversations
            without media; 0: none.
        perplexity: text on which a trained LLM is measured before and after: ``built-in``, or a file in the dataset
            (texts parted by empty lines, or JSONL with ``text``); None: not measured.
        margins: figure of ``mmllm eval`` -> by how much the result should beat the same questions without media
            (``--blind``), as fractions of 1; nothing of the training depends on it.
        copies: colour-changed copies of each picture's features beside the plain one (frozen vision tower).
    """

    init: str | None = None
    llm: str | None = None
    chat_template: str | None = None
    vision: ModalitySection = Field(default_factory=ModalitySection)
    audio: ModalitySection = Field(default_factory=ModalitySection)
    dataset: str = "."
    data: ChatSources
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    branches_per_row: int | None = Field(default=6, ge=1)
    max_length: int = Field(default=512, ge=16)
    pack: int | Literal["auto"] | None = None
    length_normalization: float = Field(default=0.0, ge=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    copies: int = Field(default=0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    box_tokens: int | None = Field(default=None, ge=2)
    llm_quantization: Literal["4bit"] | None = None
    injector: dict[str, Any] | None = None
    tiling: TilingSection | None = None
    replay: ReplaySection | None = None
    held_out: HeldOutSection | None = None
    kl_to_base: float = Field(default=0.0, ge=0)
    perplexity: str | None = "built-in"
    margins: dict[str, float] = Field(default_factory=dict)
    lora: LoraSection = Field(default_factory=LoraSection)
    train: TuneTrain = Field(default_factory=TuneTrain)


MODALITIES = ("vision", "audio")


def check_quantization(config: TuneConfig) -> None:
    """Whether what would be held in 4 bits may stay as it is.

    Raises:
        UserError: the LLM itself would train, or the weights would not be loaded but come from ``init``.
    """
    if not config.llm_quantization:
        return
    choice = config.train.llm
    if choice == "full" or (isinstance(choice, LlmChoice) and choice.last_n is not None):
        raise UserError("weights in 4 bits can't train", "llm_quantization", "set train.llm: lora, or leave it out")
    if config.train.model_dump().get("deepspeed") or config.train.model_dump().get("fsdp"):
        what = "weights in 4 bits are held whole in each process"
        raise UserError(what, "llm_quantization", "leave out deepspeed and fsdp, or llm_quantization")
