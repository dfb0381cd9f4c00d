"""Settings: presets, changes by dotted name, one-line errors with the nearest field, settings.json there and back."""

import pytest
from pydantic import ValidationError

from homelib import MambaHoME, ModelConfig, Settings, UserError
from homelib.config import PRESETS, field_names, override, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_and_says_which_it_is(name):
    settings = preset(name)
    assert settings.profile == name
    assert len(settings.model.channels) == 4
    assert all(d % 16 == 0 for d in settings.data.patch_voxels)


def test_the_laptop_preset_fits_the_demo_and_its_docstring():
    from homelib.data.manifest import load_manifest

    for name in ("smoke", "laptop"):
        settings = preset(name)
        assert settings.model.out_channels == len(load_manifest(settings.data.manifest).class_names)
    network = MambaHoME(preset("laptop").model)
    assert 2.5e6 < sum(p.numel() for p in network.parameters()) < 3.5e6


def test_the_defaults_are_the_papers():
    config = ModelConfig()
    assert config.channels == (48, 96, 192, 384)
    assert config.experts_local == (4, 8, 12, 16)
    assert config.experts_global == (8, 16, 24, 32)
    assert config.group_size == (2048, 1024, 512, 256)
    assert (config.depths, config.hidden_channels, config.slots_per_expert, config.expert_mult, config.expert_glu) == ((2, 2, 2, 2), 768, 4, 2, True)
    assert (config.state_dim, config.conv_width, config.expand) == (16, 4, 2)
    assert preset("paper").model == ModelConfig(out_channels=preset("paper").model.out_channels)


def test_override_changes_the_named_fields_alone():
    before = preset("smoke")
    after = override(before, {"training.steps": 9, "training.augment.gamma": 0.5, "model.depths": [2, 1, 1, 1], "network": "SegMamba"})
    assert (after.training.steps, after.training.augment.gamma, after.model.depths, after.network) == (9, 0.5, (2, 1, 1, 1), "SegMamba")
    changed = {name for name in field_names(Settings) if look_up(before, name) != look_up(after, name)}
    assert changed == {"training.steps", "training.augment.gamma", "model.depths", "network"}
    assert before == preset("smoke")


def look_up(tree, dotted):
    for part in dotted.split("."):
        tree = getattr(tree, part)
    return tree


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ModelConfig(chanels=(1, 2, 3, 4)), r"^chanels: no such field; did you mean channels\?$"),
        (lambda: Settings(model={"chanels": 1}), r"^model\.chanels: no such field; did you mean model\.channels\?"),
        (lambda: Settings(training={"augment": {"gama": 0.1}}), r"^training\.augment\.gama: .*training\.augment\.gamma\?"),
        (lambda: override(Settings(), {"training.step": 3}), r"^training\.step: .*did you mean training\.steps\?$"),
        (lambda: override(Settings(), {"steps": 3}), r"^steps: .*did you mean training\.steps\?"),
        (lambda: override(Settings(), {"training": {}}), r"^training: no such field"),
        (lambda: override(Settings(), {"training.steps": "many"}), r"^training\.steps: found 'many'; .*integer.*[^.]\.$"),
        (lambda: override(Settings(), {"training.augment.gamma": 2}), r"^training\.augment\.gamma: found 2; .*less than 1"),
        (lambda: ModelConfig(depths=(1, 1, 1)), r"^depths.*found \(1, 1, 1\)"),
        (lambda: ModelConfig(depths=(1, 1, 1, 1, 1)), r"^depths.*found \(1, 1, 1, 1, 1\)"),
        (lambda: ModelConfig(depths=(0, 1, 1, 1)), r"^depths\.0: found 0; .*greater than 0"),
        (lambda: ModelConfig(group_size=(8, 8, 8, 1.5)), r"^group_size\.3: found 1\.5; .*integer"),
        (lambda: ModelConfig(channels="wide"), r"^channels: found 'wide'"),
        (lambda: ModelConfig(out_channels=-1, expert_glu="perhaps"), r"^out_channels: found -1; .*; expert_glu: found 'perhaps'"),
        (lambda: override(Settings(), {"network": "MambaHome"}), r"^network: found 'MambaHome'; .*'MambaHoME'"),
        (lambda: override(Settings(), {"training.learning_rate": float("nan")}), r"^training\.learning_rate: found nan"),
        (lambda: override(Settings(), {"data.spacing_mm": (3, 0, 3)}), r"^data\.spacing_mm\.1: found 0"),
        (lambda: override(Settings(), {"prediction.overlap": 1.0}), r"^prediction\.overlap: found 1\.0"),
        (lambda: override(preset("laptop"), {"training.loss": "dice"}), r"^training\.class_balance: found 0\.4 with training\.loss 'dice', .*; set it to 0\.0"),
        (lambda: override(Settings(), {"training.loss": "ce", "training.batch_dice": True}), r"^training\.batch_dice: found True with .*; set it to False"),
        (lambda: preset("labtop"), r"^profile: found 'labtop', expected one of smoke, laptop, paper, released; did you mean laptop\?"),
    ],
)
def test_a_wrong_field_is_one_line_with_its_dotted_name(make, said):
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_test_case_is_never_trained_on():
    with pytest.raises(UserError, match=r"^data\.train_cases and data\.test_cases share ct-c;"):
        override(preset("laptop"), {"data.train_cases": ["ct-a", "ct-c"], "data.test_cases": ["ct-c"]})


def test_settings_do_not_change_once_made():
    settings = preset("smoke")
    for tree, field in ((settings, "profile"), (settings.model, "depths"), (settings.training.augment, "gamma")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(tree, field, getattr(tree, field))


@pytest.mark.parametrize("name", PRESETS)
def test_settings_json_there_and_back(name, tmp_path):
    settings = override(preset(name), {"training.learning_rate": 1 / 3})
    settings.save(tmp_path / "settings.json")
    assert Settings.load(tmp_path / "settings.json") == settings


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "not JSON"),
        (b'{"profile": "smoke",', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1, 2]", "found a JSON list"),
        (b'{"profile": "smoke", "modell": {}}', "modell: no such field; did you mean model"),
        (b'{"training": {"steps": 0}}', r"training\.steps: found 0"),
    ],
)
def test_a_damaged_settings_json_is_one_line(content, said, tmp_path):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        Settings.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
