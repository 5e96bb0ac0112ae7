"""Values by hand: logits are logarithms of the probabilities that a test is about."""

import math

import pytest
import torch
from tables import rows
from torch import nn

from lightning_ema.semi_supervised import losses
from lightning_ema.semi_supervised.losses import (
    align_distribution,
    cross_entropy,
    kl,
    mse,
    mse_outputs,
    pseudo_labels,
    sharpen,
)

STUDENT = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
TEACHER = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.2, 0.6]])
LOSSES = {
    "mse": mse,
    "mse_outputs": mse_outputs,
    "kl": kl,
    "soft": lambda student, teacher, mask=None: cross_entropy(student, teacher.float().softmax(1), mask),
    "hard": lambda student, teacher, mask=None: cross_entropy(student, teacher.argmax(1), mask),
}
CLASSIFIER_LOSSES = [name for name in LOSSES if name != "mse_outputs"]
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", (0.0625 + 0.0625) / 3 / 2),
        ("kl", (0.25 * math.log(0.5) + 0.5 * math.log(2)) / 2),
        (
            "soft",
            -(0.25 * math.log(0.5) + 0.75 * math.log(0.25) + 0.4 * math.log(0.2) + 0.6 * math.log(0.6)) / 2,
        ),
        ("hard", -(math.log(0.25) + math.log(0.6)) / 2),
    ],
)
def test_values_by_hand(name, expected):
    # a constant added to all logits of a sample changes no probability
    assert LOSSES[name](STUDENT.log() + 3, TEACHER.log() - 7).item() == pytest.approx(expected, rel=1e-6)


def test_outputs_are_compared_as_they_are():
    assert mse_outputs(torch.tensor([[1.0, -2.0], [0.0, 300.0]]), torch.tensor([[2.0, 0.0], [0.0, 310.0]])) == 105 / 4
    assert mse_outputs(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 0.0])) == 3
    assert mse_outputs(torch.tensor([[0.5], [1.5]]), torch.zeros(2, 1)) == 1.25


@pytest.mark.parametrize("dim", [1, -1, 2, 0, -2])
def test_losses_equal_those_of_torch_in_segmentation(dim):
    """Per position by torch's own functions, over any dimension of classes, and averaged over all positions."""
    student, teacher = random(4, 5, 3, 6, dtype=torch.float64), random(4, 5, 3, 6, seed=1, dtype=torch.float64)
    flat_student, flat_teacher = (x.movedim(dim, -1).flatten(0, -2) for x in (student, teacher))
    q = flat_teacher.softmax(-1)
    torch.testing.assert_close(
        mse(student, teacher, dim=dim), nn.functional.mse_loss(flat_student.softmax(-1), q, reduction="mean")
    )
    torch.testing.assert_close(
        kl(student, teacher, dim=dim),
        nn.functional.kl_div(flat_student.log_softmax(-1), q, reduction="batchmean"),
    )
    torch.testing.assert_close(
        cross_entropy(student, teacher.softmax(dim), dim=dim), nn.functional.cross_entropy(flat_student, q)
    )
    torch.testing.assert_close(
        cross_entropy(student, teacher.argmax(dim), dim=dim),
        nn.functional.cross_entropy(flat_student, flat_teacher.argmax(-1)),
    )
    labels, mask = pseudo_labels(teacher, 0.6, dim=dim)
    confidence = q.amax(-1)
    assert torch.equal(labels.flatten(), q.argmax(-1))
    assert torch.equal(mask.flatten(), confidence >= 0.6) and 0 < mask.sum() < mask.numel()


def test_masked_positions_count_in_the_divisor():
    """FixMatch: two of four accepted, and the mean is over four."""
    student = STUDENT.log().repeat(2, 1)
    labels = torch.tensor([0, 2, 1, 0])
    mask = torch.tensor([True, False, False, True])
    assert cross_entropy(student, labels, mask).item() == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 4)
    weights = torch.tensor([2.0, 0.0, 0.0, 0.5])
    assert cross_entropy(student, labels, weights).item() == pytest.approx(
        -(2 * math.log(0.5) + 0.5 * math.log(0.2)) / 4
    )


