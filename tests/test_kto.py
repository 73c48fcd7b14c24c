"""kto.py against published-trainer golden numbers, the closed-form gradient, and invariances of the optimiser step."""

import math

import pytest
import torch

import kto

# Golden inputs and outputs, fp32 on CPU: the outputs were computed once by TRL 0.9.6's KTOTrainer.kto_loss.
POLICY = torch.tensor([-310.25, -402.5, -512.75, -298.0])
REFERENCE = torch.tensor([-312.0, -401.0, -509.5, -305.5])
KL_POLICY = torch.tensor([-700.0, -812.25, -640.5, -955.0])
KL_REFERENCE = torch.tensor([-701.5, -810.0, -646.0, -956.25])
CHOSEN = torch.tensor([True, False, True, False])
BETA = 0.1


def z0_of(log_ratios, **ema):
    return kto.z0_estimate(log_ratios.sum(), torch.tensor(float(len(log_ratios))), **ema)[0]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize(
    ("lambda_r", "loss", "gradient"),
    [
        (1.0, 0.54538262, [-0.00624902, 0.00611146, -0.00591031, 0.00571961]),
        (1.5, 0.67928433, [-0.00624902, 0.00916719, -0.00591031, 0.00857941]),
    ],
)
def test_golden_kto(lambda_r, loss, gradient):
    policy = POLICY.clone().requires_grad_()
    z0 = z0_of(KL_POLICY - KL_REFERENCE)
    assert z0.item() == 1.5
    mean = kto.kto_loss(kto.implicit_reward(policy, REFERENCE), z0, CHOSEN, BETA, 1.0, lambda_r).mean()
    mean.backward()
    assert mean.item() == pytest.approx(loss, abs=1e-7)
    assert policy.grad.tolist() == pytest.approx(gradient, abs=1e-8)


def test_golden_by_hand():
    """Log-ratios 1.75, -1.5, -3.25, 7.5 and z0 = 1.5: arguments .025, .3, -.475, -.6, all lambdas 1."""
    losses = kto.kto_loss(kto.implicit_reward(POLICY, REFERENCE), torch.tensor(1.5), CHOSEN, BETA, 1.0, 1.0)
    assert losses.tolist() == pytest.approx([1 - sigmoid(x) for x in (0.025, 0.3, -0.475, -0.6)], abs=1e-7)


def test_golden_negative_kl_is_clamped():
    z0, state = kto.z0_estimate((KL_REFERENCE - KL_POLICY).sum(), torch.tensor(4.0))
    assert (z0.item(), state.item()) == (0.0, -1.5)
    losses = kto.kto_loss(kto.implicit_reward(POLICY, REFERENCE), z0, CHOSEN, BETA, 1.0, 1.5)
    assert losses.mean().item() == pytest.approx(0.68738174, abs=1e-7)


@pytest.mark.parametrize(("rows", "loss"), [([0, 2], 0.55515838), ([1, 3], 0.80341029)])
def test_golden_one_class(rows, loss):
    r = kto.implicit_reward(POLICY[rows], REFERENCE[rows])
    assert kto.kto_loss(r, torch.tensor(1.5), CHOSEN[rows], BETA, 1.0, 1.5).mean().item() == pytest.approx(
        loss, abs=1e-7
    )


def test_golden_policy_equals_reference():
    r = kto.implicit_reward(POLICY, POLICY)
    assert (r == 0).all()
    assert kto.kto_loss(r, z0_of(r), CHOSEN, BETA, 1.0, 1.5).mean().item() == 0.625  # half the mean lambda


def mr_align_rows():
    """(policy, reference) token log-probs (4, 12) and w (4, 12): four steps, then three tokens outside the thinking."""
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(4, 12, generator=generator) * 3
    reference = -torch.rand(4, 12, generator=generator) * 3
    steps = [0, 0, 1, 1, 1, 2, 2, 3, 3]
    w_rows = [[1, 1.5, 0.5, 2], [0.4, 1, math.e, 1], [1, 1, 1, 1], [1 / math.e, 1, 1.2, 0.8]]
    return policy, reference, torch.tensor([[row[s] for s in steps] + [1.0] * 3 for row in w_rows])


