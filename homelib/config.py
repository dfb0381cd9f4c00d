"""Every setting, in one frozen tree: model, data, training, prediction; presets "smoke", "laptop", "paper" and "released".

A preset is a function that returns the tree. `override` changes fields by dotted name (`training.steps`), as notebooks and the command
line do. An unknown field or a wrong value is one line that names the field, the value and what is expected.
"""

import difflib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from .errors import UserError
from .frozen import Frozen, ended, field_names, unknown_field

IGNORE = 255  # a voxel with this label takes no part in the loss

Stages = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]  # one value an encoder stage
Spacing = tuple[PositiveFloat, PositiveFloat, PositiveFloat]  # mm
Patch = tuple[PositiveInt, PositiveInt, PositiveInt]  # voxels
OURS = ("MambaHoME", "SegMamba")  # that the switches below are of
Network = Literal["MambaHoME", "SegMamba", "UNet", "SwinUNETR", "SwinUNETR-V1", "UNETR", "SegResNet", "DynUNet", "ResEncUNet", "MedNeXt", "VNet"]


class ModelConfig(Frozen):
    """The network. Defaults are the paper's (170,127,611 parameters with 3 classes): its Tables 5 to 7, and, for what the paper
    does not print (depths, channels, hidden_channels, expert_mult, expert_glu, Mamba's sizes), the released code."""

    in_channels: PositiveInt = 1
    out_channels: PositiveInt = Field(3, description="classes, background included")
    depths: Stages = Field((2, 2, 2, 2), description="Mamba + HoME layers a stage")
    channels: Stages = (48, 96, 192, 384)
    hidden_channels: PositiveInt = Field(768, description="bottleneck")
    experts_local: Stages = Field((4, 8, 12, 16), description="level 1, paper Table 5")
    experts_global: Stages = Field((8, 16, 24, 32), description="level 2, paper Table 5")
    group_size: Stages = Field((2048, 1024, 512, 256), description="tokens a group, paper Table 6")
    slots_per_expert: PositiveInt = Field(4, description="paper Table 7")
    expert_mult: PositiveInt = 2
    expert_glu: bool = Field(True, description="GEGLU experts")
    mask_padding: bool = Field(False, description="leave level 2's fill out of its softmaxes; the released code does not")
    state_dim: PositiveInt = 16
    conv_width: PositiveInt = 4
    expand: PositiveInt = 2
    scan_backend: str = "auto"

    # Switches of the ablations. The default is the released code; the other values are the paper's text, another paper's, or a control without the part.
    mixer: Literal["mamba", "none"] = Field("mamba", description="none: a control without Mamba")
    scan_direction: Literal["forward", "backward", "both", "three"] = Field(
        "forward", description="of the tokens; both as in Vision Mamba, three as in SegMamba's paper: forward, backward and from slice to slice"
    )
    home: Literal["released", "equations", "local", "mlp"] = Field(
        "released", description="equations: the paper's Eq. 3 to 13; local: without level 2; mlp: one plain MLP of equal parameters in its place"
    )
    dispatch: Literal["slots", "tokens"] = Field(
        "slots",
        description="over what level 1's dispatch sums to one: the slots of a token (Eq. 5), or the tokens of a slot (Soft MoE, Puigcerver et al. 2024)",
    )
    group_order: Literal["raster", "blocks", "hilbert"] = Field(
        "raster", description="a group is K tokens in raster order, a 3D block, or K along a Hilbert curve"
    )
    gsc: Literal["sum", "product", "segmamba", "none"] = Field(
        "sum", description="branches added; multiplied; as SegMamba's paper writes it, multiplied and fused by 3x3x3; or no gated spatial convolution"
    )
    norm: Literal["dyt", "layernorm"] = Field("dyt", description="before Mamba and HoME, paper Table 8")
    width: PositiveInt | None = Field(None, description="narrowest channels of a network of others; None: as published")

    @model_validator(mode="after")
    def _switches_fit(self) -> Self:
        if self.mixer == "none" and self.scan_direction != "forward":
            raise ValueError(f"scan_direction: found {self.scan_direction!r} with mixer 'none', which scans nothing; leave one of them off")
        if self.home != "released" and self.mask_padding:
            raise ValueError(f"mask_padding: found true with home {self.home!r}, which has no level 2 to fill; leave one of them off")
        if self.home == "mlp":
            for name in ("dispatch", "group_order"):
                if name in self.changed_switches:
                    raise ValueError(f"{name}: found {getattr(self, name)!r} with home 'mlp', which has no groups; leave one of them off")
        if self.home == "equations" and self.dispatch != "slots":
            raise ValueError(f"dispatch: found {self.dispatch!r} with home 'equations', whose Eq. 5 is over slots; leave one of them off")
        return self

    @property
    def changed_switches(self) -> tuple[str, ...]:
        """Names of the switches that are not as in the released code."""
        return tuple(name for name in (*SWITCHES, *HOME_SWITCHES) if getattr(self, name) != type(self).model_fields[name].default)