@every_loss
def test_a_mask_for_whole_images_stands_for_all_their_pixels(loss):
    student, teacher = random(3, 4, 2, 3), random(3, 4, 2, 3, seed=1)
    images = torch.tensor([True, False, True])
    expected = loss(student[images], teacher[images]) * 2 / 3
    torch.testing.assert_close(loss(student, teacher, images), expected)
    rows = images.unsqueeze(1).expand(3, 4 if loss is mse_outputs else 2)
    torch.testing.assert_close(loss(student, teacher, rows), expected)


def test_fixmatch_is_one_line():
    teacher = torch.tensor([[0.96, 0.02, 0.02], [0.5, 0.3, 0.2]]).log()
    loss = cross_entropy(STUDENT.log(), *pseudo_labels(teacher, 0.95))
    assert loss.item() == pytest.approx(-math.log(0.5) / 2)


def test_a_threshold_is_reached_by_what_equals_it():
    teacher = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert pseudo_labels(teacher, 0.75)[1].tolist() == [True, False]
    assert pseudo_labels(teacher, 0.5)[1].tolist() == [True, True]
    assert pseudo_labels(teacher, 0)[1].tolist() == [True, True]
    assert pseudo_labels(teacher, 1)[1].tolist() == [False, False]
    assert pseudo_labels(teacher, 0.6)[0].dtype == torch.int64


def test_pseudo_labels_from_probabilities():
    probabilities = torch.tensor([[1.0, 0.0], [0.1, 0.9]])
    labels, mask = pseudo_labels(probabilities.log(), 0.95)
    assert labels.tolist() == [0, 1] and mask.tolist() == [True, False]


def test_sharpen_by_hand_and_as_softmax_of_scaled_logits():
    sharp = sharpen(torch.tensor([[0.2, 0.3, 0.5]]), 0.5)
    torch.testing.assert_close(sharp, torch.tensor([[0.04, 0.09, 0.25]]) / 0.38)
    logits = random(3, 4, 5, 2)
    torch.testing.assert_close(sharpen(logits.softmax(1), 0.3), (logits / 0.3).softmax(1))
    torch.testing.assert_close(sharpen(logits.softmax(-2), 3.0, dim=-2), (logits / 3).softmax(-2))
    torch.testing.assert_close(sharpen(TEACHER, 1), TEACHER)


@pytest.mark.parametrize("temperature", [1e-300, 1e-3])
def test_sharpening_at_almost_no_temperature_gives_one_class(temperature):
    many = torch.full((1, 1000), 1e-3)
    many[0, 7] = 2e-3
    assert torch.equal(sharpen(many, temperature), (many == many.max()).float())
    assert sharpen(torch.tensor([[0.5, 0.5, 0.0]]), temperature).tolist() == [[0.5, 0.5, 0.0]]


def test_align_distribution_by_hand():
    wanted, predicted = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.8, 0.1, 0.1])
    # 0.4 * 5/8 = 0.25; 0.2 * 5/2 = 0.5; 0.4 * 5/2 = 1; sum 1.75
    aligned = align_distribution(torch.tensor([[0.4, 0.2, 0.4]]), wanted, predicted)
    torch.testing.assert_close(aligned, torch.tensor([[1.0, 2.0, 4.0]]) / 7)
    torch.testing.assert_close(align_distribution(TEACHER, wanted, wanted), TEACHER)
    pixels = TEACHER.t().reshape(1, 3, 2, 1)
    torch.testing.assert_close(
        align_distribution(pixels, wanted, predicted),
        align_distribution(TEACHER, wanted, predicted).t().reshape(1, 3, 2, 1),
    )