def test_golden_mr_align():
    policy, reference, w = mr_align_rows()
    r = kto.implicit_reward((w * policy).sum(1), (w * reference).sum(1))
    loss = kto.kto_loss(r, torch.tensor(0.4), CHOSEN, BETA, 1.0, 1.5).mean()
    assert loss.item() == pytest.approx(0.56419522, abs=1e-7)


def test_unit_weights_are_kto_bit_for_bit():
    policy, reference, w = mr_align_rows()
    ones = torch.ones_like(w)
    outputs = []
    for weighted, ref_weighted in (
        ((ones * policy).sum(1), (ones * reference).sum(1)),
        (policy.sum(1), reference.sum(1)),
    ):
        r = kto.implicit_reward(weighted, ref_weighted)
        outputs.append((r, kto.kto_loss(r, torch.tensor(0.4), CHOSEN, BETA, 1.0, 1.5)))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert outputs[0][1].mean().item() == pytest.approx(0.59622490, abs=1e-7)


def test_worked_trace():
    """The README's trace from log-ratios to the gradient of a token in every step and in the answer."""
    ratios = torch.tensor([0.2, -0.1, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.9429, 2.2770, 1.0005, 1.0], dtype=torch.float64)
    nothing = torch.zeros(1, dtype=torch.float64)
    assert kto.implicit_reward(ratios.sum()[None], nothing).item() == pytest.approx(0.8, abs=1e-12)
    r = kto.implicit_reward((w * ratios).sum()[None], nothing)
    r.retain_grad()
    loss = kto.kto_loss(r, torch.tensor(0.05), torch.tensor([True]), BETA, 1.0, 1.5)
    loss.sum().backward()
    assert r.item() == pytest.approx(0.66103, abs=5e-6)
    assert 1 - loss.item() == pytest.approx(0.515271, abs=5e-7)
    assert loss.item() == pytest.approx(0.484729, abs=5e-7)
    assert r.grad.item() == pytest.approx(-0.024977, abs=5e-7)
    assert ratios.grad.tolist() == pytest.approx([-0.023551, -0.056872, -0.024989, -0.024977], abs=1e-6)


# ---------------------------------------------------------------------------------------------- gradient


def random_rows(n, seed=0):
    """fp64: policy token log-probs (n, 7) with grad, reference ones, w, chosen (both classes)."""
    g = torch.Generator().manual_seed(seed)
    policy = (-torch.rand(n, 7, generator=g, dtype=torch.float64) * 9).requires_grad_()
    reference = -torch.rand(n, 7, generator=g, dtype=torch.float64) * 9
    w = torch.exp(torch.rand(n, 7, generator=g, dtype=torch.float64) * 2 - 1)
    chosen = torch.rand(n, generator=g) < 0.6
    chosen[0], chosen[-1] = True, False
    return policy, reference, w, chosen


@pytest.mark.parametrize(("beta", "lambda_c", "lambda_r", "z0"), [(0.1, 1.0, 1.5, 0.4), (0.7, 1.3, 1.2, 0.0)])
def test_gradient_equals_closed_form(beta, lambda_c, lambda_r, z0):
    """dL/dlogp_t = -/+ lambda beta sigma (1 - sigma) w_t / n, in plain Python."""
    n = 9
    policy, reference, w, chosen = random_rows(n)
    r = kto.implicit_reward((w * policy).sum(1), (w * reference).sum(1))
    losses = kto.kto_loss(r, torch.tensor(z0, dtype=torch.float64), chosen, beta, lambda_c, lambda_r)
    (losses.sum() / n).backward()
    for b in range(n):
        reward = math.fsum(w[b, t].item() * (policy[b, t].item() - reference[b, t].item()) for t in range(7))
        sign, weight = (1, lambda_c) if chosen[b] else (-1, lambda_r)
        s = sigmoid(beta * sign * (reward - z0))
        assert losses[b].item() == pytest.approx(weight - weight * s, abs=1e-10)
        expected = [-sign * weight * beta * s * (1 - s) * w[b, t].item() / n for t in range(7)]
        assert policy.grad[b].tolist() == pytest.approx(expected, abs=1e-10)


