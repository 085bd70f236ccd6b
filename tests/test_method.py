"""The method against plain loops, other libraries and identities, in float32 unless it says so."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as tv

import relaxmim
from eval_occlusion import cka
from finetune import Classifier, layer_groups
from relaxmim import LOSSES, MASKS, Decoder, RelaxMIM, ViT, patchify

SIMILARITIES = [name for name in LOSSES if name != "crop"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_vit(in_chans=3):
    return ViT((16, 24), 4, in_chans, 32, 2, 2).eval()


def images_and_mask(batch, ratio=0.75):
    """Random images for small_vit, of 4 x 6 patches, and a random mask."""
    return torch.randn(batch, 3, 16, 24), *relaxmim.random_mask(batch, (4, 6), ratio)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 7)])
def test_visible_and_hidden_are_complements_of_exactly_the_rounded_count(name, grid):
    N = math.prod(grid)
    for ratio in (0.0, 0.01, 0.25, 0.6, 0.75, 0.9, 1.0):
        visible, hidden = MASKS[name](16, grid, ratio)
        assert hidden.shape == (16, round(ratio * N))
        assert all(torch.equal(x, x.sort(dim=1).values) for x in (visible, hidden))
        together = torch.cat([visible, hidden], dim=1).sort(dim=1).values
        assert torch.equal(together, torch.arange(N).expand(16, N))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, same, other = [MASKS[name](16, grid, 0.5, generator)[1] for generator in generators]
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one.unique(dim=0)) > 1  # images differ


def test_a_block_is_one_piece():
    for row in MASKS["block"](32, (8, 8), 0.25)[1].tolist():
        reached = {row[0]}
        for _ in row:
            beside = {i + step for i in reached for step in (-8, 8)}
            beside |= {i + step for i in reached for step in (-1, 1) if 0 <= i % 8 + step < 8}
            reached |= beside & set(row)
        assert reached == set(row)


def test_a_mask_of_your_own_becomes_indices_and_unequal_rows_are_refused():
    indices = relaxmim.random_mask(5, (4, 4), 0.4)
    mask = torch.zeros(5, 16, dtype=torch.bool).scatter(1, indices[1], True)
    assert_close(relaxmim.mask_indices(mask), indices)
    mask[0] = True
    with pytest.raises(ValueError, match="same number"):
        relaxmim.mask_indices(mask)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_count_row_by_row_and_unpatchify_is_the_inverse(channels):
    images = torch.randn(2, channels, 16, 24)
    patches = patchify(images, 4)
    for i in range(24):
        patch = images[1, :, 4 * (i // 6) :, 4 * (i % 6) :][:, :4, :4]
        assert torch.equal(patches[1, i], patch.permute(1, 2, 0).flatten())  # channels last
    assert torch.equal(relaxmim.unpatchify(patches, (4, 6), 4), images)


@pytest.mark.parametrize("size", [(16, 8), (8, 19)])
def test_images_of_another_size_are_refused(size):
    encoder = relaxmim.ViT((8, 16), 4, 3, 32, 1, 2)
    with pytest.raises(ValueError, match=r"expected \(8, 16\)"):
        encoder(torch.zeros(1, 3, *size))


def test_positions_have_the_layout_of_mae():
    table = relaxmim.sincos_positions((2, 3), 8)[0]
    assert not table[0].any()
    for i in range(6):
        row, col = divmod(i, 3)
        x = [math.sin(col), math.sin(col / 100), math.cos(col), math.cos(col / 100)]
        y = [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
        assert_close(table[1 + i], torch.tensor(x + y))


def test_attention_is_scaled_dot_product_attention():
    attention = small_vit().blocks[0].attn
    x = torch.randn(2, 5, 32)
    q, k, v = attention.qkv(x).view(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 32)
    assert_close(attention(x), attention.proj(expected))


def test_hidden_pixels_change_no_bit_of_the_features_and_visible_ones_do():
    encoder = small_vit()
    images, visible, hidden = images_and_mask(3, 0.5)
    before = encoder(images, visible)
    for index, same in ((hidden, True), (visible, False)):
        patches = patchify(images, 4).scatter(1, index[..., None].expand(-1, -1, 48), 100.0)
        changed = relaxmim.unpatchify(patches, (4, 6), 4)
        assert torch.equal(encoder(changed, visible), before) == same


def test_visible_patches_keep_their_positions_and_no_mask_means_all_patches():
    encoder = small_vit()
    images, visible, _ = images_and_mask(3, 0.5)
    embedded = encoder.patch_embed.proj(images).flatten(2)  # (B, D, N)
    for mask, index in ((visible, visible), (None, torch.arange(24).expand(3, 24))):
        for b in range(3):
            x = [embedded[b, :, i] + encoder.pos_embed[0, 1 + i] for i in index[b]]
            x = torch.stack([encoder.cls_token[0, 0], *x])[None]
            for block in encoder.blocks:
                x = block(x)
            assert_close(encoder(images, mask)[b], encoder.norm(x)[0])


def test_names_and_shapes_are_those_of_timm():
    expected = {"cls_token": (1, 1, 32), "pos_embed": (1, 25, 32)}
    layers = {"patch_embed.proj": (32, 3, 4, 4), "norm": (32,)}
    for block in ("blocks.0", "blocks.1"):
        layers.update({f"{block}.norm1": (32,), f"{block}.norm2": (32,)})
        layers.update({f"{block}.attn.qkv": (96, 32), f"{block}.attn.proj": (32, 32)})
        layers.update({f"{block}.mlp.fc1": (128, 32), f"{block}.mlp.fc2": (32, 128)})
    for name, shape in layers.items():
        expected.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    assert {name: tuple(x.shape) for name, x in small_vit().state_dict().items()} == expected


def test_weights_go_to_timm_and_back():
    timm = pytest.importorskip("timm").models.vision_transformer
    images = torch.randn(2, 3, 32, 32)
    encoder = ViT(32, 4, 3, 64, 3, 4)
    classifier = Classifier(32, 4, 3, 64, 3, 4, num_classes=7)
    for ours, classes, pool in ((encoder, 0, ""), (classifier, 7, "avg")):
        theirs = timm.VisionTransformer(32, 4, 3, classes, pool, 64, 3, 4)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)


def test_the_decoder_is_that_of_mae_with_every_token_at_its_place():
    decoder = Decoder((4, 6), 32, 16, 2, 2, 10)
    _, visible, hidden = images_and_mask(3)
    tokens = torch.randn(3, 1 + 6, 32)
    for b in range(3):
        x = decoder.mask_token.repeat(1, 25, 1)
        x[0, 0] = decoder.decoder_embed(tokens[b, 0])
        x[0, 1 + visible[b]] = decoder.decoder_embed(tokens[b, 1:])
        x = x + decoder.decoder_pos_embed
        for block in decoder.decoder_blocks:
            x = block(x)
        expected = decoder.decoder_pred(decoder.decoder_norm(x))[0, 1 + hidden[b]]
        assert_close(decoder(tokens, visible, hidden)[b], expected, atol=1e-5, rtol=1e-5)


def test_linear_layers_start_as_in_mae_and_those_of_the_second_decoder_as_in_pytorch():
    model = relaxmim.RMAE(small_vit(), decoder_dim=96)
    assert {block.attn.num_heads for block in model.decoder.decoder_blocks} == {3}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            if name.startswith("second_decoder"):
                bound = 1 / math.sqrt(layer.in_features)
            assert 0.9 * bound < layer.weight.abs().max() <= bound, name
            assert layer.bias.any() == name.startswith("second_decoder"), name


def test_drop_path_drops_whole_images_and_only_in_training():
    dropped = relaxmim.drop_path(torch.ones(200, 2, 3), 0.25, True).flatten(1)
    assert {tuple(row) for row in dropped.mul(0.75).tolist()} == {(0,) * 6, (1,) * 6}
    assert 0.6 < dropped.bool().float().mean() < 0.9
    assert torch.equal(relaxmim.drop_path(dropped, 0.25, False), dropped)
    model = Classifier((16, 24), 4, 3, 32, 3, 2, num_classes=5, drop_path=0.8)
    images = torch.randn(16, 3, 16, 24)
    assert not torch.equal(model(images), model(images))
    pooled = ViT.forward(model.eval(), images)[:, 1:].mean(dim=1)
    assert_close(model(images), model.head(model.fc_norm(pooled)))


def plain_centring(tokens, index):
    centred = tokens.clone()
    for position in index.unique():
        here = index == position  # (B, K)
        centred[here] = tokens[here] - tokens[here].mean(dim=0)
    return centred


def plain_info_nce(q, k, temperature):
    losses = []
    for b in range(len(q)):
        for i in range(q.shape[1]):
            scores = torch.exp(F.cosine_similarity(q[b, i], k[b], dim=1) / temperature)
            losses.append(-torch.log(scores[i] / scores.sum()))
    return torch.stack(losses).mean()


def plain_loss(name, model, images, visible, hidden):
    """(2), (5) or (6) as they are written, and the metrics of relax."""
    d1 = model.decoder(model.encoder(images, visible), visible, hidden)
    z2 = model.encoder(images, hidden)[:, 1:]
    if name == "infonce":
        q = plain_centring(d1, hidden)
        return plain_info_nce(q, plain_centring(z2.detach(), hidden), model.temperature), {}
    x = torch.stack([x[index] for x, index in zip(patchify(images, 4), hidden)])  # (B, K, P)
    if model.norm_pix:
        x = (x - x.mean(dim=2, keepdim=True)) / (x.var(dim=2, keepdim=True) + 1e-6).sqrt()
    mae = ((d1 - x) ** 2).mean()
    if name == "mae":
        return mae, {}
    d2 = model.second_decoder(z2)
    measure = ((d1 - d2.detach()) ** 2).mean()
    constraint = ((d2 - x) ** 2).mean()
    metrics = {"measure_eq4": measure, "constraint_eq3": constraint, "mae_eq2": mae}
    return measure + model.relax_weight * constraint, metrics


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("name", ["mae", "relax", "infonce"])
def test_loss_metrics_and_all_gradients_are_those_of_the_equations(name, norm_pix):
    options = {"norm_pix": norm_pix, "relax_weight": 0.7, "temperature": 0.3}
    model = LOSSES[name](small_vit(), decoder_dim=64, **options)
    images, visible, hidden = images_and_mask(6)
    inputs = [images.requires_grad_(), *model.parameters()]
    loss, metrics = model(images, visible, hidden)
    plain, expected = plain_loss(name, model, images, visible, hidden)
    assert_close(loss, plain)
    for metric, value in expected.items():
        assert_close(metrics[metric], value.detach())
    grads = torch.autograd.grad(loss, inputs)
    # of every weight and of the image: equal only if the stop-gradients are
    assert_close(grads, torch.autograd.grad(plain, inputs), atol=1e-5, rtol=1e-4)


def test_relax_loss_is_equation_5_and_each_decoder_learns_from_one_term():
    d1, d2, x = torch.randn(3, 2, 5, 4)
    expected = 0.0
    for a, b, c in zip(d1.flatten().tolist(), d2.flatten().tolist(), x.flatten().tolist()):
        expected += ((a - b) ** 2 + 0.7 * (b - c) ** 2) / 40
    loss = relaxmim.relax_loss(d1.requires_grad_(), d2.requires_grad_(), x, 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert_close(d1.grad, 2 * (d1 - d2).detach() / 40)
    assert_close(d2.grad, 0.7 * 2 * (d2 - x).detach() / 40)
    assert_close(relaxmim.relax_loss(d1, x, x), relaxmim.mse(d1, x))  # (4) is (2) if d2 is x


def test_features_collapse_if_the_constraint_does_not_train_the_encoder():
    images = F.interpolate(torch.randn(64, 3, 4, 4), size=16, mode="bilinear")
    ends = []
    for stopped in (False, True):
        torch.manual_seed(0)
        model = relaxmim.RMAE(ViT(16, 4, 3, 64, 2, 2))
        if stopped:  # d' reads sg[z2]
            model.second_decoder.register_forward_pre_hook(lambda layer, inputs: inputs[0].detach())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            loss, metrics = model(images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        visible, _ = relaxmim.random_mask(64, (4, 4), 0.75)
        _, measured = relaxmim.measure_invariance(model.encoder, images, visible)
        ends.append({**metrics, **measured})
    trained, collapsed = ends
    assert trained["feature_std"] > 0.3 and collapsed["feature_std"] < 0.2
    assert trained["constraint_eq3"] < 0.1 and collapsed["constraint_eq3"] > 0.15
    # (4) is lower all the same, and says nothing of (2)
    assert collapsed["measure_eq4"] < trained["measure_eq4"] - 0.1
    assert collapsed["mae_eq2"] > trained["mae_eq2"] - 0.02


@pytest.mark.parametrize("n", [2, 7, 64])
def test_info_nce_is_equation_6_and_log_n_if_features_do_not_depend_on_the_image(n):
    q, k = torch.randn(2, 3, n, 8)
    loss, accuracy = relaxmim.info_nce(q, k, 0.3)
    assert_close(loss, plain_info_nce(q, k, 0.3))
    best = F.cosine_similarity(q[:, :, None], k[:, None], dim=3).argmax(dim=2)
    assert accuracy == (best == torch.arange(n)).float().mean()
    with torch.autocast("cpu", torch.bfloat16):  # still computed in float32
        assert torch.equal(relaxmim.info_nce(q, k, 0.3)[0], loss)
    constant = torch.randn(1, 8).expand(n, 8)
    assert relaxmim.info_nce(constant, constant, 0.1)[0].item() == pytest.approx(math.log(n))
    tokens = torch.randint(9, (n, 8)).float().expand(6, n, 8)  # depend on the position alone
    tokens = relaxmim.subtract_position_mean(tokens, torch.arange(n).expand(6, n), n)
    assert relaxmim.info_nce(tokens, tokens, 0.1)[0].item() == pytest.approx(math.log(n))


def test_centring_gives_the_same_finite_gradient_every_time():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, hidden = relaxmim.random_mask(3, (4, 6), 0.5, device=device)
    alone = hidden.flatten().bincount(minlength=24)[hidden] == 1  # no other image has the position
    tokens, k = torch.randn(2, 3, 12, 8, device=device)
    grads = []
    for _ in range(5):
        q = tokens.clone().requires_grad_()
        centred = relaxmim.subtract_position_mean(q, hidden, 24)
        assert_close(centred, plain_centring(q, hidden))
        relaxmim.info_nce(centred, k, 0.2)[0].backward()
        grads.append(q.grad)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert q.grad[alone].abs().max() < 1e-3 < q.grad[~alone].abs().max()


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_without_indices_the_mask_is_random_and_every_weight_gets_a_gradient(name, bfloat16):
    model = LOSSES[name](small_vit(in_chans=1), mask_ratio=0.6)
    images = torch.randn(8, 1, 16, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        torch.manual_seed(1)
        loss, _ = model(images)
        torch.manual_seed(1)
        assert torch.equal(loss, model(images, *relaxmim.random_mask(8, (4, 6), 0.6))[0])
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    if name == "infonce":
        with pytest.raises(ValueError, match="2 images or more"):
            model(images[:1])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_with_the_weights_of_mae_the_loss_is_that_of_transformers(norm_pix):
    transformers = pytest.importorskip("transformers")
    options = {"image_size": 48, "patch_size": 8, "layer_norm_eps": 1e-6, "norm_pix_loss": norm_pix}
    options.update({"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4})
    options.update({"decoder_hidden_size": 96, "decoder_intermediate_size": 384})
    options.update({"num_hidden_layers": 3, "decoder_num_attention_heads": 3})
    theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**options)).eval()
    for parameter in theirs.parameters():  # biases too, which start at 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    renamed = {r"^vit\.(embeddings\.)?": "encoder.", "position_embeddings": "pos_embed"}
    renamed.update({r"\blayers\b": "blocks", "patch_embeddings.projection": "patch_embed.proj"})
    renamed.update({r"\bdecoder_layers\b": "decoder_blocks", "attention.o_proj": "attn.proj"})
    renamed.update({"layernorm_before": "norm1", "layernorm_after": "norm2", "layernorm": "norm"})
    weights = {}
    for name, value in theirs.state_dict().items():
        for pattern, replacement in renamed.items():
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    for name in [name for name in weights if ".q_proj." in name]:  # one matrix in MAE's layout
        parts = [weights.pop(name.replace(".q_", f".{letter}_")) for letter in "qkv"]
        weights[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    model = relaxmim.MAE(
        ViT(48, 8, 3, 64, 3, 4), decoder_dim=96, decoder_depth=8, norm_pix=norm_pix
    )
    model.load_state_dict(weights, strict=True)
    images = torch.randn(4, 3, 48, 48)
    expected = theirs(images, noise=torch.rand(4, 36))
    loss, _ = model(images, *relaxmim.mask_indices(expected.mask.bool()))
    assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_crop_contrast_compares_whole_images_and_trains_through_both_views():
    model = relaxmim.CropContrast(small_vit(), temperature=0.3)
    views = torch.randn(2, 5, 3, 16, 24, requires_grad=True)
    loss, _ = model(*views)
    q, k = [model.head(model.encoder(view)[:, 1:].mean(dim=1)) for view in views]
    assert_close(loss, plain_info_nce(q[None], k[None], 0.3))
    assert torch.autograd.grad(loss, views)[0].flatten(2).any(dim=2).all()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_invariance_and_retrieval_are_those_of_plain_loops_also_inside_autocast(bfloat16):
    encoder = small_vit()
    images, visible, _ = images_and_mask(40, 0.9)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        nearest, result = relaxmim.measure_invariance(encoder, images, visible)
    whole = encoder(images)[:, 1:].mean(dim=1)
    masked = encoder(images, visible)[:, 1:].mean(dim=1)
    center = torch.cat([whole, masked]).mean(dim=0)
    cosines = torch.stack([F.cosine_similarity(x - center, whole - center) for x in masked])
    assert torch.equal(nearest, cosines.argmax(dim=1))
    found = (nearest == torch.arange(40)).float().mean().item()
    assert 0 < found < 1
    assert result["retrieval"].item() == pytest.approx(found)
    assert_close(result["invariance"], cosines.diagonal().mean(), atol=1e-5, rtol=0)
    assert_close(result["feature_std"], F.normalize(whole).var(dim=0, correction=0).sum().sqrt())


def test_retrieval_is_1_of_n_if_features_collapse_and_1_if_masks_do_not_change_them():
    features = torch.randn(2500, 8)  # more than are compared at a time
    assert relaxmim.compare_features(features, features)[1]["retrieval"] == 1
    shifted = features.roll(1, 0)
    nearest, metrics = relaxmim.compare_features(features, shifted)
    assert torch.equal(nearest, torch.arange(2500).roll(1))
    assert metrics["retrieval"] == 0
    constant = torch.ones(64, 8)
    _, collapsed = relaxmim.compare_features(constant, constant)
    assert collapsed["retrieval"].item() == pytest.approx(1 / 64)
    assert collapsed["invariance"] == 0
    encoder = small_vit()
    torch.nn.init.zeros_(encoder.norm.weight)
    images, visible, _ = images_and_mask(8)
    _, result = relaxmim.measure_invariance(encoder, images, visible)
    assert result["retrieval"].item() == pytest.approx(1 / 8)
    assert result["feature_std"] == 0
    _, accuracy = relaxmim.info_nce(constant, constant, 0.2)
    assert accuracy.item() == pytest.approx(1 / 64)  # not 1: all keys are equally near


BORROWER = """
for name in ("mae", "relax", "infonce"):
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(16, 3, 3, 3), size=16, mode="bilinear")
    model = LOSSES[name](ViT(16, 4, 3, 32, 2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(50):
        loss, metrics = model(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), (name, losses)
"""


def test_everything_above_the_rule_runs_pasted_into_an_empty_file(tmp_path):
    method, _ = re.split(r"\n# ---.* Config", Path(relaxmim.__file__).read_text())
    absent = "import sys\nsys.modules |= dict.fromkeys(('torchvision', 'numpy', 'PIL', 'tqdm'))\n"
    (tmp_path / "borrowed.py").write_text(absent + method + BORROWER)
    subprocess.run([sys.executable, "borrowed.py"], cwd=tmp_path, check=True)


class Cosine(RelaxMIM):
    """A similarity from outside: cosine of tokens."""

    predicts = "tokens"

    def measure(self, images, visible, hidden):
        q = self.decoder(self.encoder(images, visible), visible, hidden)  # (B, K, D)
        k = self.encoder(images, hidden)[:, 1:].detach()
        loss = 1 - F.cosine_similarity(q, k, dim=-1).mean()
        return loss, {"left": (hidden % 4 < 3).float().mean()}  # 1: behind left_mask, of 4 x 4


class VICReg(RelaxMIM):
    """Another, with a module of its own: variance, invariance, covariance of projected tokens."""

    predicts = "tokens"

    def __init__(self, encoder, **options):
        super().__init__(encoder, **options)
        self.projector = torch.nn.Linear(encoder.embed_dim, 32)

    def measure(self, images, visible, hidden):
        a = self.projector(self.decoder(self.encoder(images, visible), visible, hidden))
        b = self.projector(self.encoder(images, hidden)[:, 1:])
        loss = 25 * relaxmim.mse(a, b)
        for x in (a.float().flatten(0, 1), b.float().flatten(0, 1)):
            loss = loss + 25 * F.relu(1 - (x.var(dim=0) + 1e-4).sqrt()).mean()
            covariance = torch.cov(x.T)
            loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / 32
        return loss, {"left": (hidden % 4 < 3).float().mean()}


def left_mask(batch, grid, ratio, generator=None, device=None):
    N = grid[0] * grid[1]
    score = torch.arange(N, device=device) % grid[1]
    return relaxmim.hide_lowest(score.expand(batch, -1), round(ratio * N))


@pytest.mark.parametrize("similarity", [Cosine, VICReg])
def test_a_similarity_and_a_mask_from_outside_are_trained_by_name(
    similarity, monkeypatch, tmp_path
):
    monkeypatch.setitem(LOSSES, "mine", similarity)
    monkeypatch.setitem(MASKS, "left", left_mask)
    options = "--loss mine --mask left --num-images 32 --steps 20 --batch-size 32 --img-size 16"
    out = tmp_path / "run"
    relaxmim.main([*options.split(), "--precision", "float32", "--out", str(out)])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["left"] == 1 and log[-1]["loss"] < log[0]["loss"] - 0.1
    assert (out / "views.png").stat().st_size > 1000
    relaxmim.main([*options.split(), "--precision", "float32", "--out", str(out), "--resume"])


@pytest.mark.parametrize("box", [(5, 3, 20, 20), (0, 0, 45, 40), (7, 10, 11, 9), (20, 20, 8, 8)])
@pytest.mark.parametrize("lone", [True, False])
def test_the_batched_crop_is_that_of_torchvision_one_by_one(box, lone):
    left, top, width, height = box
    image = F.interpolate(255 * torch.rand(1, 3, 3, 4), (40, 50), mode="bilinear").byte()
    share = width * height / 2000
    u_area = math.log(share, 0.02) if lone else (share - 0.02) / (1 - 0.02)  # from 8 x 8 pixels
    u_ratio = math.log(width / height) / 2 / math.log(4 / 3) + 0.5
    u = torch.tensor([[u_area, u_ratio, left / (50 - width), top / max(40 - height, 1), 0.9]])
    u = torch.cat([u, u - torch.tensor([0, 0, 0, 0, 0.5])])
    crop, flipped = relaxmim.random_crops(image if lone else image.repeat(2, 1, 1, 1), 8, u, 0.02)
    expected = tv.resized_crop(image[0].float(), top, left, height, width, [8, 8])
    assert (crop - expected).abs().mean() < 2  # of 255: they average in different ways
    assert torch.equal(flipped, crop.flip(2))


def test_colors_are_jittered_image_by_image():
    images = torch.rand(3, 3, 8, 8) * 255
    u = torch.tensor([[0.5, 0.5, 0.5, 0.9], [0.5, 0.5, 0.5, 0.1], [0.1, 0.8, 0.3, 0.5]])
    jittered = relaxmim.jitter_colors(images, u)
    assert_close(jittered[0], images[0])
    assert_close(jittered[1], images[1].mean(dim=0).expand(3, 8, 8))  # grey
    assert_close(jittered[2:], relaxmim.jitter_colors(images[2:], u[2:]))


@pytest.mark.parametrize("n, batch", [(10, 4), (3, 8), (1, 5)])
def test_an_epoch_takes_every_image_once_in_an_order_of_the_seed(n, batch):
    runs = [torch.cat(list(relaxmim.batch_order(n, batch, n, seed))) for seed in (0, 0, 1)]
    order, same, other = [run.view(batch, n) for run in runs]
    assert torch.equal(order.sort(dim=1).values, torch.arange(n).expand(batch, n))
    assert torch.equal(order, same)
    assert n == 1 or (len(order.unique(dim=0)) > 1 and not torch.equal(order, other))


def test_the_learning_rate_rises_for_a_tenth_then_falls_to_0():
    config = SimpleNamespace(steps=100, lr=2.0)
    expected = [0.2 * (i + 1) for i in range(10)]
    expected += [1 + math.cos(math.pi * i / 90) for i in range(91)]
    assert [relaxmim.learning_rate(i, config) for i in range(101)] == pytest.approx(expected)


def test_the_learning_rate_falls_from_the_head_down_and_only_matrices_decay():
    model = Classifier((16, 24), 4, 3, 32, 2, 2, num_classes=5)
    settings = {}
    for group in layer_groups(model, SimpleNamespace(layer_decay=0.5, weight_decay=0.05)):
        for parameter in group["params"]:
            settings[parameter] = (group["lr_scale"], group["weight_decay"])
    scales = {"cls_token": 0.125, "patch_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5}
    for name, parameter in model.named_parameters():
        scale = scales.get(re.match(r"blocks\.\d|\w+", name)[0], 1.0)
        assert settings[parameter] == (scale, 0.05 if parameter.ndim > 1 else 0.0)


def test_cka_is_that_of_centred_gram_matrices():
    a = torch.randn(20, 6) + 5
    b = torch.cat([a + torch.randn(20, 6), torch.randn(20, 3)], dim=1)
    gram_a, gram_b = [(x - x.mean(dim=0)) @ (x - x.mean(dim=0)).T for x in (a, b)]
    expected = (gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())
    assert cka(a, b) == pytest.approx(expected.item(), abs=1e-5)