SWITCHES = ("mixer", "scan_direction", "gsc", "norm")  # of MambaHoME and SegMamba
HOME_SWITCHES = ("home", "dispatch", "group_order", "mask_padding")  # of MambaHoME alone
OTHER_ROUTES = ("home", "dispatch", "group_order")  # whose other forms route otherwise: they are not traced


class DataConfig(Frozen):
    """From files to patches."""

    manifest: str = Field("demo_ct", description="name of a data_manifests/*.yaml, or a path")
    also: tuple[str, ...] = Field((), description="other data sets that are trained on together with it; classes of one name are one")
    aliases: dict[str, str] = Field({}, description="with `also`: class name -> the name that it has in the union of the classes")
    train_cases: tuple[str, ...] = ()
    validation_cases: tuple[str, ...] = Field((), description="the best weights are chosen by them")
    test_cases: tuple[str, ...] = ()
    spacing_mm: Spacing | None = Field(None, description="None: the manifest's")
    low_pass: bool = Field(True, description="images are smoothed before they are taken to a coarser grid; false: linear interpolation alone")
    patch_voxels: Patch = (128, 128, 128)
    sampling: Literal["cases", "classes"] = Field("cases", description="draw a case, then one of its classes; or a class, then a case that has it")


class AugmentConfig(Frozen):
    """Random changes of a training patch. Zero switches one off. A recipe other than "own" fixes all of them (`homelib.data.recipes`)."""

    recipe: Literal["own", "paper", "released"] = Field("own", description="the ranges below; the paper's set; or the released code's")
    contrast_phase: float = Field(0.0, ge=0, le=1, description="probability of another contrast phase, by the manifest's contrast_ranges")
    class_centred: float = Field(0.0, ge=0, le=1, description="probability that a patch is centred on a voxel of a class drawn at random")
    overhang: float = Field(0.0, ge=0, lt=1, description="part of a patch that may lie beyond the scan's lower or upper end, as if the scan ended there")
    mirrored: float = Field(0.0, ge=0, le=1, description="probability that beyond the scan is the scan mirrored, which the loss does not look at")
    holes: float = Field(0.0, ge=0, le=1, description="probability that boxes of a patch, up to half as long as it, are emptied: air that is no class")
    rotation_degrees: float = Field(0.0, ge=0, le=180)
    scaling: float = Field(0.0, ge=0, lt=1, description="scale factor drawn from 1 - s to 1 + s")
    bending_voxels: float = Field(0.0, ge=0, description="standard deviation of random displacements about every 16 voxels, smooth between")
    intensity_shift: float = Field(0.0, ge=0, le=1, description="of the unit range")
    gamma: float = Field(0.0, ge=0, lt=1, description="exponent drawn from 1 - g to 1 + g")
    noise: float = Field(0.0, ge=0, le=1, description="largest standard deviation, of the unit range")
    smoothing_voxels: float = Field(0.0, ge=0, description="largest Gaussian sigma")