def test_aligning_with_classes_never_seen_stays_finite():
    never = torch.tensor([0.0, 1.0])
    certain = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    for wanted, predicted in [(never, never), (never, 1 - never), (1 - never, never)]:
        aligned = align_distribution(certain, wanted, predicted)
        assert aligned.isfinite().all()
        torch.testing.assert_close(aligned.sum(1), torch.ones(2))
        assert aligned[0].tolist() == [1.0, 0.0]


@every_loss
def test_gradients_flow_to_the_student_alone(loss):
    student, teacher = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@every_loss
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher = random(4, 3, dtype=torch.float64).requires_grad_(), random(4, 3, seed=1, dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, mask), student)


@every_loss
@rows("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)])
def test_an_empty_batch_gives_zero_with_a_graph(loss, shape):
    student = torch.zeros(shape, requires_grad=True)
    value = loss(student, torch.zeros(shape))
    assert value.item() == 0 and value.shape == ()
    value.backward()
    assert student.grad.shape == shape


@every_loss
@rows("mask", [torch.zeros(2, dtype=torch.bool), torch.zeros(2)])
def test_a_batch_masked_as_a_whole_gives_zero_with_a_gradient_of_zero(loss, mask):
    student = random(2, 3).requires_grad_()
    value = loss(student, random(2, 3, seed=1), mask)
    value.backward()
    assert value.item() == 0 and torch.equal(student.grad, torch.zeros(2, 3))


@every_loss
def test_what_targets_hold_at_masked_positions_does_not_matter(loss):
    student = random(2, 3).requires_grad_()
    teacher = random(2, 3, seed=1)
    mask = torch.tensor([True, False])
    loss(student, teacher, mask).backward()
    expected, student.grad = student.grad, None
    for poison in (math.nan, math.inf, -math.inf):
        teacher[1] = poison
        value = loss(student, teacher, mask)
        value.backward()
        assert value.isfinite() and torch.equal(student.grad, expected)
        student.grad = None


def test_labels_that_do_not_exist_may_be_masked():
    student = STUDENT.log()
    labels = torch.tensor([0, 255], dtype=torch.uint8)
    assert cross_entropy(student, labels, labels != 255).item() == pytest.approx(-math.log(0.5) / 2)
    assert cross_entropy(student, torch.tensor([0, -1]), torch.tensor([1.0, 0.0])).item() == pytest.approx(
        -math.log(0.5) / 2
    )
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(student, torch.tensor([0, -1]))


@every_loss
def test_nan_that_is_not_masked_is_not_hidden(loss):
    student = random(2, 3)
    student[0, 0] = math.nan
    assert loss(student, random(2, 3)).isnan()


@pytest.mark.parametrize("name", ["mse", "mse_outputs", "kl", "soft"])
def test_nan_of_the_teacher_is_not_hidden_either(name):
    teacher = random(2, 3)
    teacher[0, 0] = math.nan
    assert LOSSES[name](random(2, 3), teacher).isnan()


def test_a_teacher_of_nan_is_not_sure():
    teacher = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [0.0, 9.0]])
    assert pseudo_labels(teacher, 0.0)[1].tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["mse", "kl", "soft"])
def test_classes_ruled_out_by_minus_infinity_take_no_part(name):
    two, teacher_two = random(2, 2).requires_grad_(), random(2, 2, seed=1)
    ruled_out = torch.full((2, 1), -math.inf)
    value = LOSSES[name](torch.cat([two, ruled_out], 1), torch.cat([teacher_two, ruled_out], 1))
    value.backward()
    classes = 2 / 3 if name == "mse" else 1  # mse divides by the number of classes
    torch.testing.assert_close(value, classes * LOSSES[name](two, teacher_two))
    assert two.grad.isfinite().all()


@rows("dtype", [torch.float16, torch.bfloat16])
@every_loss
def test_half_types_are_computed_in_float32(loss, dtype):
    student, teacher = random(64, 10, dtype=dtype), random(64, 10, seed=1, dtype=dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=1e-5, atol=0)