def test_saturated_rows_keep_their_gradient():
    """beta * gain = 40: 1 - sigma is 0 in fp32, exp(-40) is not."""
    r = torch.tensor([400.0, -400.0], requires_grad=True)
    losses = kto.kto_loss(r, torch.tensor(0.0), torch.tensor([True, False]), BETA, 1.0, 1.5)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.exp(-40), 1.5 * math.exp(-40)], rel=1e-5)
    assert r.grad.tolist() == pytest.approx([-0.1 * math.exp(-40), 0.15 * math.exp(-40)], rel=1e-5)


def test_losses_lie_between_zero_and_lambda():
    r = torch.linspace(-2000, 2000, 101)
    for chosen, top in ((True, 1.0), (False, 1.5)):
        losses = kto.kto_loss(r, torch.tensor(3.0), torch.full((101,), chosen), BETA, 1.0, 1.5)
        steps = losses.diff()
        assert losses.min() >= 0 and losses.max() <= top
        assert (steps <= 0).all() if chosen else (steps >= 0).all()  # more reward: better if chosen, worse if not


def test_constants_refuse_gradients():
    free = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(AssertionError):
        kto.kto_loss(torch.zeros(1), free, torch.tensor([True]), BETA, 1.0, 1.5)
    with pytest.raises(AssertionError):
        kto.z0_estimate(free, torch.tensor(1.0))
    with pytest.raises(AssertionError):
        kto.implicit_reward(torch.zeros(1), torch.zeros(1, requires_grad=True))


def test_wrong_shapes_are_refused():
    """A (B, 1) reward against (B,) classes would broadcast to (B, B) and still train."""
    r, chosen, z0 = torch.zeros(3), torch.tensor([True, False, True]), torch.tensor(0.0)
    with pytest.raises(AssertionError):
        kto.implicit_reward(r, r[:, None])
    with pytest.raises(AssertionError):
        kto.implicit_reward(r[:, None], r[:, None])
    for bad in ((r[:, None], z0, chosen), (r, z0, chosen[:2]), (r, z0, chosen.float()), (r, r, chosen)):
        with pytest.raises(AssertionError):
            kto.kto_loss(*bad, BETA, 1.0, 1.5)
    with pytest.raises(AssertionError):
        kto.metrics(torch.zeros(2, 5))


# ---------------------------------------------------------------------------------------------- z0


def test_z0_clamps_the_mean_not_its_terms():
    assert z0_of(torch.tensor([5.0, -3.0])).item() == 1.0  # term by term it would be 2.5
    assert z0_of(torch.tensor([-5.0, 3.0])).item() == 0.0  # term by term 1.5


def test_z0_ema_by_hand():
    """State: .75 * old + .25 * mean, from 0: 1.0, .25, -.5625; the state keeps its sign, z0 does not."""
    state, seen = 0.0, []
    for mean in (4.0, -2.0, -3.0):
        z0, state = kto.z0_estimate(torch.tensor(2 * mean), torch.tensor(2.0), ema_state=state, ema=0.75)
        seen.append((z0.item(), state.item()))
    assert seen == [(1.0, 1.0), (0.25, 0.25), (0.0, -0.5625)]
    first, _ = kto.z0_estimate(torch.tensor(8.0), torch.tensor(2.0), ema=0.75)  # the state starts at 0
    assert first.item() == 1.0


@pytest.mark.parametrize("ema", [-0.1, 1.0])
def test_z0_refuses_an_ema_that_forgets_nothing(ema):
    with pytest.raises(AssertionError):
        kto.z0_estimate(torch.tensor(1.0), torch.tensor(1.0), ema=ema)


# ---------------------------------------------------------------------------------------------- optimiser step