class TrainingConfig(Frozen):
    """The loop."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = Field(2, description="patches a step and device, at a time")  # paper App. B
    accumulate: PositiveInt = Field(1, description="batches whose gradients make one step")
    learning_rate: PositiveFloat = 1e-4  # paper App. B
    weight_decay: float = Field(1e-5, ge=0)  # paper App. B
    adam_eps: PositiveFloat = Field(1e-8, description="AdamW's; the paper does not say, this is PyTorch's")
    warmup_steps: int = Field(0, ge=0)
    clip_norm: PositiveFloat | None = None
    ema: float | None = Field(None, gt=0, lt=1, description="share that averaged weights keep a step, 0.999 say; they are validated and kept as the best")
    deep_supervision: bool = Field(False, description="a loss on coarser decoder levels too, by heads that are not kept; the paper has none")
    loss: Literal["dice_ce", "dice", "ce"] = Field("dice_ce", description="Dice + cross-entropy, as the paper; or one of them alone")
    class_balance: float = Field(0.0, ge=0, le=1, description="cross-entropy weighs a class by its frequency to minus this; the paper: 0")
    batch_dice: bool = Field(False, description="one Dice a class over all patches of a batch, instead of one a patch")
    augment: AugmentConfig = AugmentConfig()
    init_from: str | None = Field(None, description="weights to start from: a run folder, a safetensors file, or the authors' checkpoint")
    init_head: Literal["by_name", "as_it_is"] = Field(
        "by_name", description="rows of init_from's head: of classes of the same name; or as many as there are, which is for who knows that they are the same"
    )
    frozen_steps: int = Field(0, ge=0, description="in which the encoder stays as it is")
    layer_rate: float = Field(1.0, gt=0, le=1, description="factor on the learning rate from each stage of the network to the one before it")
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # the paper trains in float32
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    devices: PositiveInt = Field(1, description="a node")
    num_nodes: PositiveInt = 1
    workers: int = Field(0, ge=0, description="processes that make patches beside the training; 0 makes them in it")
    validate_every: PositiveInt = Field(200, description="steps")
    validation_cases_most: PositiveInt | None = Field(
        None, description="of data.validation_cases, chosen once and for all by their ids, whole scans take long; None: all"
    )
    checkpoint_every: PositiveInt | None = Field(None, description="steps; None: as often as validation")
    patience: PositiveInt | None = Field(None, description="validations without a better Dice after which the training ends")
    log_routing: bool = Field(False, description="measure where MambaHoME's experts look at each validation, into routing*.csv of the run")
    non_finite_steps: PositiveInt = Field(5, description="in a row, after which the training goes back to its checkpoint with a lower rate; then it ends")
    loggers: tuple[Literal["csv", "tensorboard"], ...] = Field(("csv",), description="csv is the run's own record, history.csv, and always among them")
    seed: int = Field(0, ge=0)

    @field_validator("loggers")
    @classmethod
    def _csv_always(cls, loggers: tuple[str, ...]) -> tuple[str, ...]:
        if "csv" not in loggers:
            raise ValueError("expected csv among them: history.csv is what a run goes on and is drawn from")
        return loggers

    @property
    def patches_a_step(self) -> int:
        """Over all devices."""
        return self.batch_size * self.accumulate * self.devices * self.num_nodes


class PredictionConfig(Frozen):
    """Sliding window."""

    overlap: float = Field(0.5, ge=0, lt=1)  # paper App. B
    blend: Literal["gaussian", "constant"] = "gaussian"  # paper App. B
    window_batch: PositiveInt = 1
    mirror: bool = Field(False, description="average over all eight mirror images: eight times the work; not for networks that know left from right")
    one_piece: tuple[str, ...] = Field((), description="classes of which only the largest connected piece is kept")


class Settings(Frozen):
    """All of it: what a run folder keeps as `settings.json`, and a checkpoint carries."""

    profile: str = "paper"
    network: Network = Field("MambaHoME", description="SegMamba is the same without HoME; the others stand in homelib.network.zoo")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    prediction: PredictionConfig = PredictionConfig()

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        parts = {"train": self.data.train_cases, "validation": self.data.validation_cases, "test": self.data.test_cases}
        for one, other, why in (
            ("train", "test", "a test case must never be trained on"),
            ("train", "validation", "weights are not chosen by a case that they were trained on"),
            ("validation", "test", "a test case must never choose weights"),
        ):
            if both := sorted(set(parts[one]) & set(parts[other])):
                raise ValueError(f"data.{one}_cases and data.{other}_cases share {', '.join(both)}; {why}")
        allowed = {"MambaHoME": (*SWITCHES, *HOME_SWITCHES), "SegMamba": SWITCHES}.get(self.network, ())
        if without := [name for name in self.model.changed_switches if name not in allowed]:
            raise ValueError(f"model.{without[0]}: found {getattr(self.model, without[0])!r}, which network {self.network} does not have; leave it off")
        if self.model.width and self.network in (*OURS, "UNet"):
            raise ValueError(f"model.width: found {self.model.width}, expected none for {self.network}, whose width follows from model.channels")
        if self.network not in (*OURS, "UNet"):
            for name, off in (("frozen_steps", 0), ("layer_rate", 1)):
                if (found := getattr(self.training, name)) != off:
                    raise ValueError(f"training.{name}: found {found}, expected {off} for network {self.network}, whose encoder is not told apart")
        if self.training.strategy == "fsdp" and (self.training.ema is not None or self.training.deep_supervision):
            raise ValueError("training.strategy: fsdp goes with neither training.ema nor training.deep_supervision; choose ddp, or leave them off")
        if self.data.also and self.training.class_balance:
            raise ValueError("training.class_balance: expected 0 with data.also, for a class is not labelled everywhere")
        for term, name in (("dice", "class_balance"), ("ce", "batch_dice")):
            if self.training.loss == term and (found := getattr(self.training, name)):
                raise ValueError(f"training.{name}: found {found} with training.loss {term!r}, which leaves out what it changes; set it to {type(found)()}")
        if self.training.log_routing and (other := self.untraced):
            raise ValueError(f"training.log_routing: found true with {other}, whose routing cannot be traced; leave it off")
        if self.training.patience and not self.data.validation_cases:
            raise ValueError("training.patience: needs data.validation_cases; name some, or leave it off")
        return self

    @property
    def untraced(self) -> str:
        """What keeps the routing of this network from being traced, network SegMamba say; "" where it can be."""
        if self.network != "MambaHoME":
            return f"network {self.network}"
        return next((f"model.{name} {getattr(self.model, name)!r}" for name in OTHER_ROUTES if name in self.model.changed_switches), "")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `settings.json`. Raises UserError on a missing or malformed file."""
        try:
            fields = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected the settings.json of a run folder.") from None
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); restore the file, or start the run anew.") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}: found a JSON {type(fields).__name__}, expected an object of settings.")
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def paper() -> Settings:
    """The paper's network and recipe (section 3.2, App. B). Patches and epochs differ by data set: `homelib.run.cohort` takes them from its manifest.

    Not in the paper, and so ours: how often is validated and kept. Not in the paper, and so off: warm-up, clipping, averaged weights, class weights.
    """
    return Settings(
        profile="paper",
        data=DataConfig(patch_voxels=(128, 128, 128)),  # App. B: AMOS, FeTA, MVSeg; PANORAMA 192 x 192 x 48, pre-training 96 cubed
        training=TrainingConfig(
            batch_size=2,  # App. B
            learning_rate=1e-4,  # App. B: AdamW, cosine
            weight_decay=1e-5,  # App. B
            precision="32-true",  # App. B: float32 for all models
            augment=AugmentConfig(recipe="paper"),  # App. B names the changes; probabilities and ranges are ours
            workers=4,  # ours
            validate_every=1000,  # ours
        ),
        prediction=PredictionConfig(overlap=0.5, blend="gaussian"),  # App. B
    )