@every_loss
def test_large_logits_in_float16_stay_finite(loss):
    student = torch.tensor([[6e4, -6e4, 0.0], [100.0, 90.0, -6e4]], dtype=torch.float16, requires_grad=True)
    value = loss(student, student.detach().flip(1))
    value.backward()
    assert value.isfinite() and (loss is mse_outputs or student.grad.isfinite().all())


@pytest.mark.parametrize("name", CLASSIFIER_LOSSES)
def test_under_autocast_the_loss_is_that_of_the_outputs_in_float32(name):
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(4, 3), nn.Linear(4, 3), random(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z, targets = student(x), teacher(x)
        value = LOSSES[name](z, targets)
    assert z.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert value.item() == LOSSES[name](z.float(), targets.float()).item()
    value.backward()
    assert student.weight.grad.isfinite().all() and teacher.weight.grad is None


@every_loss
@rows("weights", [None, torch.bool, torch.float32])
def test_targets_from_inference_mode_can_be_learned_from(loss, weights):
    """Autograd refuses to keep such tensors for the backward pass."""
    student, expected = random(4, 3).requires_grad_(), random(4, 3).requires_grad_()
    with torch.inference_mode():
        teacher = random(4, 3, seed=1)
        labels, mask = pseudo_labels(teacher, 0.4)
        masks = () if weights is None else (mask.to(weights),)
    for z, made in ((student, lambda x: x), (expected, torch.clone)):
        loss(z, made(teacher), *map(made, masks)).backward()
        cross_entropy(z, made(labels), *map(made, masks)).backward()
    assert torch.equal(student.grad, expected.grad) and student.grad.abs().sum() > 0
    with torch.inference_mode():
        assert loss(student, teacher).item() == loss(student.detach(), teacher).item()


@every_loss
def test_no_gradient_flows_to_weights_in_the_mask(loss):
    weights = torch.tensor([0.5, 1.0], requires_grad=True)
    loss(random(2, 3).requires_grad_(), random(2, 3, seed=1), weights).backward()
    assert weights.grad is None


@pytest.mark.parametrize("name", CLASSIFIER_LOSSES)
def test_a_masked_position_may_rule_out_the_class_that_fills_its_target(name):
    student = random(2, 3).index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(-math.inf)).requires_grad_()
    value = LOSSES[name](student, random(2, 3, seed=1), torch.tensor([True, False]))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad[1].tolist() == [0, 0, 0]


@every_loss
def test_arguments_are_left_as_they_were(loss):
    student, teacher, mask = random(3, 4), random(3, 4, seed=1), torch.tensor([True, False, True])
    before = student.clone(), teacher.clone(), mask.clone()
    loss(student, teacher, mask)
    assert all(map(torch.equal, before, (student, teacher, mask)))


@every_loss
def test_losses_compile_into_one_graph(loss):
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    student, teacher, mask = random(3, 4), random(3, 4, seed=1), torch.tensor([True, False, True])
    assert compiled(student, teacher, mask).item() == loss(student, teacher, mask).item()


def test_mse_of_two_opposite_certainties_is_two_over_the_number_of_classes():
    certain = torch.tensor([[90.0, 0.0, 0.0, 0.0]])
    assert mse(certain, certain.flip(1)).item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("loss", [mse, kl, cross_entropy, mse_outputs])
def test_shapes_that_differ_are_refused(loss):
    with pytest.raises(ValueError, match=r"\[4, 3\].*\[4, 1\]; they must be the same"):
        loss(torch.zeros(4, 3), torch.zeros(4, 1))


@pytest.mark.parametrize("loss", [mse, kl, cross_entropy])
def test_one_class_is_refused_with_the_remedy(loss):
    with pytest.raises(ValueError, match=r"1 class in dim=1.*torch.cat.*mse_outputs"):
        loss(torch.zeros(4, 1), torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"dim is 1, but student_logits has the shape \[4\].*mse_outputs"):
        loss(torch.zeros(4), torch.zeros(4))
    assert loss(torch.zeros(4), torch.zeros(4), dim=0).shape == ()


