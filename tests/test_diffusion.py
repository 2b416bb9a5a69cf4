"""The process: every prediction inverts exactly, weights mean what they say, samplers arrive."""

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.errors import UserError
from geodiff4d.video.diffusion import Diffusion, DiffusionConfig, make_sampler

PREDICTIONS = ("epsilon", "v", "residual")
SAMPLERS = ("ddim", "unipc", "dpm++")


def draw(seed: int = 0, shape: tuple[int, ...] = (3, 2, 4, 2, 5, 5)) -> tuple[torch.Tensor, ...]:
    """Draw (clean, base, noise), float64 so that what is exact shows."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))


def target(
    diffusion: Diffusion, z: torch.Tensor, base: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Return what a perfect network would say, from the definitions."""
    a = diffusion.alpha(t).double()
    if diffusion.config.prediction == "epsilon":
        return noise
    if diffusion.config.prediction == "v":
        return a.sqrt() * noise - (1 - a).sqrt() * z
    s2 = torch.tensor(diffusion.config.residual_std, dtype=z.dtype)[None, :, None, None, None, None] ** 2
    r_t = a.sqrt() * (z - base) + (1 - a).sqrt() * noise
    skip, gain = a.sqrt() * s2 / (a * s2 + 1 - a), ((1 - a) * s2 / (a * s2 + 1 - a)).sqrt()
    return (z - base - skip * r_t) / gain


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_right_output_gives_the_clean_latent(prediction):
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))
    z, base, noise = draw()
    t = torch.tensor([1, 500, 999])
    z_t = diffusion.add_noise(z, noise, t)
    clean = diffusion.to_clean(target(diffusion, z, base, noise, t), z_t, base, t)
    assert_close(clean, z, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_weights_turn_latent_errors_into_the_networks(prediction):
    """Noise error for "epsilon", velocity error for "v"; the residual's is EDM's 1/c_out² less its pole."""
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))
    z, base, noise = draw()
    t = torch.tensor([10, 500, 999])
    z_t = diffusion.add_noise(z, noise, t)
    out = target(diffusion, z, base, noise, t) + 0.3 * torch.randn(z.shape, dtype=z.dtype)
    error = (diffusion.to_clean(out, z_t, base, t) - z).square() * diffusion.loss_weight(t)
    if prediction == "residual":
        weight = diffusion.loss_weight(t).flatten()
        assert weight[0] == 5 and weight[2].item() == pytest.approx(1, abs=0.01)
    else:
        assert_close(error, (out - target(diffusion, z, base, noise, t)).square(), atol=1e-4, rtol=1e-4)


def test_residual_networks_see_and_make_unit_variance():
    diffusion = Diffusion(DiffusionConfig(prediction="residual", residual_std=(0.5, 0.2)))
    _, base, noise = draw(1, (3, 2, 8, 2, 16, 16))
    std = torch.tensor([0.5, 0.2], dtype=torch.float64)[None, :, None, None, None, None]
    z = base + std * draw(2, base.shape)[0]
    t = torch.tensor([5, 400, 999])
    seen = diffusion.scale_input(diffusion.add_noise(z, noise, t), base, t)
    for x in (seen, target(diffusion, z, base, noise, t)):
        assert_close(x.std((2, 3, 4, 5)), torch.ones(3, 2, dtype=x.dtype), atol=0.06, rtol=0)


def test_residual_prediction_starts_from_the_base_and_ends_at_the_input():
    diffusion = Diffusion(DiffusionConfig(prediction="residual"))
    z, base, noise = draw()
    for t, expected in ((999, base), (0, z)):
        steps = torch.full((3,), t)
        clean = diffusion.to_clean(torch.zeros_like(z), diffusion.add_noise(z, noise, steps), base, steps)
        assert (clean - expected).abs().max() < 0.15
    one = diffusion.scale_input(z[:, :1], base[:, :1], torch.tensor([1, 2, 3]))
    assert one.shape == z[:, :1].shape, "a model without normals has one domain"


def test_both_domains_get_the_same_noise():
    diffusion = Diffusion(DiffusionConfig())
    z = torch.zeros(2, 2, 4, 3, 4, 4)
    noise = diffusion.noise_like(z, torch.Generator().manual_seed(0))
    assert torch.equal(noise[:, 0], noise[:, 1])
    assert noise[0, 0].ne(noise[1, 0]).all() and noise[0, 0, :, 0].ne(noise[0, 0, :, 1]).all()
    assert torch.equal(noise, diffusion.noise_like(z, torch.Generator().manual_seed(0)))
    apart = diffusion.noise_like(z, torch.Generator().manual_seed(0), shared=False)
    assert apart[:, 0].ne(apart[:, 1]).all()


# Samplers


def run(name: str, steps: int, z: torch.Tensor, predict: Callable[..., torch.Tensor]) -> torch.Tensor:
    scheduler = make_sampler(name, DiffusionConfig(), steps)
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, t[None]), t, z, return_dict=False)[0]
    return z


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_samplers_reach_what_an_oracle_says(name, steps):
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 1, 2, 4, 1, 3, 3, generator=g)
    assert_close(run(name, steps, noise, lambda x, t: z), z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_keep_a_gaussians_mean_and_spread(name):
    """The ideal denoiser of N(base, s²) is the residual model with output zero: schedules and times must agree."""
    diffusion = Diffusion(DiffusionConfig(prediction="residual", residual_std=(0.5, 0.25)))
    base = torch.full((1, 2, 4, 2, 24, 24), 0.7)
    noise = diffusion.noise_like(base, torch.Generator().manual_seed(0), shared=False)
    start = diffusion.add_noise(base, noise, torch.tensor([999]))
    out = run(name, 250, start, lambda x, t: diffusion.to_clean(torch.zeros_like(x), x, base, t))
    assert_close(out.mean((0, 2, 3, 4, 5)), torch.tensor([0.7, 0.7]), atol=0.03, rtol=0)
    assert_close(out.std((0, 2, 3, 4, 5)), torch.tensor([0.5, 0.25]), atol=0, rtol=0.06)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_share_our_schedule(name, zero):
    config = DiffusionConfig(prediction="v", zero_terminal=zero)
    scheduler = make_sampler(name, config, 25)
    assert_close(scheduler.alphas_cumprod, Diffusion(config).alphas_cumprod, atol=1e-5, rtol=1e-3)
    assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == 25


def test_a_schedule_can_end_in_plain_noise():
    """Then the last step's input tells nothing of the clean latent, and a prediction of zero is the base."""
    diffusion, last = Diffusion(DiffusionConfig(prediction="residual", zero_terminal=True)), torch.tensor([999])
    z, noise, base = torch.randn(3, 1, 2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    z_t = diffusion.add_noise(z, noise, last)
    assert_close(z_t, noise, atol=1e-5, rtol=0)
    assert_close(diffusion.scale_input(z_t, base, last), noise, atol=1e-5, rtol=0)
    assert_close(diffusion.to_clean(torch.zeros_like(z), z_t, base, last), base, atol=1e-5, rtol=0)
    assert Diffusion(DiffusionConfig()).alpha(last).sqrt().item() == pytest.approx(0.068, abs=1e-3)
    with pytest.raises(ValueError, match="zero_terminal"):
        Diffusion(DiffusionConfig(zero_terminal=True))


@pytest.mark.parametrize(("steps", "message"), [(0, "1 to 1000, got 0"), (1001, "1 to 1000, got 1001")])
def test_steps_the_schedule_does_not_have_are_refused(steps, message):
    with pytest.raises(UserError, match=message):
        make_sampler("unipc", DiffusionConfig(), steps)