def released() -> Settings:
    """The recipe of the authors' released code, where it differs from the paper: `train.py` and `data_loader.py` there, as far as they say."""
    return Settings(
        profile="released",
        data=DataConfig(patch_voxels=(96, 96, 96)),  # train.py's default; its README trains with 128 cubed
        training=TrainingConfig(
            batch_size=2,  # train.py's default, on each of 4 devices
            learning_rate=1e-4,  # train.py's default: AdamW, cosine
            weight_decay=1e-4,  # train.py and README; the paper 1e-5
            adam_eps=1e-4,  # train.py; not in the paper
            precision="32-true",  # train.py knows no other
            augment=AugmentConfig(recipe="released"),  # data_loader.py: no flips, no contrast, no affine change
            devices=4,  # train.py: --num_devices
            strategy="ddp",  # train.py
            workers=4,  # ours
            validate_every=1000,  # ours; once an epoch there
        ),
        prediction=PredictionConfig(overlap=0.25, blend="constant"),  # MONAI's defaults, in train.py's validation
    )


def laptop() -> Settings:
    """A network of 3 million parameters that learns the demo task on two cores in minutes.

    Batch Dice and class-centred patches were chosen by how fast the training patient ct-a is learnt; learning rate, class balance, the
    strength of the augmentations, the patch's thickness, holes and how patches overhang the scan by cross-validation inside ct-a
    (benchmarks/demo_choice.py).
    """
    augment = AugmentConfig(
        contrast_phase=0.8,
        class_centred=1.0,
        overhang=0.5,
        mirrored=0.5,
        holes=0.5,
        rotation_degrees=6,
        scaling=0.15,
        intensity_shift=0.05,
        gamma=0.15,
        noise=0.02,
        smoothing_voxels=0.5,
    )
    return Settings(
        profile="laptop",
        model=ModelConfig(out_channels=9, depths=(1, 1, 1, 1), channels=(8, 16, 32, 64), hidden_channels=96, group_size=(512, 256, 128, 64)),
        data=DataConfig(spacing_mm=(5.0, 5.0, 5.0), patch_voxels=(64, 48, 32)),
        training=TrainingConfig(
            steps=850,
            batch_size=2,
            learning_rate=5e-3,
            weight_decay=1e-2,
            warmup_steps=20,
            clip_norm=1.0,
            class_balance=0.4,
            batch_dice=True,
            augment=augment,
        ),
        prediction=PredictionConfig(one_piece=("liver", "spleen")),
    )


