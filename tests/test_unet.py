"""The UNet twins: Stable Diffusion's own outputs, domains and references that mix where they should and only there."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from geodiff4d.core.errors import UserError
from geodiff4d.video.attention import DomainSpatialAttention, Layout
from geodiff4d.video.expression import ExpressionConfig, ExpressionEncoder
from geodiff4d.video.image_encoder import ImageEncoder, ImageEncoderConfig, load_image_encoder
from geodiff4d.video.model import VideoModelConfig
from geodiff4d.video.pretrained import from_stable_diffusion, load_unet, read_weights, unet_config
from geodiff4d.video.recode import start_from_stable_diffusion
from geodiff4d.video.unet import UNet, UNetConfig

TINY = UNetConfig(
    in_channels=6, out_channels=4, widths=(16, 32), layers=1, down_attention=(True, False), up_attention=(0, 2),
    heads=2, groups=8, ff_factor=2, cross_dim=None, expression_dim=4, expression_ff_factor=2, expression_latent=8,
)  # fmt: skip

EYES = ImageEncoderConfig(
    hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    projection_dim=24,
)  # fmt: skip
PAPER = VideoModelConfig(
    unet=UNetConfig(temporal_layers=1),
    expression=ExpressionConfig(size=16, widths=(8, 8), squeeze=4, latent=8, tokens=4),
)
"""The paper's, but for the encoder's size; the rest comes from the folder."""
CLIP_SAID = [-0.143676, -0.658071, -0.877076, -0.70239, -0.212424, 0.372894]


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """Weights of plain size everywhere: modules that start at zero would hide what they do."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else torch.nn.init.normal_(p, std=0.3)
    return unet.eval()


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_unet(TINY)


def inputs(frames: int = 2, domains: int = 2, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    return dict(
        x=torch.randn(1, domains, 6, frames, 8, 8, generator=g), timestep=torch.tensor([500.0]),
        tokens=torch.randn(1, frames, 5, 4, generator=g), latent=torch.randn(1, frames, 8, generator=g),
    )  # fmt: skip


# Stable Diffusion: parity with diffusers on random weights


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A tiny UNet of Stable Diffusion's topology and its folder."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, attention_head_dim=4, cross_attention_dim=24,
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("sd") / "unet"
    model.save_pretrained(folder)
    return model.eval(), folder


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_stable_diffusion_weights_compute_what_diffusers_does(stable, dtype, tolerance):
    theirs, folder = stable
    ours = UNet(unet_config(folder)).eval()
    load_unet(ours, folder)
    ours.class_embedding.weight.zero_()
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 8, 8, generator=g, dtype=dtype), torch.randn(2, 3, 24, generator=g, dtype=dtype)
    t = torch.tensor([3, 821])
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    expected = theirs(x, t, text).sample
    theirs.float()
    got, bank = ours(x[:, None, :, None], t.float(), image_context=text, domain_ids=(0,), joint=False)
    assert_close(got[:, 0, :, 0], expected, atol=tolerance * expected.abs().max().item(), rtol=0)
    assert len(bank) == len(ours.sites()) == 2 * 2 + 1 + 2 * 3