@pytest.mark.parametrize("split", [[64], [32, 32], [8] * 8, [1] * 64, [0, 3, 61], [64, 0]])
def test_a_step_does_not_depend_on_its_split(split):
    """Loss, gradient, z0 and every metric of 64 rows, cut in any way (empty and one-class parts included)."""

    def step(parts):
        policy, reference, w, chosen = random_rows(64, seed=3)
        order = chosen.argsort(stable=True)  # rejected first: most parts hold one class only
        kl = torch.randn(64, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.3
        rows = order.split(parts)
        kl_sums = torch.stack([torch.stack([kl[i].sum(), torch.tensor(float(len(i)))]) for i in rows]).sum(0)
        z0, _ = kto.z0_estimate(kl_sums[0], kl_sums[1])
        stats = torch.zeros(2, 5, dtype=torch.float64)
        for i in rows:
            r = kto.implicit_reward((w[i] * policy[i]).sum(1), (w[i] * reference[i]).sum(1))
            raw = kto.implicit_reward(policy[i].sum(1), reference[i].sum(1))
            losses = kto.kto_loss(r, z0, chosen[i], BETA, 1.0, 1.5)
            (losses.sum() / 64).backward()
            stats += kto.reward_stats(losses, r, raw, policy[i].sum(1), chosen[i], BETA)
        return z0, policy.grad, kto.metrics(stats)

    z0, grad, metrics = step(split)
    z0_whole, grad_whole, metrics_whole = step([64])
    assert z0.item() == pytest.approx(z0_whole.item(), abs=1e-13)
    torch.testing.assert_close(grad, grad_whole, rtol=0, atol=1e-14)
    assert metrics == pytest.approx(metrics_whole, abs=1e-11)
    assert z0 > 0


def test_metrics_by_hand():
    loss, r, raw = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([3.0, 5.0, -2.0]), torch.tensor([1.0, 2.0, -4.0])
    logps = torch.tensor([-10.0, -20.0, -7.0])
    stats = kto.reward_stats(loss, r, raw, logps, torch.tensor([True, True, False]), BETA)
    assert stats.shape == (2, 5) and stats.dtype == torch.float64
    expected = {
        "loss": 0.5,
        "count/chosen": 2.0,
        "count/rejected": 1.0,
        "rewards/chosen": 0.4,
        "rewards/rejected": -0.2,
        "rewards/margins": 0.6,
        "rewards_raw/chosen": 0.15,
        "rewards_raw/rejected": -0.4,
        "rewards_raw/margins": 0.55,
        "logps/chosen": -15.0,
        "logps/rejected": -7.0,
    }
    assert kto.metrics(stats) == pytest.approx(expected, abs=1e-6)


def test_metrics_of_one_class():
    one = torch.ones(2)
    metrics = kto.metrics(kto.reward_stats(one, one, one, one, torch.tensor([False, False]), BETA))
    assert metrics["count/chosen"] == 0 and metrics["count/rejected"] == 2
    assert not {"rewards/chosen", "logps/chosen", "rewards/margins"} & metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


def test_broken_rows_are_not_hidden():
    """A NaN row makes the loss and the metrics NaN: nothing is averaged around it."""
    r = torch.tensor([1.0, float("nan"), 2.0])
    chosen = torch.tensor([True, False, True])
    losses = kto.kto_loss(r, torch.tensor(0.0), chosen, BETA, 1.0, 1.5)
    assert losses.isnan().tolist() == [False, True, False]
    assert math.isnan(kto.metrics(kto.reward_stats(losses, r, r, r, chosen, BETA))["loss"])


# ---------------------------------------------------------------------------------------------- SFT


def test_sft_is_cross_entropy_per_token():
    """Rows of 3 and 5 tokens against torch's own token mean, loss and gradient; whole or row by row."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 11, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (8,), generator=g)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    logp = logits.log_softmax(-1)[range(8), targets]
    plain = torch.stack([logp[:3].sum(), logp[3:].sum()])
    loss = kto.sft_loss(plain, 8).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-15)
    parts = kto.sft_loss(plain[:1], torch.tensor(8)) + kto.sft_loss(plain[1:], torch.tensor(8))
    assert parts.item() == pytest.approx(expected.item(), abs=1e-14)


def test_a_loss_keeps_the_rows_it_names():
    """Each class, chosen and rejected; a name that is none is no quiet choice of all."""
    for rows, kept in (("all", [True, True]), ("chosen", [True, False]), ("rejected", [False, True])):
        loss = kto.Loss("x", kto._kto, weights="ones", rate="lr", rows=rows)
        assert [loss.keeps(chosen) for chosen in (True, False)] == kept
    with pytest.raises(KeyError):
        kto.Loss("x", kto._kto, weights="ones", rate="lr", rows="rejectd").keeps(True)