def smoke() -> Settings:
    """Everything once, as small as it goes, on generated phantoms: for tests, and to see a notebook run. It learns next to nothing."""
    return Settings(
        profile="smoke",
        model=ModelConfig(
            out_channels=9,
            depths=(1, 1, 1, 1),
            channels=(4, 4, 8, 8),
            hidden_channels=8,
            group_size=(64, 32, 16, 8),
            experts_local=(2, 2, 2, 2),
            experts_global=(4, 4, 4, 4),
            slots_per_expert=2,
            state_dim=4,
        ),
        data=DataConfig(spacing_mm=(12.0, 12.0, 12.0), patch_voxels=(32, 32, 32)),
        training=TrainingConfig(steps=4, batch_size=1, learning_rate=2e-3, validate_every=2, augment=AugmentConfig(contrast_phase=0.5, rotation_degrees=10)),
    )


def override(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with fields replaced by dotted name.

    >>> override(preset("smoke"), {"training.steps": 3}).training.steps
    3

    Raises:
        UserError: an unknown field (with the nearest one) or a value that does not fit.
    """
    tree = settings.model_dump()
    for name, value in changes.items():
        if name not in field_names(Settings):
            raise UserError(ended(unknown_field(name, Settings)))
        *groups, leaf = name.split(".")
        branch = tree
        for group in groups:
            branch = branch[group]
        branch[leaf] = value
    return Settings(**tree)


def values(settings: Settings) -> dict[str, str]:
    """Every setting by its dotted name, with its value as `--set` takes it.

    >>> values(preset("smoke"))["training.steps"]
    '4'
    """
    tree, found = settings.model_dump(mode="json"), {}
    for name in field_names(Settings):
        value = functools.reduce(lambda branch, part: branch[part], name.split("."), tree)
        found[name] = value if isinstance(value, str) else json.dumps(value)
    return found


PRESETS = {"smoke": smoke, "laptop": laptop, "paper": paper, "released": released}


def preset(name: str) -> Settings:
    """The settings tree of a profile. Raises UserError with the known names for another one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        raise UserError(f"profile: found {name!r}, expected one of {', '.join(PRESETS)}" + (f"; did you mean {near[0]}?" if near else "."))
    return PRESETS[name]()
