"""Joint label spaces: hand-computed unions, and a loss that is blind to what a data set has not labelled."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from homelib.data.labelspace import marginal_logits, union
from homelib.data.manifest import load_manifest
from homelib.errors import UserError


@pytest.fixture(scope="module")
def space():
    return union([load_manifest("panorama"), load_manifest("nih_pancreas_ct"), load_manifest("msd_pancreas")])


def test_classes_of_one_name_are_one(space):
    assert space.class_names == ("background", "pdac", "pancreas", "tumour")
    assert space.indices == {"panorama": (0, 1, 2), "nih_pancreas_ct": (0, 2), "msd_pancreas": (0, 2, 3)}
    np.testing.assert_array_equal(space.to_union(np.array([[0, 1], [2, 255]], np.uint8), "msd_pancreas"), [[0, 2], [3, 255]])
    assert space.labelled(["nih_pancreas_ct", "panorama"]).tolist() == [[True, False, True, False], [True, True, True, False]]


def test_pre_training_has_the_classes_of_abdomenatlas():
    atlas, mri = load_manifest("abdomenatlas_1_1"), load_manifest("totalsegmentator_mri")
    space = union([atlas, mri])
    assert space.class_names == atlas.class_names
    missing = [name for name, has in zip(space.class_names, space.labelled([mri.name])[0], strict=True) if not has]
    assert missing == ["celiac_trunk", "hepatic_vessel", "rectum"]


def test_aliases_join_classes():
    space = union([load_manifest("abdomenatlas_1_1"), load_manifest("amos_ct")], aliases={"prostate_uterus": "prostate"})
    assert len(space.class_names) == 26
    assert space.indices["amos_ct"][-1] == space.class_names.index("prostate")


@pytest.mark.parametrize(
    ("names", "aliases", "told"),
    [
        (["amos_ct", "amos_ct"], {}, "each once"),
        ([], {}, "none"),
        (["amos_ct"], {"heart": "liver"}, "'heart'"),
        (["amos_ct"], {"liver": "spleen"}, "two classes of amos_ct"),
    ],
)
def test_what_makes_no_space_is_one_line(names, aliases, told):
    with pytest.raises(UserError, match=told):
        union([load_manifest(name) for name in names], aliases=aliases)


def test_strangers_are_refused(space):
    with pytest.raises(UserError, match="'amos_ct'"):
        space.labelled(["amos_ct"])
    with pytest.raises(UserError, match="class index 3"):
        space.to_union(np.array([3]), "panorama")
    with pytest.raises(ValueError, match="labelled"):
        marginal_logits(torch.zeros(2, 4, 1), torch.ones(1, 4, dtype=torch.bool))


def test_the_loss_is_that_of_the_marginal(space):
    logits = torch.randn(2, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    labelled = space.labelled(["nih_pancreas_ct", "panorama"])
    target = torch.zeros(2, 3, 3, 3, dtype=torch.long)
    target[0, 0], target[1, 1] = 2, 1
    loss = cross_entropy(marginal_logits(logits, labelled), target)
    p = logits.softmax(1)
    first = torch.where(target[0] == 2, p[0, 2], p[0, 0] + p[0, 1] + p[0, 3])  # NIH labels the pancreas alone
    second = torch.where(target[1] == 1, p[1, 1], p[1, 0] + p[1, 3])
    torch.testing.assert_close(loss, -torch.stack([first, second]).log().mean())


def test_nothing_tells_an_unlabelled_class_from_background(space):
    """Gradients of background and unlabelled logits are shared in proportion to their probabilities: their odds are not learnt."""
    logits = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 2, 0, 2, 0]])
    cross_entropy(marginal_logits(logits, space.labelled(["nih_pancreas_ct"])), target).backward()
    p = logits.detach().softmax(1)
    for unlabelled in (1, 3):
        torch.testing.assert_close(logits.grad[:, unlabelled] / p[:, unlabelled], logits.grad[:, 0] / p[:, 0])


def test_half_precision_stays_finite(space):
    logits = (30 * torch.randn(1, 4, 8)).half().requires_grad_()
    out = marginal_logits(logits, space.labelled(["nih_pancreas_ct"]))
    out.softmax(1).sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(logits.grad).all()