@torch.no_grad()
def test_the_first_convolution_grows_with_zeros(stable):
    _, folder = stable
    four, seven = UNet(unet_config(folder)), UNet(unet_config(folder, in_channels=7))
    report = load_unet(four, folder)
    grown = load_unet(seven, folder)
    assert not report.grown and not report.unexpected
    assert all("expressions" in k or k == "class_embedding.weight" for k in report.missing)
    assert len(report.missing) == 1 + sum("expressions" in k for k in four.state_dict())
    assert grown.grown == ("conv_in.weight",) and grown.missing == report.missing
    assert seven.conv_in.weight[:, 4:].abs().max() == 0
    assert_close(seven.conv_in.weight[:, :4], four.conv_in.weight, rtol=0, atol=0)
    seven.class_embedding.load_state_dict(four.class_embedding.state_dict())
    x, pose, t = torch.randn(1, 2, 4, 1, 8, 8), torch.randn(1, 2, 3, 1, 8, 8), torch.tensor([40.0])
    assert_close(seven(torch.cat([x, pose], 2), t)[0], four(x, t)[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_reference_network_leaves_the_last_layer_out(stable):
    _, folder = stable
    config = unet_config(folder, in_channels=7, reference=True)
    assert config.reference and config.expression_dim is None and config.heads == 4
    reference, denoiser = UNet(config), UNet(unet_config(folder, in_channels=7))
    report = load_unet(reference, folder)
    assert report.missing == ("class_embedding.weight",)
    assert sorted(report.unexpected) == [f"{m}.{p}" for m in ("conv_norm_out", "conv_out") for p in ("bias", "weight")]
    load_unet(denoiser, folder)
    reference.class_embedding.load_state_dict(denoiser.class_embedding.state_dict())
    x, t = torch.randn(1, 1, 7, 1, 8, 8), torch.zeros(1)
    for a, b in zip(reference(x, t, domain_ids=(0,))[1], denoiser(x, t, domain_ids=(0,))[1], strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_sharded_weights_are_read_whole(stable, tmp_path):
    model, folder = stable
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = read_weights(folder), read_weights(tmp_path)
    assert whole.keys() == sharded.keys() and all(torch.equal(whole[k], sharded[k]) for k in whole)
    next(tmp_path.glob("*00002-of*")).unlink()
    with pytest.raises(UserError, match="00002"):
        read_weights(tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../unet/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(UserError, match=r"\.\./unet"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_linear_projection": True}, "use_linear_projection True"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"attention_head_dim": [1, 2, 7]}, "numbers of heads"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "AttnDownBlock2D"),
        ({"down_block_types": ["DownBlock2D"]}, "one entry per level"),
        ({"block_out_channels": None}, "config.json"),
    ],
)
def test_foreign_unets_are_refused_by_name(stable, tmp_path, change, message):
    config = json.loads((stable[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        unet_config(tmp_path)


def test_weights_that_do_not_fit_are_named_and_change_nothing(stable, tmp_path):
    _, folder = stable
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    network = UNet(unet_config(folder))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    for change, message in (
        ({"conv_out.bias": None}, "conv_out.bias is missing"),
        ({"surprise.weight": torch.zeros(2)}, "surprise.weight has no place"),
        ({"conv_out.bias": torch.zeros(9)}, r"conv_out.bias is \(9,\) \(expected \(4,\)\)"),
        ({"conv_in.weight": torch.zeros(16, 9, 3, 3)}, "conv_in.weight"),
    ):
        save_file({k: v for k, v in (state | change).items() if v is not None}, file)
        with pytest.raises(UserError, match=message):
            load_unet(network, tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_unet(network, tmp_path)
    file.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        load_unet(network, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.fixture(scope="module")
def folders(stable, tmp_path_factory):
    """A Stable Diffusion folder, and one of image variations: the same with CLIP's image encoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, scaling_factor=0.18215,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("folders")
    for name in ("sd", "variations"):
        shutil.copytree(stable[1], root / name / "unet")
        vae.save_pretrained(root / name / "vae")
        (root / name / "scheduler").mkdir()
    ImageEncoder(EYES).save(root / "variations" / "image_encoder")
    return root


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "variations"])
def test_a_stable_diffusion_folder_becomes_the_papers_model(folders, name):
    """Every tensor of the folder has its place, and what is missing is exactly what the paper adds."""
    model, reports = from_stable_diffusion(folders / name, PAPER)
    assert model.config.unet.widths == (16, 32, 32) and model.config.unet.in_channels == 4 + 3
    added = ("expressions.", "temporals.", "class_embedding.")
    for network, report in reports.items():
        ours = model.networks()[network].state_dict()
        assert set(report.missing) == {k for k in ours if any(part in k for part in added)}
        assert report.grown == ("conv_in.weight",)
    assert any(".temporals." in k for k in reports["unet"].missing) and not reports["unet"].unexpected
    assert reports["reference"].missing == ("class_embedding.weight",)
    assert {k.split(".")[0] for k in reports["reference"].unexpected} == {"conv_norm_out", "conv_out"}
    portrait = torch.rand(1, 3, 16, 16)
    context = model.image_context(portrait)
    assert context is not None and context.shape == (1, 1, 24) and (context.abs().max() > 0) == (name == "variations")
    z, pose = model.codec.encode(portrait), torch.zeros(1, 3, 8, 8)
    with_context, without = (model.reference_kv(z, pose, w)[-1][0] for w in (context, None))
    assert (with_context - without).abs().max().gt(1e-3) == (name == "variations")


def test_training_says_that_it_drops_the_image_token(folders, capsys):
    for name in ("sd", "variations"):
        start_from_stable_diffusion(folders / name, PAPER)
        assert ("image_encoder is not used" in capsys.readouterr().out) == (name == "variations")


def test_the_papers_networks_have_stable_diffusions_names_and_shapes():
    """At full size, without weights: 686 tensors, and the first convolution alone is wider."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768
        ).state_dict()
        ours = UNet(UNetConfig(temporal_layers=2)).state_dict()
        reference = UNet(UNetConfig(expression_dim=None, reference=True)).state_dict()
    assert len(theirs) == 686
    for network, leaves in ((ours, ()), (reference, ("conv_norm_out", "conv_out"))):
        assert {k for k in theirs if k not in network} == {k for k in theirs if k.split(".")[0] in leaves}
        assert [k for k, v in theirs.items() if k in network and v.shape != network[k].shape] == ["conv_in.weight"]
        rest = {k for k in network if k not in theirs}
        assert all("expressions." in k or "temporals." in k or k == "class_embedding.weight" for k in rest)
    assert ours["conv_in.weight"].shape == (320, 7, 3, 3)


def test_folders_of_another_shape_are_refused_in_one_line(folders, tmp_path):
    def refused(change: Callable[[Path], object], message: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folders / "variations", folder)
        change(folder)
        with pytest.raises(UserError, match=message) as caught:
            from_stable_diffusion(folder, PAPER)
        assert "\n" not in str(caught.value)

    def edit(part: str, **values: object) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            file = folder / part / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | values))

        return change

    refused(lambda f: shutil.rmtree(f / "vae"), "expected sub-folders unet and vae .* vae has none")
    refused(edit("unet", in_channels=9), "inpainting")
    refused(edit("unet", use_linear_projection=True), "not of SD 1.x's topology")
    refused(edit("unet", block_out_channels=[16, 32, 64]), "does not fit this UNet")
    refused(edit("vae", _class_name="AutoencoderTiny"), "not a diffusers autoencoder")
    refused(lambda f: next((f / "vae").glob("*.safetensors")).write_bytes(b"cut"), "no usable autoencoder")
    refused(edit("image_encoder", model_type="siglip"), "not a CLIP image encoder")
    refused(edit("image_encoder", num_hidden_layers=3), "does not fit its config")
    refused(edit("image_encoder", hidden_act="swish"), "quick_gelu or gelu")
    with pytest.raises(UserError, match="unet and vae has none"):
        from_stable_diffusion(tmp_path / "nowhere")


@torch.no_grad()
def test_the_image_encoder_computes_what_transformers_does(tmp_path):
    """Weights by a formula; the embedding is what transformers 5.23's CLIPVisionModelWithProjection said of them."""
    encoder = ImageEncoder(replace(EYES, projection_dim=6))
    state = encoder.state_dict()
    for i, k in enumerate(sorted(state)):
        state[k].copy_(0.5 * torch.sin(0.7 * torch.arange(state[k].numel()) + i).view_as(state[k]))
    picture = 0.5 + 0.5 * torch.sin(0.13 * torch.arange(3 * 64.0)).view(1, 3, 8, 8)
    expected = torch.tensor(CLIP_SAID)
    assert_close(encoder(picture)[0, 0], expected, atol=1e-4, rtol=1e-4)
    encoder.save(tmp_path / "eyes")
    assert_close(load_image_encoder(tmp_path / "eyes")(picture)[0, 0], expected, atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_attention_to_one_token_needs_no_questions(stable):
    """A single key takes all the attention: sampling's shortcut equals the whole computation."""
    ours = UNet(unet_config(stable[1])).eval()
    load_unet(ours, stable[1])
    x, t, word = torch.randn(1, 2, 4, 1, 8, 8), torch.tensor([40.0]), torch.randn(1, 1, 24)
    short = ours(x, t, image_context=word)[0]
    with torch.enable_grad():
        whole = ours(x, t, image_context=word)[0].detach()
    assert_close(short, whole, atol=1e-5, rtol=1e-4)
    assert (short - ours(x, t, image_context=word + 1)[0]).abs().max() > 1e-3


# Domains, frames and references


def reaches(unet: UNet, change: tuple, **options) -> torch.Tensor:
    """Return how far each (domain, frame) of the output moves when one (domain, frame) of the input does."""
    a = inputs()
    b = dict(a, x=a["x"].clone())
    b["x"][:, change[0], :, change[1]] += 0.5
    with torch.no_grad():
        return (unet(**a, **options)[0] - unet(**b, **options)[0]).abs().amax((0, 2, 4, 5))


def test_domains_mix_only_through_joint_attention(unet):
    assert (reaches(unet, (1, 0))[:, 0] > 1e-3).all()
    apart = reaches(unet, (1, 0), joint=False)
    assert apart[1, 0] > 1e-3 and apart[0].max() == 0


def test_frames_do_not_mix(unet):
    moved = reaches(unet, (0, 1))
    assert (moved[:, 1] > 1e-3).all() and moved[:, 0].max() < 1e-6


@torch.no_grad()
def test_a_batch_is_its_rows(unet):
    a, b = inputs(seed=1), inputs(seed=2)
    reference = UNet(replace(TINY, in_channels=6, expression_dim=None, expression_latent=None, reference=True))
    portrait = torch.randn(2, 1, 6, 1, 8, 8)

    def run(i: dict, faces: torch.Tensor) -> torch.Tensor:
        kv = unet.reference_kv(reference(faces, torch.zeros(len(faces)), domain_ids=(0,))[1])
        return unet(**i, reference=kv)[0]

    both = run({k: torch.cat([a[k], b[k]]) for k in a}, portrait)
    assert_close(both, torch.cat([run(a, portrait[:1]), run(b, portrait[1:])]), atol=1e-5, rtol=1e-4)
    swapped = run({k: torch.cat([a[k], b[k]]) for k in a}, portrait.flip(0))
    assert (both - swapped).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("joint", [True, False])
def test_keys_computed_once_equal_hidden_states_side_by_side(joint):
    torch.manual_seed(0)
    attention = DomainSpatialAttention(8, 2)
    layout = Layout(batch=2, domains=2, frames=3, joint=joint)
    x, hidden = torch.randn(12, 4, 8), torch.randn(2, 5, 8)
    got = attention(x, layout, attention.reference_kv(hidden))
    for row in range(12):
        b, t = row // 6, row % 3
        own = torch.cat([x[b * 6 + k * 3 + t] for k in range(2)]) if joint else x[row]
        context = torch.cat([own, hidden[b]])[None]
        q, k, v = attention.to_q(x[row][None]), attention.to_k(context), attention.to_v(context)
        assert_close(got[row], attention.attend(q, k, v)[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fresh_expression_modules_leave_the_image_model_as_it_was():
    torch.manual_seed(0)
    unet = UNet(TINY)
    i = inputs()
    assert torch.equal(unet(**i)[0], unet(i["x"], i["timestep"])[0])


TEMPORAL = replace(TINY, temporal_layers=2, temporal_ff_factor=2)


@torch.no_grad()
def test_fresh_temporal_modules_leave_the_image_model_as_it_was(unet):
    video = UNet(TEMPORAL).eval()
    report = video.load_state_dict(unet.state_dict(), strict=False)
    assert not report.unexpected_keys and all(".temporals." in k for k in report.missing_keys)
    assert_close(video(**inputs(3))[0], unet(**inputs(3))[0], atol=0, rtol=0)


@torch.no_grad()
def test_temporal_modules_tell_frames_apart_by_their_place():
    video, given = random_unet(TEMPORAL), inputs(4)
    y = video(**given)[0]
    one = dict(given, x=given["x"].clone())
    one["x"][..., 2, :, :] += 1
    assert (video(**one)[0] - y).abs().amax((0, 1, 2, 4, 5)).min() > 1e-3, "every frame hears of every other"
    order = [2, 0, 3, 1]
    mixed = dict(given, x=given["x"][:, :, :, order])
    mixed |= {k: given[k][:, order] for k in ("tokens", "latent")}
    assert (video(**mixed)[0] - y[:, :, :, order]).abs().max() > 1e-3


@torch.no_grad()
def test_a_padded_frame_changes_no_other():
    video, given = random_unet(TEMPORAL), inputs(4)
    valid = torch.tensor([[True, True, True, False]])
    y = video(**given, valid=valid)[0]
    padded = dict(given, x=given["x"].clone())
    padded["x"][..., 3, :, :] = 7
    assert_close(video(**padded, valid=valid)[0][:, :, :, :3], y[:, :, :, :3])
    short = {k: v[:, :, :, :3] if k == "x" else v[:, :3] if k in ("tokens", "latent") else v for k, v in given.items()}
    assert_close(video(**short)[0], y[:, :, :, :3], atol=1e-5, rtol=1e-5)


def test_windows_beyond_the_positions_are_refused():
    with pytest.raises(UserError, match="33 frames"), torch.no_grad():
        random_unet(TEMPORAL)(**inputs(33))


def test_the_papers_unet_has_x_nemos_21_places():
    with torch.device("meta"):
        unet = UNet(UNetConfig(temporal_layers=2))
    for kind in ("expressions", "temporals"):
        assert sum(len(getattr(b, kind)) for b in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]) == 21


@torch.no_grad()
def test_the_domains_of_a_frame_do_not_mix_along_time():
    video, given = random_unet(TEMPORAL), inputs(3)
    y = video(**given, joint=False)[0]
    changed = dict(given, x=given["x"].clone())
    changed["x"][:, 1] += 1
    assert_close(video(**changed, joint=False)[0][:, 0], y[:, 0])


@torch.no_grad()
def test_expressions_reach_their_own_frame_alone(unet):
    a = inputs()
    b = dict(a, tokens=a["tokens"].clone(), latent=a["latent"].clone())
    b["tokens"][:, 1] += 1
    b["latent"][:, 1] += 1
    moved = (unet(**a)[0] - unet(**b)[0]).abs().amax((0, 2, 4, 5))
    assert (moved[:, 1] > 1e-3).all() and moved[:, 0].max() < 1e-6


def test_only_the_reference_networks_last_site_goes_without_gradient(unet):
    """What a distributed run must be told of: nothing reads the reference's last block beyond its hidden states."""
    reference = UNet(replace(TINY, expression_dim=None, expression_latent=None, reference=True))
    denoiser = random_unet(TINY)
    _, bank = reference(torch.randn(1, 1, 6, 1, 8, 8), torch.zeros(1), domain_ids=(0,))
    out, _ = denoiser(**inputs(), reference=denoiser.reference_kv(bank))
    out.square().mean().backward()
    assert not [k for k, p in denoiser.named_parameters() if p.grad is None]
    idle = [k for k, p in reference.named_parameters() if p.grad is None]
    assert idle and all(k.startswith("up_blocks.1.attentions.1.") for k in idle)


# Expression encoder


@torch.no_grad()
def test_the_null_expression_is_the_zero_latent():
    torch.manual_seed(0)
    encoder = ExpressionEncoder(ExpressionConfig(size=32, widths=(8, 16), squeeze=4, latent=8, tokens=5, token_dim=4))
    latent = encoder(torch.rand(3, 3, 32, 32))
    assert_close(latent.var(-1, correction=0), torch.ones(3), atol=0.02, rtol=0)
    dropped = encoder.drop(latent, torch.tensor([False, True, False]))
    assert torch.equal(dropped[[0, 2]], latent[[0, 2]]) and dropped[1].abs().max() == 0
    tokens = encoder.tokens(dropped)
    assert_close(tokens[1], encoder.tokens(torch.zeros(8)), atol=0, rtol=0)
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3
    # Positions tell tokens apart, and are not among the weights.
    assert encoder.position.std(0).max() > 0.1 and "position" not in encoder.state_dict()