def test_one_logit_for_yes_or_no_goes_the_way_the_message_says():
    z = torch.tensor([[0.3], [-2.0]])
    two = torch.cat([torch.zeros_like(z), z], dim=1)
    labels = torch.tensor([1, 0])
    expected = nn.functional.binary_cross_entropy_with_logits(z[:, 0], labels.float())
    torch.testing.assert_close(cross_entropy(two, labels), expected)


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(4, 3), torch.ones(4, 1, 1), torch.ones(1)])
def test_masks_of_another_shape_are_refused(mask):
    with pytest.raises(ValueError, match=r"mask has the shape .*; the positions are \[4, 5\]"):
        mse(torch.zeros(4, 3, 5), torch.zeros(4, 3, 5), mask)


def test_masks_of_integers_are_refused():
    with pytest.raises(TypeError, match=r"mask is a tensor of int64.*bool"):
        mse(torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"mask is 0.95 \(float\)"):
        kl(torch.zeros(4, 3), torch.zeros(4, 3), 0.95)


@pytest.mark.parametrize("loss", [mse, kl, mse_outputs])
def test_what_is_no_tensor_of_floats_is_refused(loss):
    with pytest.raises(TypeError, match=r"is a tensor of int64 and shape \[4, 3\]; it must be a tensor of floats"):
        loss(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"student\w* is \{'boxes': 1\} \(dict\)"):
        loss({"boxes": 1}, torch.zeros(4, 3))


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels have the shape \[4, 3\].*that is \[4\]"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"targets is a tensor of bool"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool))


def test_logits_in_place_of_probabilities_are_refused_on_the_cpu():
    logits = torch.tensor([[2.0, -1.0]])
    for call in (
        lambda: cross_entropy(logits, logits),
        lambda: sharpen(logits, 0.5),
        lambda: align_distribution(logits, logits[0].softmax(0), logits[0].softmax(0)),
    ):
        with pytest.raises(ValueError, match=r"reaches from -1 to 2; probabilities lie in \[0, 1\].*softmax"):
            call()
    for wanted, predicted in ((logits[0], logits[0].softmax(0)), (logits[0].softmax(0), logits[0])):
        with pytest.raises(ValueError, match=r"(wanted|predicted) reaches from -1 to 2"):
            align_distribution(logits.softmax(1), wanted, predicted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_that_were_rounded_are_accepted(dtype):
    probabilities = (random(1000, 3) * 9).softmax(1).to(dtype)
    rounded_up = torch.where(probabilities == 1, torch.nextafter(probabilities, probabilities + 1), probabilities)
    assert (rounded_up > 1).any()
    assert cross_entropy(random(1000, 3), rounded_up).isfinite()


@rows("threshold", [-0.1, 1.01, 95, math.nan, None, True, "0.95"])
def test_thresholds_outside_of_0_and_1_are_refused(threshold):
    with pytest.raises(ValueError, match=rf"threshold is {threshold!r}; it must be a number in \[0, 1\]"):
        pseudo_labels(torch.zeros(2, 3), threshold)


@rows("temperature", [0, -1, math.inf, math.nan, None, True])
def test_temperatures_that_are_not_positive_are_refused(temperature):
    with pytest.raises(ValueError, match=rf"temperature is {temperature!r}; it must be a positive, finite number"):
        sharpen(TEACHER, temperature)


def test_distributions_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match=r"predicted has the shape \[2\]; it must be \[3\]"):
        align_distribution(TEACHER, torch.ones(3) / 3, torch.ones(2) / 2)


def test_the_module_shows_its_functions_alone():
    assert set(losses.__all__) == {
        "align_distribution", "cosine_ramp", "cross_entropy", "kl", "linear_ramp", "mse", "mse_outputs",
        "pseudo_labels", "sharpen", "sigmoid_ramp",
    }  # fmt: skip
